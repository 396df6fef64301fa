"""The clients of `bench serve`: scripts of requests, sent and timed in this process or in several of their own.

A process that times some ten thousand events a second must spend little on each: HTTP/1.1 is read here by hand, and
what is not needed of an event is not decoded. Times are of the monotonic clock, which all processes share.
"""

import asyncio
import random
import string
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from urllib.parse import urlsplit

import msgspec
import uvloop

from lfm.errors import InternalError

REQUEST_S = 600.0
LINE_BYTES = 2**20
START_S = 2.0
WORD_LETTERS = 4


class Turn(msgspec.Struct, kw_only=True):
    """One request: a prompt of random words, or in a conversation what is said next, as `role`."""

    num_words: int
    max_tokens: int
    seed: str
    role: str = "user"


class Script(msgspec.Struct, kw_only=True):
    """What one client does: its turns, one after the other, from `start_s` after the begin on.

    In a conversation each turn's message comes behind what was said before. `kind` tells answers apart in the report.
    """

    turns: list[Turn]
    start_s: float = 0.0
    kind: str = "measured"
    is_conversation: bool = False


class Job(msgspec.Struct, kw_only=True):
    """The scripts of one process. `begin_s`: when all processes begin, by the monotonic clock."""

    url: str
    model: str
    api_key: str | None
    begin_s: float
    scripts: list[Script]


class Answer(msgspec.Struct, kw_only=True):
    """One request's times and token counts. `chunk_s` are the times of its chunks with text.

    `chunk_tokens`: output tokens up to each chunk, where the server tells.
    """

    start_s: float
    chunk_s: list[float] = []
    chunk_tokens: list[int] = []
    end_s: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    kind: str = "measured"
    turn: int = 0
    previous_prompt_tokens: int = 0  # of the turn before, in a conversation
    error: str | None = None


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Cached | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, object] | None = None


Message = dict[str, object]
_decode_event = msgspec.json.Decoder(_Event).decode
_decode_answers = msgspec.json.Decoder(list[Answer]).decode


class RequestFailed(Exception):
    """Why a request has no whole answer; part of the result."""


def words(seed: str, count: int) -> str:
    """Random words, so that no prompt is found in a cache."""
    letters = "".join(random.Random(seed).choices(string.ascii_lowercase, k=WORD_LETTERS * count))
    return " ".join(letters[begin : begin + WORD_LETTERS] for begin in range(0, len(letters), WORD_LETTERS))


def send_all(scripts: Sequence[Script], *, url: str, model: str, api_key: str | None, processes: int) -> list[Answer]:
    """Play all scripts at once and return every answer. `processes` 1: in this one.

    Raises InternalError if a process ends without its answers.
    """
    begin_s = time.monotonic() + (0.0 if processes == 1 else START_S)  # so that all are there
    jobs = [
        Job(url=url, model=model, api_key=api_key, begin_s=begin_s, scripts=list(scripts[index::processes]))
        for index in range(processes)
    ]
    if processes == 1:
        return _run(jobs[0])
    command = [sys.executable, "-m", "lfm.cli.load_client"]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in jobs]
    try:
        for worker, job in zip(workers, jobs, strict=True):
            assert worker.stdin is not None
            worker.stdin.write(msgspec.json.encode(job))
            worker.stdin.close()
        return [answer for worker in workers for answer in _answers_of(worker)]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _answers_of(worker: "subprocess.Popen[bytes]") -> list[Answer]:
    assert worker.stdout is not None
    with worker.stdout as output:
        text = output.read()
    if worker.wait() != 0:
        raise InternalError(f"A process of clients ended with code {worker.returncode}.")
    return _decode_answers(text)


def _run(job: Job) -> list[Answer]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_play_all(job))


async def _play_all(job: Job) -> list[Answer]:
    played = await asyncio.gather(*(_play(job, script) for script in job.scripts))
    return [answer for answers in played for answer in answers]


async def _play(job: Job, script: Script) -> list[Answer]:
    await asyncio.sleep(max(0.0, job.begin_s + script.start_s - time.monotonic()))
    answers: list[Answer] = []
    messages: list[Message] = []
    for index, turn in enumerate(script.turns):
        messages = messages if script.is_conversation else []
        said = words(turn.seed, turn.num_words)
        messages += _result(said, f"call-{index}") if turn.role == "tool" else [{"role": turn.role, "content": said}]
        answer, text = await _send(job, messages, turn.max_tokens)
        answer.kind, answer.turn = script.kind, index
        if script.is_conversation and answers:
            answer.previous_prompt_tokens = answers[-1].num_prompt_tokens
        answers.append(answer)
        if script.is_conversation:
            if answer.error is not None:
                break
            messages.append({"role": "assistant", "content": text})
    return answers


def _result(text: str, call_id: str) -> list[Message]:
    """A call that the model did not make, and its result: answers of random weights have no calls."""
    call = {"id": call_id, "type": "function", "function": {"name": "look", "arguments": "{}"}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": text},
    ]


async def _send(job: Job, messages: list[Message], max_tokens: int) -> tuple[Answer, str]:
    """Send one request and time its chunks; its text. A failure is part of the result, not an exception."""
    body = msgspec.json.encode(
        {
            "model": job.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "ignore_eos": True,  # our server's and vLLM's: answers of exact length
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    )
    answer, texts = Answer(start_s=time.monotonic()), list[str]()
    try:
        async with asyncio.timeout(REQUEST_S):
            async for data in _events(job, body):
                text = _note(answer, _decode_event(data))
                if text:
                    texts.append(text)
    except (RequestFailed, OSError, EOFError, ValueError, LookupError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.end_s = time.monotonic()
    return answer, "".join(texts)


def _note(answer: Answer, event: _Event) -> str | None:
    """Take in one event; its text."""
    if event.error is not None:
        raise RequestFailed(str(event.error.get("message")))
    usage = event.usage
    if usage is not None:
        answer.num_prompt_tokens, answer.num_output_tokens = usage.prompt_tokens, usage.completion_tokens
        details = usage.prompt_tokens_details
        answer.num_cached_tokens = (details.cached_tokens or 0) if details is not None else 0
    text = event.choices[0].delta.content if event.choices else None
    if text:
        answer.chunk_s.append(time.monotonic())
        if usage is not None:
            answer.chunk_tokens.append(usage.completion_tokens)
    return text


async def _events(job: Job, body: bytes) -> AsyncIterator[bytes]:
    """The JSON of each event of the answer to one POST. Raises RequestFailed for any status but 200."""
    url = urlsplit(job.url)
    port = url.port or (443 if url.scheme == "https" else 80)
    reader, writer = await asyncio.open_connection(
        url.hostname, port, ssl=True if url.scheme == "https" else None, limit=LINE_BYTES
    )
    try:
        key = f"Authorization: Bearer {job.api_key}\r\n" if job.api_key is not None else ""
        head = (
            f"POST {url.path}/v1/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
            f"{key}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = int((await reader.readline()).split()[1])
        is_chunked = False
        while (line := await reader.readline()) not in (b"\r\n", b""):
            is_chunked |= line.lower().replace(b" ", b"").startswith(b"transfer-encoding:chunked")
        if status != 200:
            raise RequestFailed(f"HTTP {status}: {(await reader.read(500)).decode(errors='replace')}")
        rest = b""
        async for data in _pieces(reader, is_chunked=is_chunked):
            *events, rest = (rest + data).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: ") and event != b"data: [DONE]":
                    yield event[6:]
    finally:
        writer.close()


async def _pieces(reader: asyncio.StreamReader, *, is_chunked: bool) -> AsyncIterator[bytes]:
    """The pieces of a body as they come. Raises IncompleteReadError if it is cut off."""
    while is_chunked:
        size = int(await reader.readline(), 16)
        data = await reader.readexactly(size + 2)
        if size == 0:
            return
        yield data[:-2]
    while data := await reader.read(LINE_BYTES):
        yield data


def main() -> None:
    """One process of clients: a Job as JSON on stdin, its answers as JSON on stdout."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    sys.stdout.buffer.write(msgspec.json.encode(_run(job)))


if __name__ == "__main__":
    main()
