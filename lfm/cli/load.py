"""Load on a server over HTTP, and what its clients see of it.

How many words make the wanted number of tokens is asked of the server once, at the start, which warms it up as well.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import httpx2
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lfm import http_client as http
from lfm.cli.load_client import Answer, Script, send_all, words
from lfm.cli.load_shapes import BACKGROUND, Load, agent_scripts, load_scripts, long_prompt_scripts
from lfm.cli.terminal import note
from lfm.errors import InternalError, MachineError

PROBE_WORDS = 64
SATURATION_SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Of one quantity over all requests (or all gaps), in milliseconds."""

    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Percentiles | None":
        """None if there is nothing to describe."""
        if not seconds:
            return None
        ordered = sorted(seconds)

        def rank(share: float) -> float:  # nearest rank: a value that was really measured
            return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3, 3)

        return cls(mean=round(statistics.fmean(ordered) * 1e3, 3), p50=rank(0.5), p95=rank(0.95), p99=rank(0.99))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the clients saw. Rates count answered requests only, over the time from first send to last byte.

    Latencies are those of the scenario's own requests; what else was sent to disturb them is in the last field but one.
    `prefix_hit_share`: of the tokens of an agent's last prompt, in whole blocks, how many its next one found cached.
    """

    scenario: str
    model: str
    url: str
    commit: str | None
    loop: str
    concurrency: int | None
    rate: float | None
    lengths: str
    requests: int
    failed: int
    errors: dict[str, int]
    input_tokens: float
    output_tokens: float
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    first_token_ms: Percentiles | None
    inter_token_ms: Percentiles | None
    latency_ms: Percentiles | None
    background_first_token_ms: Percentiles | None
    prefix_hit_share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server, and how to load it. `processes` share the clients, so that these are not what is measured."""

    root: str
    api_key: str | None
    processes: int
    commit: str | None = None


class Scenario(NamedTuple):
    """What `drive` plays: `name` and, where it needs them, its own numbers."""

    name: str
    long_tokens: int
    long_every_s: float
    num_long: int
    num_turns: int


def drive(target: Target, load: Load, scenario: Scenario) -> list[Report]:
    """Play a scenario; one report per load. Raises LfmError if the server does not answer, or answers no request."""
    with httpx2.Client(headers=http.auth_headers(target.api_key), timeout=http.TIMEOUT) as client:
        model = http.served_model(client, target.root)
        load = replace(load, tokens_per_word=_tokens_per_word(client, target.root, model=model))

    def play(load: Load, scripts: Sequence[Script]) -> Report:
        note(f"sending {sum(len(script.turns) for script in scripts)} requests to {model} at {target.root}")
        answers = send_all(
            scripts, url=target.root, model=model, api_key=target.api_key, processes=min(target.processes, len(scripts))
        )
        report = summarize(answers, load, model=model, target=target, scenario=scenario.name)
        if report.failed == report.requests:
            raise InternalError(f"No request was answered. The first error: {next(iter(report.errors))}")
        return report

    if scenario.name == "poisson":
        return _poisson(load, play)
    if scenario.name == "long-prompts":
        scripts = long_prompt_scripts(
            load, long_tokens=scenario.long_tokens, every_s=scenario.long_every_s, num_long=scenario.num_long
        )
        return [play(load, scripts)]
    if scenario.name == "agents":
        return [play(load, agent_scripts(load, num_turns=scenario.num_turns))]
    return [play(load, load_scripts(load))]


def _poisson(load: Load, play: Callable[[Load, Sequence[Script]], Report]) -> list[Report]:
    """What a closed loop gets out of the server is saturation; then random arrivals at shares of it."""
    load = replace(load, lengths="lognormal")
    reports = [play(load, load_scripts(load))]
    for share in SATURATION_SHARES:
        rate = round(share * reports[0].requests_per_s, 3)
        arriving = replace(load, concurrency=None, rate=rate, seed=load.seed + len(reports))
        reports.append(play(arriving, load_scripts(arriving)))
    return reports


def _tokens_per_word(client: httpx2.Client, root: str, *, model: str) -> float:
    messages = [{"role": "user", "content": words("probe", PROBE_WORDS)}]
    try:
        response = client.post(
            f"{root}/v1/chat/completions", json={"model": model, "messages": messages, "max_tokens": 1}
        )
    except httpx2.HTTPError as error:
        raise http.unreachable(root, error) from error
    if response.status_code != 200:
        raise http.refused(response)
    return float(response.json()["usage"]["prompt_tokens"]) / PROBE_WORDS


def summarize(answers: Sequence[Answer], load: Load, *, model: str, target: Target, scenario: str = "load") -> Report:
    """Describe finished requests."""
    good = [answer for answer in answers if answer.error is None]
    own = [answer for answer in good if answer.kind != BACKGROUND]
    background = [answer for answer in good if answer.kind == BACKGROUND]
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    duration_s = max(answer.end_s for answer in answers) - min(answer.start_s for answer in answers)
    num_prompt, num_output = (
        sum(getattr(a, name) for a in good) for name in ("num_prompt_tokens", "num_output_tokens")
    )
    return Report(
        scenario=scenario,
        model=model,
        url=target.root,
        commit=target.commit,
        loop="open" if load.rate is not None else "closed",
        concurrency=load.concurrency,
        rate=load.rate,
        lengths=load.lengths,
        requests=len(answers),
        failed=len(answers) - len(good),
        errors=dict(errors.most_common()),
        input_tokens=round(num_prompt / max(1, len(good)), 1),
        output_tokens=round(num_output / max(1, len(good)), 1),
        duration_s=round(duration_s, 3),
        requests_per_s=round(len(good) / duration_s, 3),
        output_tokens_per_s=round(num_output / duration_s, 1),
        total_tokens_per_s=round((num_prompt + num_output) / duration_s, 1),
        first_token_ms=Percentiles.of([a.chunk_s[0] - a.start_s for a in own if a.chunk_s]),
        inter_token_ms=Percentiles.of([gap for answer in own for gap in gaps_of(answer)]),
        latency_ms=Percentiles.of([a.end_s - a.start_s for a in own]),
        background_first_token_ms=Percentiles.of([a.chunk_s[0] - a.start_s for a in background if a.chunk_s]),
        prefix_hit_share=prefix_hit_share(good),
    )


def gaps_of(answer: Answer) -> list[float]:
    """The time that each token but the first took. Those of a chunk of several tokens share its time evenly.

    A chunk counts as one token where the server does not tell how many there are.
    """
    gaps = []
    counts = answer.chunk_tokens
    for index in range(1, len(answer.chunk_s)):
        num_tokens = counts[index] - counts[index - 1] if len(counts) == len(answer.chunk_s) else 1
        gap_s = answer.chunk_s[index] - answer.chunk_s[index - 1]
        gaps += [gap_s / max(1, num_tokens)] * max(1, num_tokens)
    return gaps


def prefix_hit_share(answers: Sequence[Answer]) -> float | None:
    """Found over findable tokens of later turns; None without such. A turn can find the whole blocks of the prompt of
    the turn before; what it finds of that turn's answer is not counted, since a text may be tokenised otherwise."""
    later = [answer for answer in answers if answer.previous_prompt_tokens]
    block = math.gcd(*(answer.num_cached_tokens for answer in later))  # hits are whole blocks
    findable = [answer.previous_prompt_tokens // max(1, block) * max(1, block) for answer in later]
    if not sum(findable):
        return None
    found = sum(min(a.num_cached_tokens, possible) for a, possible in zip(later, findable, strict=True))
    return round(found / sum(findable), 4)


def write_reports(reports: Sequence[Report], path: Path | None) -> None:
    """Write each report as a JSON line. Raises MachineError."""
    if path is None:
        return
    try:
        path.write_text("".join(json.dumps(asdict(report)) + "\n" for report in reports), encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{path} cannot be written ({error.strerror}). Choose another --output.") from error


def print_report(report: Report) -> None:
    """A table for people, then one JSON line for programs."""
    load = f"{report.rate:g} requests/s" if report.rate is not None else f"{report.concurrency} at once"
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{report.scenario}: {report.requests - report.failed} of {report.requests} requests answered, {report.loop} "
        f"loop, {load}: {report.input_tokens:,.0f} tokens in, {report.output_tokens:,.0f} out each, "
        f"{report.duration_s:.2f} s"
    )
    console.print(
        f"{report.requests_per_s:,.2f} requests/s, {report.output_tokens_per_s:,.0f} output tok/s, "
        f"{report.total_tokens_per_s:,.0f} total tok/s"
    )
    if report.prefix_hit_share is not None:
        console.print(f"{report.prefix_hit_share:.1%} of what could be found in the prefix cache was")
    for error, count in report.errors.items():
        console.print(f"{count} x {error}", markup=False)
    table = Table(box=SIMPLE)
    for heading in ("ms", "mean", "p50", "p95", "p99"):
        table.add_column(heading, justify="left" if heading == "ms" else "right")
    rows = [
        ("time to first token", report.first_token_ms),
        ("inter-token latency", report.inter_token_ms),
        ("latency", report.latency_ms),
    ]
    if report.background_first_token_ms is not None:
        rows.append(("time to first token, long prompts", report.background_first_token_ms))
    for name, times in rows:
        values = (times.mean, times.p50, times.p95, times.p99) if times is not None else ()
        table.add_row(name, *(f"{value:,.1f}" for value in values))
    console.print(table)
    print(json.dumps(asdict(report)), flush=True)
