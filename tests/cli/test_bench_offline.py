"""`lfm bench offline`: exact shapes, the promised JSON, nulls for what is not known."""

import json
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import pytest

from lfm.cli import offline as offline_module
from lfm.cli.offline import Facts, Result, measure
from lfm.cli.workloads import WORKLOADS, find_workloads
from lfm.config import EngineConfig
from lfm.errors import UsageError
from lfm.llm import LLM
from lfm.model.limits import Workload
from tests.cli.conftest import Lfm

KEYS = {
    *("workload", "quantize", "kv_dtype", "dtype", "commit", "gpu", "driver", "torch", "triton", "requests"),
    *("input_tokens", "output_tokens", "sampling", "runs_s", "spread", "output_tokens_per_s", "total_tokens_per_s"),
    *("limit_share", "experts_hit", "host_ms_per_step", "cache_tokens"),
}
SMALL = {
    "b1": Workload(name="b1", requests=1, input_tokens=20, output_tokens=6),
    "b8": Workload(name="b8", requests=8, input_tokens=20, output_tokens=4),
    "agents": Workload(name="agents", requests=4, input_tokens=10, output_tokens=3, shared_tokens=64),
}
CONFIG = EngineConfig(model="random:tiny", device="cpu")
FACTS = Facts(commit=None, gpu=None, driver=None, torch="2.13.0", triton=None)


@pytest.fixture
def small_workloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm.cli.workloads.WORKLOADS", SMALL)


def test_the_workloads_are_those_that_results_are_compared_under() -> None:
    shapes = {w.name: (w.requests, w.shared_tokens, w.input_tokens, w.output_tokens) for w in WORKLOADS.values()}
    assert shapes == {
        "b1": (1, 0, 128, 512),
        "b8": (8, 0, 128, 256),
        "b32": (32, 0, 128, 256),
        "b128": (128, 0, 1024, 256),
        "b1024": (1024, 0, 1024, 512),
        "prefill": (1, 0, 8192, 1),
        "long": (16, 0, 30_000, 256),
        "agents": (256, 4096, 256, 64),
        "b32-zipf": (32, 0, 128, 256),
        "b128-default": (128, 0, 1024, 256),
        "decode-30k": (32, 0, 30_000, 128),
    }
    assert find_workloads("all") == list(WORKLOADS.values())
    (http,) = find_workloads("http")
    assert (http.requests, http.input_tokens, http.output_tokens, http.sampling) == (2048, 1024, 256, "default")


def test_only_decoding_is_timed_where_a_workload_says_so() -> None:
    workload = Workload(name="decode", requests=3, input_tokens=20, output_tokens=5, is_decode_only=True)
    (result,) = measure(CONFIG, [workload], num_runs=1, facts=FACTS)
    assert result.output_tokens_per_s == pytest.approx(3 * 4 / result.runs_s[0], rel=0.01)
    assert result.total_tokens_per_s == result.output_tokens_per_s


def test_a_zipf_router_visits_fewer_experts_and_is_undone() -> None:
    shape = {"requests": 6, "input_tokens": 8, "output_tokens": 4}
    workloads = [
        Workload(name="uniform", **shape),
        Workload(name="skewed", routing="zipf", **shape),
        Workload(name="uniform", **shape),
    ]
    before, skewed, after = measure(CONFIG, workloads, num_runs=1, facts=FACTS)
    assert skewed.experts_hit is not None
    assert before.experts_hit is not None
    assert skewed.experts_hit < before.experts_hit
    assert after.experts_hit == before.experts_hit


def test_default_sampling_is_what_the_24b_recommends() -> None:
    workload = Workload(name="default", requests=2, input_tokens=8, output_tokens=4, sampling="default")
    (result,) = measure(CONFIG, [workload], num_runs=1, facts=FACTS)
    assert result.sampling == "default"


def test_workloads_are_named_with_commas() -> None:
    assert [workload.name for workload in find_workloads(" b8,b1 ,")] == ["b8", "b1"]
    with pytest.raises(UsageError, match="b9"):
        find_workloads("b1,b9")


@pytest.mark.usefixtures("small_workloads")
def test_each_workload_is_one_json_line_with_the_promised_keys(lfm: Lfm, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    done = lfm("bench", "offline", "--workload", "b1,b8", "--runs", "2", "--device", "cpu", "--output", str(path))
    assert done.code == 0
    written = [json.loads(line) for line in path.read_text().splitlines()]
    printed = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    assert printed == written
    assert json.loads(done.out.splitlines()[-1]) == written[-1]
    assert [result["workload"] for result in written] == ["b1", "b8"]
    for result, workload in zip(written, (SMALL["b1"], SMALL["b8"]), strict=True):
        assert set(result) >= KEYS
        assert len(result["runs_s"]) == 2
        assert result["requests"] == workload.requests
        median_s = sum(result["runs_s"]) / 2
        assert result["output_tokens_per_s"] == pytest.approx(
            workload.requests * workload.output_tokens / median_s, rel=0.01
        )
        assert result["host_ms_per_step"] > 0
        assert (result["gpu"], result["driver"], result["limit_share"]) == (None, None, None)
    assert "out tok/s" in done.out


def test_experts_hit_is_counted_while_decoding() -> None:
    (result,) = measure(CONFIG, [SMALL["b1"]], num_runs=1, facts=FACTS)
    assert result.experts_hit == 4.0  # one sequence visits its own four of eight
    (result,) = measure(CONFIG, [SMALL["b8"]], num_runs=1, facts=FACTS)
    assert result.experts_hit is not None
    assert 4.0 < result.experts_hit <= 8.0


def test_counting_leaves_the_engine_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(CONFIG) as llm:
        monkeypatch.setattr(offline_module, "load_llm", lambda config: llm)
        monkeypatch.setattr(LLM, "close", lambda self: None)
        before = llm.engine.runner.ops
        list(measure(CONFIG, [SMALL["b1"]], num_runs=1, facts=FACTS))
        assert llm.engine.runner.ops is before


def test_the_limit_share_is_null_for_an_unknown_device_and_a_share_for_a_known_one() -> None:
    h200 = replace(FACTS, gpu="NVIDIA H200")
    config = replace(CONFIG, dtype="bfloat16")
    (result,) = measure(config, [SMALL["b1"]], num_runs=1, facts=h200)
    assert result.limit_share is not None
    assert 0 <= result.limit_share < 0.01  # this is no H200
    (result,) = measure(replace(config, dtype="float32"), [SMALL["b1"]], num_runs=1, facts=h200)
    assert result.limit_share is None
    (result,) = measure(config, [SMALL["b1"]], num_runs=1, facts=replace(h200, gpu="NVIDIA Other"))
    assert result.limit_share is None


def test_agents_share_their_prefix_through_the_cache_and_others_share_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[bool, int]] = []
    original = LLM.close

    def close(llm: LLM) -> None:
        if hasattr(llm, "engine"):
            scheduler = llm.engine.scheduler
            seen.append((scheduler.counters.cached_prompt_tokens > 0, scheduler.counters.prompt_tokens))
        original(llm)

    monkeypatch.setattr(LLM, "close", close)
    results = list(measure(CONFIG, [SMALL["agents"], SMALL["b8"]], num_runs=1, facts=FACTS))
    assert [result.workload for result in results] == ["b8", "agents"]
    assert [has_hits for has_hits, _ in seen] == [False, True]
    assert results[1].input_tokens == 74


def test_every_run_has_new_prompts_and_every_process_the_same_ones() -> None:
    first = offline_module._Prompts(SMALL["agents"], vocab_size=1000)
    again = offline_module._Prompts(SMALL["agents"], vocab_size=1000)
    one, two = first.new_requests(), first.new_requests()
    assert [request.prompt_ids for request in one] == [request.prompt_ids for request in again.new_requests()]
    assert one[0].prompt_ids[:64] == one[1].prompt_ids[:64]
    assert one[0].prompt_ids[:64] != two[0].prompt_ids[:64]
    assert one[0].prompt_ids[64:] != one[1].prompt_ids[64:]
    assert len({request.request_id for request in one + two}) == 8
    sampling = one[0].sampling
    assert (sampling.temperature, sampling.repetition_penalty, sampling.stop_token_ids) == (0.0, 1.0, ())
    assert not one[0].mask_padded_ids


def test_the_facts_are_those_of_the_checkout(tmp_path: Path) -> None:
    facts = Facts.of_this_machine("given")
    root = Path(offline_module.__file__).resolve().parents[2]
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert facts.commit is not None
    assert facts.commit.startswith(head.stdout.strip() or "given")
    assert {field.name for field in fields(Facts)} <= {field.name for field in fields(Result)}
