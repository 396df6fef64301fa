"""A line of text that says how far a long transfer is: bytes, a bar, seconds and bytes per second."""

import time
from collections.abc import Callable

from lfm.model.sizes import format_bytes

_BAR_WIDTH = 20
_INTERVAL_S = 0.25  # between two lines; a terminal or a log needs no more


def ignore_progress(line: str) -> None:
    """The callback of a caller that does not want to know."""


class Progress:
    """Counts bytes and hands a line to `on_progress` now and then, and once at the end.

    `done_bytes` at the start (a resumed transfer) is shown but does not count towards the speed.
    """

    def __init__(
        self,
        label: str,
        total_bytes: int,
        *,
        on_progress: Callable[[str], None],
        done_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._total_bytes, self._on_progress, self._clock = label, total_bytes, on_progress, clock
        self._start_bytes = self._done_bytes = done_bytes
        self._start_s = self._shown_s = clock()

    @property
    def seconds(self) -> float:
        return self._clock() - self._start_s

    def advance(self, num_bytes: int) -> None:
        """Count `num_bytes` more; negative when a transfer has to start over."""
        self._done_bytes += num_bytes
        now = self._clock()
        if now - self._shown_s >= _INTERVAL_S:
            self._shown_s = now
            self._on_progress(self._line())

    def note(self, text: str) -> None:
        """Say what is going on while no bytes are moved."""
        self._on_progress(f"{self._label}: {text}")

    def finish(self) -> None:
        """Show the last line, whenever the one before was shown."""
        self._on_progress(self._line())

    def _line(self) -> str:
        seconds = self.seconds
        share = min(1.0, self._done_bytes / self._total_bytes) if self._total_bytes else 1.0
        bar = "#" * int(share * _BAR_WIDTH)
        done, total = format_bytes(self._done_bytes), format_bytes(self._total_bytes)
        per_second = format_bytes(max(0, self._done_bytes - self._start_bytes) / max(seconds, 1e-9))
        return f"{self._label} [{bar:.<{_BAR_WIDTH}}] {done} of {total}, {seconds:.1f} s, {per_second}/s"
