"""Load on a server over HTTP, and what its clients see of it.

Open loop: requests arrive at random times whatever the server does, as real users do. Closed loop: a fixed number of
clients, each of which sends its next request when the last one is answered. Prompts are random words, so that none is
found in a prefix cache; how many words make the wanted number of tokens is asked of the server once, at the start.
"""

import asyncio
import json
import random
import statistics
import string
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx2
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lfm import http_client as http
from lfm.cli.terminal import note
from lfm.errors import InternalError, LfmError, MachineError

PROBE_WORDS = 64
UNLIMITED = httpx2.Limits(max_connections=None, max_keepalive_connections=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send. Exactly one of `concurrency` (closed loop) and `rate` (open loop, requests per second) is set."""

    num_requests: int
    concurrency: int | None
    rate: float | None
    input_tokens: int
    output_tokens: int
    seed: int


@dataclass(slots=True)
class Answer:
    """One request's times, as `time.perf_counter()`, and its token counts. `chunk_s` are the times of its chunks."""

    start_s: float
    chunk_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None


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
    """What the clients saw. Rates count answered requests only, over the time from first send to last byte."""

    model: str
    url: str
    loop: str
    concurrency: int | None
    rate: float | None
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


def drive(root: str, load: Load, *, api_key: str | None) -> Report:
    """Put the load on the server at `root`. Raises LfmError if it does not answer, or answers no request at all."""
    with httpx2.Client(headers=http.auth_headers(api_key), timeout=http.TIMEOUT) as client:
        model = http.served_model(client, root)
        words = _words_per_prompt(client, root, model=model, input_tokens=load.input_tokens)
    note(f"sending {load.num_requests} requests to {model} at {root}")
    answers = asyncio.run(_send_all(root, load, model=model, num_words=words, api_key=api_key))
    report = summarize(answers, load, model=model, url=root)
    if report.failed == report.requests:
        raise InternalError(f"No request was answered. The first error: {next(iter(report.errors))}")
    return report


def _words_per_prompt(client: httpx2.Client, root: str, *, model: str, input_tokens: int) -> int:
    """How many random words make a prompt of about `input_tokens`. This request warms the server up as well."""
    body = {"model": model, "messages": _messages(random.Random("probe"), PROBE_WORDS), "max_tokens": 1}
    try:
        response = client.post(f"{root}/v1/chat/completions", json=body)
    except httpx2.HTTPError as error:
        raise http.unreachable(root, error) from error
    if response.status_code != 200:
        raise http.refused(response)
    return max(1, round(input_tokens * PROBE_WORDS / int(response.json()["usage"]["prompt_tokens"])))


def _messages(source: random.Random, num_words: int) -> list[dict[str, str]]:
    words = ("".join(source.choices(string.ascii_lowercase, k=4)) for _ in range(num_words))
    return [{"role": "user", "content": " ".join(words)}]


async def _send_all(root: str, load: Load, *, model: str, num_words: int, api_key: str | None) -> list[Answer]:
    source = random.Random(load.seed)
    bodies = [
        {
            "model": model,
            "messages": _messages(source, num_words),
            "max_tokens": load.output_tokens,
            "ignore_eos": True,  # our server's and vLLM's: answers of exact length
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(load.num_requests)
    ]
    headers = http.auth_headers(api_key)
    async with httpx2.AsyncClient(headers=headers, timeout=http.TIMEOUT, limits=UNLIMITED) as client:
        if load.rate is not None:
            return await _open_loop(client, root, bodies, rate=load.rate, source=source)
        assert load.concurrency is not None
        return await _closed_loop(client, root, bodies, concurrency=load.concurrency)


Body = dict[str, object]


async def _open_loop(
    client: httpx2.AsyncClient, root: str, bodies: Sequence[Body], *, rate: float, source: random.Random
) -> list[Answer]:
    start_s = time.perf_counter()
    due_s = 0.0
    tasks = []
    for body in bodies:
        due_s += source.expovariate(rate)
        await asyncio.sleep(max(0.0, start_s + due_s - time.perf_counter()))
        tasks.append(asyncio.create_task(_send(client, root, body)))
    return await asyncio.gather(*tasks)


async def _closed_loop(
    client: httpx2.AsyncClient, root: str, bodies: Sequence[Body], *, concurrency: int
) -> list[Answer]:
    waiting = iter(bodies)
    answers: list[Answer] = []

    async def one_client() -> None:
        for body in waiting:
            answers.append(await _send(client, root, body))

    await asyncio.gather(*(one_client() for _ in range(concurrency)))
    return answers


async def _send(client: httpx2.AsyncClient, root: str, body: Body) -> Answer:
    """Send one request and time its chunks. A failure is part of the result, not an exception."""
    answer = Answer(start_s=time.perf_counter())
    try:
        async with client.stream("POST", f"{root}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                raise http.refused(response)
            async for line in response.aiter_lines():
                event = http.event_data(line)
                if event is not None:
                    _note_event(answer, event)
    except (LfmError, httpx2.HTTPError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.end_s = time.perf_counter()
    return answer


def _note_event(answer: Answer, event: dict[str, object]) -> None:
    usage, choices = event.get("usage"), event.get("choices")
    if isinstance(usage, dict):
        answer.num_prompt_tokens = int(usage["prompt_tokens"])
        answer.num_output_tokens = int(usage["completion_tokens"])
    if isinstance(choices, list) and choices and choices[0].get("delta", {}).get("content"):
        answer.chunk_s.append(time.perf_counter())


def summarize(answers: Sequence[Answer], load: Load, *, model: str, url: str) -> Report:
    """Describe finished requests."""
    good = [answer for answer in answers if answer.error is None]
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    duration_s = max(answer.end_s for answer in answers) - min(answer.start_s for answer in answers)
    num_prompt, num_output = (
        sum(getattr(a, name) for a in good) for name in ("num_prompt_tokens", "num_output_tokens")
    )
    gaps = [later - earlier for a in good for earlier, later in zip(a.chunk_s, a.chunk_s[1:], strict=False)]
    return Report(
        model=model,
        url=url,
        loop="open" if load.rate is not None else "closed",
        concurrency=load.concurrency,
        rate=load.rate,
        requests=len(answers),
        failed=len(answers) - len(good),
        errors=dict(errors.most_common()),
        input_tokens=round(num_prompt / max(1, len(good)), 1),
        output_tokens=round(num_output / max(1, len(good)), 1),
        duration_s=round(duration_s, 3),
        requests_per_s=round(len(good) / duration_s, 3),
        output_tokens_per_s=round(num_output / duration_s, 1),
        total_tokens_per_s=round((num_prompt + num_output) / duration_s, 1),
        first_token_ms=Percentiles.of([a.chunk_s[0] - a.start_s for a in good if a.chunk_s]),
        inter_token_ms=Percentiles.of(gaps),
        latency_ms=Percentiles.of([a.end_s - a.start_s for a in good]),
    )


def write_report(report: Report, path: Path | None) -> None:
    """Write the report as one JSON line. Raises MachineError."""
    if path is None:
        return
    try:
        path.write_text(json.dumps(asdict(report)) + "\n", encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{path} cannot be written ({error.strerror}). Choose another --output.") from error


def print_report(report: Report) -> None:
    """A table for people, then one JSON line for programs."""
    load = f"{report.rate:g} requests/s" if report.rate is not None else f"{report.concurrency} at once"
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{report.requests - report.failed} of {report.requests} requests answered, {report.loop} loop, {load}: "
        f"{report.input_tokens:,.0f} tokens in, {report.output_tokens:,.0f} out each, {report.duration_s:.2f} s"
    )
    console.print(
        f"{report.requests_per_s:,.2f} requests/s, {report.output_tokens_per_s:,.0f} output tok/s, "
        f"{report.total_tokens_per_s:,.0f} total tok/s"
    )
    for error, count in report.errors.items():
        console.print(f"{count} x {error}", markup=False)
    table = Table(box=SIMPLE)
    for heading in ("ms", "mean", "p50", "p95", "p99"):
        table.add_column(heading, justify="left" if heading == "ms" else "right")
    rows = (
        ("time to first token", report.first_token_ms),
        ("inter-token latency", report.inter_token_ms),
        ("latency", report.latency_ms),
    )
    for name, times in rows:
        values = (times.mean, times.p50, times.p95, times.p99) if times is not None else ()
        table.add_row(name, *(f"{value:,.1f}" for value in values))
    console.print(table)
    print(json.dumps(asdict(report)), flush=True)
