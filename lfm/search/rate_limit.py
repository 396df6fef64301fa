"""How often something may be done: so many times a second on average, with a small reserve for bursts."""

import time
from collections.abc import Callable


class RateLimit:
    """A bucket of `burst` tokens that is refilled at `per_s` tokens a second. Not for several threads."""

    def __init__(self, per_s: float, *, burst: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._tokens, self._updated_s = float(burst), clock()

    def wait_s(self) -> float:
        """Seconds until a token is there, were one reserved now."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._updated_s) * self._per_s)
        self._updated_s = now
        return max(0.0, (1 - self._tokens) / self._per_s)

    def reserve(self) -> float:
        """Take a token, now or from the future, and return the seconds until it may be used."""
        wait_s = self.wait_s()
        self._tokens -= 1
        return wait_s
