"""A time limit for waits that come one after the other by the thousand, as those of an event stream do.

`asyncio.timeout` sets and cancels a timer for every wait: 6 to 12 us, half of what an event of a stream costs. Here one
timer looks now and then whether the wait that is under way takes too long.
"""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Patience:
    """Waits for one awaitable at a time, for `seconds` at most each; None: for ever."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._since: float | None = None  # when the wait under way began
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._has_expired = False

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """Raises TimeoutError if it took too long, and has cancelled it then, as `asyncio.timeout` would."""
        if self._seconds is None:
            return await awaitable
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        num_cancels = task.cancelling()
        self._task, self._since, self._has_expired = task, loop.time(), False
        if self._timer is None:
            self._timer = loop.call_at(self._since + self._seconds, self._look)
        try:
            return await awaitable
        except asyncio.CancelledError:
            if self._has_expired and task.uncancel() <= num_cancels:
                raise TimeoutError from None
            raise
        finally:
            self._since = self._task = None

    def _look(self) -> None:
        """The timer: end the wait, or come back when it has lasted long enough; no wait, no timer."""
        self._timer = None
        if self._since is None or self._task is None or self._seconds is None:
            return
        loop, due_s = self._task.get_loop(), self._since + self._seconds
        if loop.time() < due_s:
            self._timer = loop.call_at(due_s, self._look)
        else:
            self._has_expired = True
            self._task.cancel()
