"""A process in which every new grammar is tried first, so that one that crashes or loops costs its own request only.

The front end calls `GrammarTrial.check` (from any thread) before it sends a request with a grammar to an engine. The
worker compiles the grammar, walks some tokens into it and answers; it has 5 seconds and 1 GiB. It dies with a bad
grammar, and the next check starts another. Both sides speak length-prefixed msgpack over stdin and stdout.

    python -m lfm.engine.grammar_worker     is that process
"""

import os
import random
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from hashlib import blake2b
from typing import IO

import msgspec
from llguidance import LLMatcher, LLTokenizer

from lfm.engine.grammar_library import DEAD_END, TokenTable, compile_grammar, readable_error
from lfm.errors import InternalError, RequestError
from lfm.protocol import GrammarSpec

CHECK_S = 5.0
START_S = 60.0
MEMORY_BYTES = 1024**3
MAX_FRAME_BYTES = 64 * 1024**2
MAX_REMEMBERED = 4096
REFUSED_S = 60.0  # so long a grammar that killed the worker is refused without another try: many agents may send it
NUM_WALKS = 3
WALK_TOKENS = 24
STACK_BYTES = 4 * 1024**2  # an eighth of what the engine's grammar threads have: what fits here fits there


class Vocabulary(msgspec.Struct, frozen=True):
    """The first frame: what a TokenTable is made of. Text is written as bytes, one token each, where those exist."""

    tokens: list[bytes]
    special_ids: list[int]
    stop_ids: list[int]


class Verdict(msgspec.Struct, frozen=True):
    """The answer to a grammar. `error` None: it compiles and can be walked."""

    error: str | None = None


class GrammarTrial:
    """Tries grammars in a worker process, one at a time. Starts it when it is first needed. Any thread may use it."""

    def __init__(self, table: TokenTable, *, timeout_s: float = CHECK_S) -> None:
        self._vocabulary = msgspec.msgpack.encode(Vocabulary(table.tokens, table.special_token_ids, table.stop_ids))
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._passed: OrderedDict[bytes, None] = OrderedDict()
        self._passed_lock = threading.Lock()
        self._killed: dict[bytes, tuple[float, Verdict]] = {}  # what killed the worker lately, until when it is refused

    def has_passed(self, spec: GrammarSpec) -> bool:
        """Whether `check` has nothing left to try. Never waits for the trial of another grammar."""
        return self._remembers(_digest(spec))

    def check(self, spec: GrammarSpec, *, param: str = "response_format") -> None:
        """Return if the grammar can be used. Raises RequestError naming `param` if it cannot."""
        key = _digest(spec)
        if self._remembers(key):
            return
        with self._lock:
            if self._remembers(key):  # somebody else's request had it tried meanwhile
                return
            verdict = self._known_killer(key) or self._try(spec.text)
            if verdict.error is None:
                self._remember(key)
            elif self._process is None:
                self._killed.setdefault(key, (time.monotonic() + REFUSED_S, verdict))
        if verdict.error is not None:
            raise RequestError(
                f"{param} makes a grammar that cannot be used: {verdict.error}. Make it simpler.",
                param=param,
                code="invalid_grammar",
            )

    def close(self) -> None:
        """End the worker process."""
        with self._lock:
            self._kill()

    def _remembers(self, key: bytes) -> bool:
        with self._passed_lock:
            if key not in self._passed:
                return False
            self._passed.move_to_end(key)
            return True

    def _known_killer(self, key: bytes) -> Verdict | None:
        now = time.monotonic()
        self._killed = {one: entry for one, entry in self._killed.items() if entry[0] > now}
        return self._killed[key][1] if key in self._killed else None

    def _remember(self, key: bytes) -> None:
        with self._passed_lock:
            self._passed[key] = None
            if len(self._passed) > MAX_REMEMBERED:
                self._passed.popitem(last=False)

    def _try(self, text: str) -> Verdict:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _write_frame(process.stdin, text.encode("utf-8"))
            answer = _read_frame_within(process.stdout, self._timeout_s)
        except TimeoutError:
            self._kill()
            return Verdict(f"it takes more than {self._timeout_s:g} s")
        except (EOFError, OSError):
            self._kill()
            return Verdict("the grammar library failed on it")
        return msgspec.msgpack.decode(answer, type=Verdict)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._kill()
        paths = os.pathsep.join(map(os.path.abspath, sys.path))
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "lfm.engine.grammar_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _write_frame(process.stdin, self._vocabulary)
            _read_frame_within(process.stdout, START_S)
        except (TimeoutError, EOFError, OSError) as error:
            self._kill()
            raise InternalError(f"The process that tries grammars did not start ({error!r}).") from error
        return process

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _digest(spec: GrammarSpec) -> bytes:
    return blake2b(spec.text.encode("utf-8"), digest_size=16).digest()


def _write_frame(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(len(data).to_bytes(4, "little") + data)
    pipe.flush()


def _read_frame_within(pipe: IO[bytes], timeout_s: float) -> bytes:
    """One frame from a pipe that nothing else reads. Raises TimeoutError, or EOFError if the other side is gone."""
    deadline = time.monotonic() + timeout_s
    size = int.from_bytes(_read_within(pipe, 4, deadline), "little")
    return _read_within(pipe, min(size, MAX_FRAME_BYTES), deadline)


def _read_within(pipe: IO[bytes], num_bytes: int, deadline: float) -> bytes:
    data = b""
    while len(data) < num_bytes:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        piece = os.read(pipe.fileno(), num_bytes - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


# -- the worker's side -------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer grammars until stdin ends, or until one of them ends this process."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    vocabulary = msgspec.msgpack.decode(_read_frame(requests), type=Vocabulary)
    tokenizer = _table(vocabulary).compiled()
    _limit_resources()
    _write_frame(answers, b"")
    while True:
        try:
            text = _read_frame(requests).decode("utf-8")
        except EOFError:
            return
        # The parent kills a process that takes too long; if the parent is gone too, this ends it.
        signal.setitimer(signal.ITIMER_REAL, 2 * CHECK_S)
        verdict = Verdict(try_grammar(tokenizer, text, stop_ids=frozenset(vocabulary.stop_ids)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write_frame(answers, msgspec.msgpack.encode(verdict))


def try_grammar(tokenizer: LLTokenizer, text: str, *, stop_ids: frozenset[int]) -> str | None:
    """Compile a grammar and walk into it at random, some tokens far, a few times. Returns what went wrong, or None."""
    compiled = compile_grammar(tokenizer, text)
    error = readable_error(compiled)
    for walk in range(NUM_WALKS):
        if error is None:
            error = _walk(compiled.deep_copy(), random.Random(walk), stop_ids)
    return error


def _walk(matcher: LLMatcher, choice: random.Random, stop_ids: frozenset[int]) -> str | None:
    for _ in range(WALK_TOKENS):
        mask = matcher.compute_bitmask()
        if (error := readable_error(matcher)) is not None:
            return error
        token_id = _some_token(mask, choice, stop_ids)
        if token_id is None:
            return None if matcher.is_accepting() else DEAD_END
        matcher.consume_token(token_id)
        if (error := readable_error(matcher)) is not None:
            return error
    return None


def _some_token(mask: bytes, choice: random.Random, stop_ids: frozenset[int]) -> int | None:
    """An allowed token that does not end the answer; None if there is none."""
    start = choice.randrange(len(mask))
    for offset in range(len(mask)):
        index = (start + offset) % len(mask)
        if mask[index]:
            allowed = [index * 8 + bit for bit in range(8) if mask[index] >> bit & 1]
            allowed = [token_id for token_id in allowed if token_id not in stop_ids]
            if allowed:
                return choice.choice(allowed)
    return None


def _table(vocabulary: Vocabulary) -> TokenTable:
    ids = {token: token_id for token_id, token in enumerate(vocabulary.tokens) if len(token) == 1}

    def encode(text: str) -> list[int]:
        return [ids[bytes((byte,))] for byte in text.encode("utf-8")]

    return TokenTable(
        vocabulary.tokens, special_ids=vocabulary.special_ids, stop_ids=vocabulary.stop_ids, encode=encode
    )


def _limit_resources() -> None:
    """From here on: 1 GiB more than the vocabulary takes, little stack, no core file."""
    with open("/proc/self/statm", encoding="ascii") as file:
        num_bytes = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read_frame(pipe: IO[bytes]) -> bytes:
    header = pipe.read(4)
    size = int.from_bytes(header, "little")
    data = pipe.read(size) if len(header) == 4 and size <= MAX_FRAME_BYTES else b""
    if len(header) < 4 or len(data) < size:
        raise EOFError
    return data


if __name__ == "__main__":
    main()
