"""A server of one's own for `bench serve` and `chat --tools`: `lfm serve` in a process beside this, on a free port."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import IO

from lfm.cli.terminal import note
from lfm.errors import InternalError, LfmError, MachineError, UsageError
from lfm.model.progress import ignore_progress

STOP_S = 30.0
KEPT_LINES = 100
_ERRORS: dict[int, type[LfmError]] = {2: UsageError, 3: MachineError}


@contextlib.contextmanager
def own_server(
    model: str,
    flags: Mapping[str, object],
    *,
    api_key: str | None = None,
    on_line: Callable[[str], None] = ignore_progress,
    on_later_line: Callable[[str], None] = ignore_progress,
) -> Iterator[str]:
    """Start `lfm serve MODEL` with `flags`, yield its address when it is ready, and stop it in the end.

    A flag of value True stands alone; None and False leave it out. `on_line` gets what the server tells of its start,
    `on_later_line` its log from then on.
    Ctrl-C at the terminal does not reach the server. Raises the LfmError that ended it, if it could not start. Call it
    in the main thread, which has the signals.
    """
    words: list[str] = []
    for name, value in flags.items():
        if value is not None and value is not False:
            words += [name] if value is True else [name, str(value)]
    command = [sys.executable, "-m", "lfm.cli", "serve", model, "--host", "127.0.0.1", "--port", "0", *words]
    environment = {**os.environ, **({} if api_key is None else {"LFM_API_KEY": api_key})}
    note(f"starting lfm serve {model}")
    with _endings_raise(), _started(command, environment) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        logs = [_Log(server.stderr, on_line)]
        try:
            address = server.stdout.readline().rpartition(" at ")[2].strip()
            if not address.startswith("http"):  # it has ended instead
                raise _cause(server.wait(), logs[0])
            logs[0].turn_to(on_later_line)
            logs.append(_Log(server.stdout, ignore_progress))
            yield address
        finally:
            _stop(server)
            for log in logs:
                log.join()


def _started(command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        process_group=0,
    )


@contextlib.contextmanager
def _endings_raise() -> Iterator[None]:
    """Leave by an exception on the signals that would end this process at once, and leave the server behind."""
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


class _Log:
    """Reads what the server writes, so that it never waits for us; the last lines are kept."""

    def __init__(self, stream: IO[str], on_line: Callable[[str], None]) -> None:
        self._stream = stream
        self._on_line = on_line
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._stream:
            self._lines.append(line.rstrip("\n"))
            self._on_line(self._lines[-1])

    def turn_to(self, on_line: Callable[[str], None]) -> None:
        """The server is ready: its further lines, mostly one for each request, go elsewhere."""
        self._on_line = on_line

    def lines(self) -> list[str]:
        """The last lines of a server that has ended."""
        self.join()
        return list(self._lines)

    def join(self) -> None:
        """Wait for the end of the stream, which comes with the end of the server."""
        self._thread.join(STOP_S)


def _cause(code: int, log: _Log) -> LfmError:
    lines = [line for line in log.lines() if line.startswith("error: ")]
    cause = lines[-1].removeprefix("error: ") if lines else f"lfm serve exited with code {code}."
    return _ERRORS.get(code, InternalError)(cause)


def _stop(server: "subprocess.Popen[str]") -> None:
    server.terminate()
    try:
        server.wait(STOP_S)
    except subprocess.TimeoutExpired:  # it had its time to drain
        server.kill()
        server.wait()
