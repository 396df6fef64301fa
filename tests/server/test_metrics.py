"""GET /metrics: both names of every common metric, fed by requests and by the engine's counters."""

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lfm.errors import OverloadedError
from lfm.server.metrics import VLLM_NAMES
from tests.server.fakes import MODEL, AppClient


@pytest.fixture
def client() -> AppClient:
    return AppClient()


def value_of(client: AppClient, name: str, **labels: str) -> float:
    """The sum of the samples of that name whose labels include these; fails if there is none."""
    samples = [
        sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert samples, name
    return sum(samples)


def test_every_common_metric_has_both_names(client: AppClient) -> None:
    client.chat()
    client.backend.refusal = OverloadedError("full", retry_after_s=1, code="queue_full")
    client.chat()
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    for name in VLLM_NAMES:
        ours, theirs = families[f"lfm_{name}"], families[f"vllm:{name}"]
        assert ours.type == theirs.type
        assert ours.samples
        assert [sample.value for sample in ours.samples] == [sample.value for sample in theirs.samples]
    assert not [name for name in families if name.endswith("_created")]


def test_engine_counters_are_read_when_scraped(client: AppClient) -> None:
    labels = {"model_name": MODEL, "engine": "0"}
    assert value_of(client, "vllm:num_requests_running", **labels) == 2
    assert value_of(client, "vllm:kv_cache_usage_perc") == 0.25
    client.backend.engine_stats = msgspec.structs.replace(
        client.backend.engine_stats, num_running=5, generated_tokens=70, preemptions=3, cached_prompt_tokens=6
    )
    assert value_of(client, "vllm:num_requests_running") == 5
    assert value_of(client, "vllm:generation_tokens_total") == 70
    assert value_of(client, "vllm:num_preemptions_total") == 3
    assert value_of(client, "vllm:prefix_cache_hits_total") == 6
    assert value_of(client, "lfm_prompt_tokens_cached_total") == 6
    assert value_of(client, "lfm_ready") == 1
    client.backend.reason = "stuck"
    assert value_of(client, "lfm_ready") == 0


def test_requests_feed_the_timings(client: AppClient) -> None:
    client.chat(n=2, max_tokens=4)
    client.chat(stream=True)
    assert value_of(client, "vllm:time_to_first_token_seconds_count") == 2
    assert value_of(client, "vllm:e2e_request_latency_seconds_count") == 2
    assert value_of(client, "vllm:inter_token_latency_seconds_count") == 2 * 3 + 6
    assert value_of(client, "vllm:request_generation_tokens_sum") == 2 * 4 + 7
    assert value_of(client, "vllm:request_params_n_sum") == 3
    assert value_of(client, "vllm:request_success_total", finished_reason="length") == 2
    assert value_of(client, "vllm:request_success_total", finished_reason="stop") == 1
    prompt = len(client.backend.requests[0].prompt_ids)
    assert value_of(client, "vllm:request_prompt_tokens_sum") == 2 * prompt


def test_inter_token_buckets_tell_three_milliseconds_from_five(client: AppClient) -> None:
    client.chat()
    buckets = [
        float(sample.labels["le"])
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == "vllm:inter_token_latency_seconds_bucket"
    ]
    assert len([bucket for bucket in buckets if bucket < 0.01]) >= 6


def test_http_requests_are_counted_by_route_and_never_by_path(client: AppClient) -> None:
    client.chat()
    client.chat(n=0)
    client.get("/v1/models/a-name-of-the-client")
    client.get("/wp-admin.php")
    assert value_of(client, "lfm_http_requests_total", route="/v1/chat/completions", status="200") == 1
    assert value_of(client, "lfm_http_requests_total", route="/v1/chat/completions", status="400") == 1
    assert value_of(client, "lfm_http_requests_total", route="/v1/models/{model:path}", status="404") == 1
    assert value_of(client, "lfm_http_requests_total", route="unknown", status="404") == 1
    text = client.get("/metrics").text
    assert "wp-admin" not in text
    assert "a-name-of-the-client" not in text


def test_two_apps_in_one_process_count_apart() -> None:
    first, second = AppClient(), AppClient()
    first.chat()
    assert value_of(first, "vllm:request_params_n_count") == 1
    assert value_of(second, "vllm:request_params_n_count") == 0
