"""`lfm bench serve`: open and closed loops against a server, and the numbers made of them."""

import json
from pathlib import Path

import pytest

from lfm.cli.load import Percentiles, Target, gaps_of, prefix_hit_share, summarize
from lfm.cli.load_client import Answer, words
from lfm.cli.load_shapes import BACKGROUND, Load, agent_scripts, load_scripts, long_prompt_scripts
from lfm.config import ServerConfig, default_model
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
TARGET = Target(root="u", api_key=None, processes=1)


def test_the_summary_counts_answered_requests_over_the_whole_time() -> None:
    answers = [answer(0.0, 0.1, 0.2, 0.4), answer(1.0, 1.3, 1.5, 2.0), answer(0.5, error="InternalError: gone")]
    report = summarize(answers, CLOSED, model="m", target=TARGET)
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


def test_a_chunk_of_several_tokens_is_so_many_gaps() -> None:
    told = Answer(start_s=0.0, chunk_s=[1.0, 1.3, 1.4], chunk_tokens=[1, 4, 5])
    assert gaps_of(told) == pytest.approx([0.1, 0.1, 0.1, 0.1])
    assert gaps_of(Answer(start_s=0.0, chunk_s=[1.0, 1.3, 1.4])) == pytest.approx([0.3, 0.1])


def test_what_disturbs_is_told_apart() -> None:
    answers = [answer(0.0, 0.1, 0.2), answer(0.0, 7.0, 9.0)]
    answers[1].kind = BACKGROUND
    report = summarize(answers, CLOSED, model="m", target=TARGET)
    assert report.first_token_ms is not None
    assert report.background_first_token_ms is not None
    assert (report.first_token_ms.p99, report.background_first_token_ms.p99) == (100.0, 7000.0)
    assert report.inter_token_ms is not None
    assert report.inter_token_ms.p99 == 100.0
    assert report.total_tokens_per_s == 3.1, "all that was sent counts"


def test_the_hit_share_counts_whole_blocks_of_the_turn_before() -> None:
    def later(previous: int, cached: int) -> Answer:
        return Answer(start_s=0.0, turn=1, previous_prompt_tokens=previous, num_cached_tokens=cached)

    assert prefix_hit_share([later(100, 96), later(130, 128), later(47, 32)]) == 1.0
    assert prefix_hit_share([later(100, 96), later(100, 0)]) == 0.5
    assert prefix_hit_share([later(100, 112), later(40, 32)]) == 1.0, "hits in the answer do not make up for others"
    assert prefix_hit_share([later(100, 0)]) == 0.0
    assert prefix_hit_share([answer(0.0, 0.1)]) is None


def test_a_closed_loop_shares_the_requests_among_its_clients() -> None:
    scripts = load_scripts(CLOSED)
    assert [len(script.turns) for script in scripts] == [2, 1]
    assert len({words(turn.seed, 20) for script in scripts for turn in script.turns}) == 3


def test_an_open_loop_has_the_rate_and_the_mean_lengths_that_were_asked_for() -> None:
    load = Load(
        num_requests=4000, concurrency=None, rate=50.0, input_tokens=200, output_tokens=50, seed=3, lengths="lognormal",
        tokens_per_word=5.0,
    )  # fmt: skip
    scripts = load_scripts(load)
    assert scripts == load_scripts(load)
    assert scripts[-1].start_s == pytest.approx(4000 / 50, rel=0.1)
    turns = [turn for script in scripts for turn in script.turns]
    assert sum(turn.num_words for turn in turns) / 4000 == pytest.approx(40, rel=0.1)
    assert sum(turn.max_tokens for turn in turns) / 4000 == pytest.approx(50, rel=0.1)
    assert max(turn.max_tokens for turn in turns) > 3 * 50
    assert min(turn.max_tokens for turn in turns) >= 1


def test_long_prompts_come_at_their_times_and_are_background() -> None:
    scripts = long_prompt_scripts(CLOSED, long_tokens=300, every_s=2.0, num_long=3)
    background = [script for script in scripts if script.kind == BACKGROUND]
    assert [(script.start_s, script.turns[0].num_words) for script in background] == [
        (2.0, 300),
        (4.0, 300),
        (6.0, 300),
    ]
    assert len(scripts) == 2 + 3


def test_agents_say_their_task_and_then_the_results_of_tools() -> None:
    scripts = agent_scripts(CLOSED, num_turns=3)
    assert [[turn.role for turn in script.turns] for script in scripts] == [["user", "tool", "tool"]] * 2
    assert all(script.is_conversation for script in scripts)


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
    assert report["inter_token_ms"]["p50"] >= 0
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


def test_agents_repeat_what_was_said_and_count_what_was_cached(lfm: Lfm) -> None:
    backend = FakeBackend()
    backend.text = "Done"
    backend.num_cached_tokens = 16
    flags = ["--scenario", "agents", "--concurrency", "2", "--turns", "3", "--input-tokens", "40"]
    with serving(backend) as server:
        done = lfm("bench", "serve", "--url", server.url, *flags, "--output-tokens", "5")
    assert done.code == 0
    report = json.loads(done.out.splitlines()[-1])
    assert (report["scenario"], report["requests"], report["failed"]) == ("agents", 6, 0)
    assert 0 < report["prefix_hit_share"] < 1
    prompts = [request.prompt_ids for request in backend.requests[1:]]
    assert len(prompts) == 6
    for prompt in (prompt for prompt in prompts if len(prompt) > 100):
        shorter = [other for other in prompts if len(other) < len(prompt) and prompt[: len(other)] == other]
        assert shorter, "a later prompt begins with the one before"


def test_poisson_finds_saturation_and_then_loads_shares_of_it(lfm: Lfm, tmp_path: Path) -> None:
    path = tmp_path / "reports.jsonl"
    with serving(FakeBackend("Hello there")) as server:
        done = lfm(
            "bench", "serve", "--url", server.url, "--scenario", "poisson", "--requests", "12", "--concurrency", "4",
            "--input-tokens", "40", "--output-tokens", "4", "--client-processes", "1", "--output", str(path),
        )  # fmt: skip
    assert done.code == 0
    reports = [json.loads(line) for line in path.read_text().splitlines()]
    assert [report["loop"] for report in reports] == ["closed", "open", "open", "open"]
    rates = [report["rate"] / reports[0]["requests_per_s"] for report in reports[1:]]
    assert rates == pytest.approx([0.25, 0.5, 0.75], rel=0.01)
    assert {report["lengths"] for report in reports} == {"lognormal"}


@pytest.mark.parametrize(
    ("words_", "named"),
    [
        (["--scenario", "nonsense"], "Allowed: load, poisson, long-prompts, agents"),
        (["--lengths", "short"], "Allowed: fixed, lognormal"),
        (["--scenario", "agents", "--rate", "3"], "--rate is not for --scenario agents"),
        (["--turns", "1"], "--turns 1 is out of range"),
        (["--client-processes", "0"], "--client-processes 0 is out of range"),
    ],
    ids=["scenario", "lengths", "rate", "turns", "processes"],
)
def test_a_load_that_cannot_be_is_refused(lfm: Lfm, words_: list[str], named: str) -> None:
    done = lfm("bench", "serve", *words_)
    assert done.code == 2
    assert named in done.error


@pytest.mark.slow
def test_processes_of_clients_send_all_that_one_would(lfm: Lfm) -> None:
    backend = FakeBackend("Hello")
    with serving(backend) as server:
        done = lfm("bench", "serve", "--url", server.url, "--requests", "7", "--client-processes", "3")
    assert done.code == 0
    report = json.loads(done.out.splitlines()[-1])
    assert (report["requests"], report["failed"]) == (7, 0)
    assert len(backend.requests) == 1 + 7


@pytest.mark.slow
def test_without_a_url_it_starts_and_stops_a_server_of_its_own(lfm: Lfm) -> None:
    done = lfm("bench", "serve", "--requests", "4", "--output-tokens", "5", "--device", "cpu")
    assert done.code == 0
    report = json.loads(done.out.splitlines()[-1])
    assert (report["model"], report["failed"], report["output_tokens"]) == (default_model(), 0, 5.0)


@pytest.mark.slow
def test_what_keeps_its_own_server_from_starting_is_the_error(lfm: Lfm) -> None:
    done = lfm("bench", "serve", "random:nothing")
    assert done.code == 2
    assert "random:nothing is not known" in done.error
