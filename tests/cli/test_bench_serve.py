"""`lfm bench serve`: open and closed loops against a server, and the numbers made of them."""

import json
from pathlib import Path

import pytest

from lfm.cli.load import Answer, Load, Percentiles, summarize
from lfm.config import ServerConfig
from lfm.errors import RequestError
from tests.cli.conftest import Lfm
from tests.server.fakes import MODEL, FakeBackend, serving


def answer(start_s: float, *chunk_s: float, tokens: int = 4, error: str | None = None) -> Answer:
    return Answer(
        start_s=start_s,
        chunk_s=list(chunk_s),
        end_s=chunk_s[-1] if chunk_s else start_s + 1,
        num_prompt_tokens=10,
        num_output_tokens=tokens,
        error=error,
    )


CLOSED = Load(num_requests=3, concurrency=2, rate=None, input_tokens=10, output_tokens=4, seed=0)


def test_the_summary_counts_answered_requests_over_the_whole_time() -> None:
    answers = [answer(0.0, 0.1, 0.2, 0.4), answer(1.0, 1.3, 1.5, 2.0), answer(0.5, error="InternalError: gone")]
    report = summarize(answers, CLOSED, model="m", url="u")
    assert (report.requests, report.failed, report.errors) == (3, 1, {"InternalError: gone": 1})
    assert report.duration_s == 2.0
    assert report.requests_per_s == 1.0
    assert report.output_tokens_per_s == 4.0
    assert report.total_tokens_per_s == 14.0
    assert (report.input_tokens, report.output_tokens) == (10.0, 4.0)
    assert report.first_token_ms is not None
    assert (report.first_token_ms.mean, report.first_token_ms.p50) == (200.0, 300.0)
    assert report.inter_token_ms is not None
    assert (report.inter_token_ms.mean, report.inter_token_ms.p99) == (250.0, 500.0)
    assert report.latency_ms is not None
    assert report.latency_ms.p95 == 1000.0


def test_percentiles_are_values_that_were_measured() -> None:
    times = Percentiles.of([index / 1000 for index in range(100)])
    assert times == Percentiles(mean=49.5, p50=50.0, p95=95.0, p99=99.0)
    assert Percentiles.of([]) is None


@pytest.mark.parametrize("flags", [["--concurrency", "3"], ["--rate", "200"]])
def test_a_loop_sends_every_request_and_reports_as_json(lfm: Lfm, tmp_path: Path, flags: list[str]) -> None:
    backend = FakeBackend()
    backend.text = "Hello there"
    path = tmp_path / "report.json"
    words = ["--requests", "10", "--input-tokens", "50", "--output-tokens", "7", "--output", str(path), *flags]
    with serving(backend) as server:
        done = lfm("bench", "serve", "--url", server.url, *words)
    assert done.code == 0
    report = json.loads(done.out.splitlines()[-1])
    assert report == json.loads(path.read_text())
    assert (report["model"], report["requests"], report["failed"]) == (MODEL, 10, 0)
    assert report["loop"] == ("open" if "--rate" in flags else "closed")
    assert report["input_tokens"] == pytest.approx(50, rel=0.5)
    assert report["first_token_ms"]["p50"] > 0
    assert "time to first token" in done.out
    sent = backend.requests[1:]  # the first one asked how long a word is
    assert len(sent) == 10
    assert {request.sampling.max_tokens for request in sent} == {7}
    assert {request.sampling.stop_token_ids for request in sent} == {()}
    assert len({tuple(request.prompt_ids) for request in sent}) == 10


def test_a_server_that_refuses_is_heard(lfm: Lfm) -> None:
    backend = FakeBackend()
    backend.refusal = RequestError("max_tokens=7 is too much.", param="max_tokens")
    with serving(backend) as server:
        done = lfm("bench", "serve", "--url", server.url)
    assert done.code == 2
    assert "is too much" in done.error


def test_a_key_is_asked_for_and_sent(lfm: Lfm) -> None:
    backend = FakeBackend()
    backend.text = "Hello"
    with serving(backend, ServerConfig(port=0, api_key="secret")) as server:
        without = lfm("bench", "serve", "--url", server.url, "--requests", "1")
        with_key = lfm("bench", "serve", "--url", server.url, "--requests", "1", "--api-key", "secret")
    assert without.code == 2
    assert "--api-key or LFM_API_KEY" in without.error
    assert with_key.code == 0


def test_a_server_that_is_not_there_is_the_machine_s_fault(lfm: Lfm, free_port: int) -> None:
    done = lfm("bench", "serve", "--url", f"http://127.0.0.1:{free_port}")
    assert done.code == 3
    assert "does not answer" in done.error


@pytest.mark.slow
def test_without_a_url_it_starts_and_stops_a_server_of_its_own(lfm: Lfm) -> None:
    done = lfm("bench", "serve", "--requests", "4", "--output-tokens", "5", "--device", "cpu")
    assert done.code == 0
    report = json.loads(done.out.splitlines()[-1])
    assert (report["model"], report["failed"], report["output_tokens"]) == ("random:tiny", 0, 5.0)


@pytest.mark.slow
def test_what_keeps_its_own_server_from_starting_is_the_error(lfm: Lfm) -> None:
    done = lfm("bench", "serve", "random:nothing")
    assert done.code == 2
    assert "random:nothing is not known" in done.error
