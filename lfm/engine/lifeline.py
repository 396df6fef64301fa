"""How two processes know of each other: the child dies with its parent, and promises it when its next step will end.

The promise is one float64 in a file that both map: the monotonic time by which the child will have made progress. It
needs no message, so a full socket or a busy event loop cannot make it lie, and a stopped process cannot renew it.
"""

import ctypes
import mmap
import os
import signal
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

PROMISE_BYTES = 8
PR_SET_PDEATHSIG = 1


def follow_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux only; elsewhere nothing happens).

    Raises SystemExit if the parent is gone already.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        raise SystemExit(1)


class Heartbeat:
    """The promise in shared memory. The child renews it, the supervisor reads it. Close it, or use `with`."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), PROMISE_BYTES)
        self._cell = memoryview(self._map).cast("d")

    @classmethod
    def create(cls, path: Path, *, first_within_s: float) -> "Heartbeat":
        """Make the file, with a first promise `first_within_s` from now."""
        path.write_bytes(bytes(PROMISE_BYTES))
        heartbeat = cls(path)
        heartbeat.promise(first_within_s)
        return heartbeat

    def promise(self, within_s: float) -> None:
        """There will be progress again within `within_s` seconds."""
        self._cell[0] = time.monotonic() + within_s

    @property
    def promised_at(self) -> float:
        """The monotonic time of the promise."""
        return self._cell[0]

    @property
    def is_broken(self) -> bool:
        return time.monotonic() > self.promised_at

    def close(self) -> None:
        self._cell.release()
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
