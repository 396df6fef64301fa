"""How fast the engine has been lately, for metrics and for an honest Retry-After. No torch here."""

import time

from lfm.engine.scheduler import Scheduler
from lfm.engine.step import ScheduledBatch

WINDOW_S = 10.0  # rates are averages over about this long
UNKNOWN_WAIT_S = 1.0  # nothing was measured yet
MAX_WAIT_S = 600.0


class Rates:
    """Decaying averages of prefill and decode tokens per second, over time in which steps were read."""

    def __init__(self) -> None:
        self.num_step_tokens = 0  # of the last step
        self._prefill_tokens = 0.0
        self._decode_tokens = 0.0
        self._seconds = 0.0
        self._read_s: float | None = None

    @property
    def prefill_tokens_per_s(self) -> float:
        return self._prefill_tokens / self._seconds if self._seconds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return self._decode_tokens / self._seconds if self._seconds else 0.0

    def record(self, batch: ScheduledBatch) -> None:
        """Count a step that was just read. A pause of more than a window is idle time and starts anew."""
        now = time.perf_counter()
        elapsed = now - self._read_s if self._read_s is not None else 0.0
        self._read_s = now
        num_decoded, self.num_step_tokens = batch.num_sampled, batch.num_tokens
        if not 0 < elapsed < WINDOW_S:
            return
        keep = max(0.0, 1 - elapsed / WINDOW_S)
        self._seconds = self._seconds * keep + elapsed
        self._decode_tokens = self._decode_tokens * keep + num_decoded
        self._prefill_tokens = self._prefill_tokens * keep + self.num_step_tokens - num_decoded

    def wait_s(self, scheduler: Scheduler) -> float:
        """How long a request that came now would wait for its turn: the queue's tokens at the recent pace."""
        pace = self.prefill_tokens_per_s + self.decode_tokens_per_s
        if not pace:
            return UNKNOWN_WAIT_S
        return min(MAX_WAIT_S, max(UNKNOWN_WAIT_S, scheduler.num_waiting_tokens / pace))
