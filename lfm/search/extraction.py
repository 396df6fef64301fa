"""Takes text from HTML and PDF in a process of its own, which is killed when it takes too long or too much.

The process is kept for the next document, because starting one costs more than most documents do. One that crashed,
hung or lied about a length is replaced. Safe to use from several threads: they take turns.
"""

import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import Self

import msgspec

from lfm.search.errors import ExtractionError
from lfm.search.extracted import Extracted
from lfm.search.extraction_wire import (
    LENGTH,
    MAX_DOCUMENT_BYTES,
    MAX_MESSAGE_BYTES,
    Done,
    Failed,
    Job,
    Kind,
    decode_answer,
    frame,
)

_READ_BYTES = 1 << 20
_MAX_JOBS_PER_PROCESS = 500  # parsers leak
_EXIT_S = 0.2


class Extractor:
    """One parsing process, started when it is needed. Close it, or use `with`."""

    def __init__(self, *, timeout_s: float = 20.0, memory_bytes: int = 1 << 30, command: tuple[str, ...] = ()) -> None:
        """`timeout_s` and `memory_bytes` bound one document. `command` replaces the process, for tests."""
        self._timeout_s = timeout_s
        self._command = command or (sys.executable, "-m", "lfm.search.extraction_worker", str(memory_bytes))
        self._process: subprocess.Popen[bytes] | None = None
        self._num_jobs = 0
        self._lock = threading.Lock()

    def extract(self, data: bytes, kind: Kind) -> Extracted:
        """The text of one document. Raises ExtractionError with the cause; the next document is not affected."""
        if len(data) > MAX_DOCUMENT_BYTES:
            raise ExtractionError(f"The document has {len(data):,} bytes. Allowed: {MAX_DOCUMENT_BYTES:,}.")
        with self._lock:
            answer = self._ask(frame(Job(kind, data, cpu_s=max(1, round(self._timeout_s)))))
        if isinstance(answer, Failed):
            raise ExtractionError(f"The document {answer.cause}")
        return answer.extracted

    def close(self) -> None:
        """End the process. Idempotent; a later `extract` starts another."""
        with self._lock:
            self._discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, message: bytes) -> Done | Failed:
        process = self._running()
        is_in_step = False  # an answer that nobody reads would be taken for that of the next document
        try:
            answer: Done | Failed = decode_answer(
                _exchange(process, message, deadline_s=time.monotonic() + self._timeout_s)
            )
            is_in_step = True
            return answer
        except TimeoutError:
            raise ExtractionError(f"The document took longer than {self._timeout_s:g} s to read.") from None
        except (OSError, EOFError) as error:
            raise ExtractionError(f"The document {_cause_of_death(process)}") from error
        except msgspec.MsgspecError as error:
            raise ExtractionError("The document made its parser answer nonsense.") from error
        finally:
            if not is_in_step:
                self._discard()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._num_jobs >= _MAX_JOBS_PER_PROCESS or (self._process is not None and self._process.poll() is not None):
            self._discard()
        if self._process is None:
            # The child imports what its parent imports, and gets nothing else of its environment, so no keys.
            paths = os.pathsep.join(map(os.path.abspath, sys.path))
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"},
            )
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
            self._num_jobs = 0
        self._num_jobs += 1
        return self._process

    def _discard(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process = None


def _exchange(process: "subprocess.Popen[bytes]", message: bytes, *, deadline_s: float) -> bytes:
    """Send `message` and return the body of the answer.

    Raises TimeoutError at the deadline (monotonic), OSError or EOFError when the process is gone.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    unsent, received, wanted = memoryview(message), bytearray(), LENGTH.size
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        while len(received) < wanted:
            remaining_s = deadline_s - time.monotonic()
            ready = selector.select(remaining_s) if remaining_s > 0 else []
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    unsent = unsent[os.write(key.fd, unsent) :]
                    if not unsent:
                        selector.unregister(process.stdin)
                    continue
                data = os.read(key.fd, _READ_BYTES)
                if not data:
                    raise EOFError
                received += data
                if wanted == LENGTH.size and len(received) >= LENGTH.size:
                    wanted += _believable(LENGTH.unpack_from(received)[0])
    return bytes(received[LENGTH.size :])


def _believable(length: int) -> int:
    if length > MAX_MESSAGE_BYTES:
        raise msgspec.ValidationError(f"an answer of {length} bytes")
    return length


def _cause_of_death(process: "subprocess.Popen[bytes]") -> str:
    """Why the process ended, as the end of the sentence "The document ..."."""
    try:
        code = process.wait(_EXIT_S)
    except subprocess.TimeoutExpired:
        return "made its parser close its pipes."
    if code == -signal.SIGXCPU:
        return "took too much processor time to read."
    if code < 0:
        return f"crashed its parser ({signal.Signals(-code).name})."
    return f"ended its parser (exit code {code})."
