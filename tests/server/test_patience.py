"""The time limit of an event stream's waits: as `asyncio.timeout` in all that a caller can see."""

import asyncio

import pytest

from lfm.server.patience import Patience

SOON, LATE = 0.02, 20.0


def test_what_comes_in_time_is_returned_wait_after_wait() -> None:
    async def run() -> list[int]:
        patience, loop = Patience(LATE), asyncio.get_running_loop()
        results = []
        for value in range(50):
            future: asyncio.Future[int] = loop.create_future()
            loop.call_soon(future.set_result, value)
            results.append(await patience.wait(future))
        return results

    assert asyncio.run(run()) == list(range(50))


@pytest.mark.parametrize("num_before", [0, 1, 3])
def test_a_wait_that_takes_too_long_is_cancelled_and_the_next_one_can_succeed(num_before: int) -> None:
    async def run() -> None:
        patience = Patience(SOON)
        for _ in range(num_before):
            await patience.wait(asyncio.sleep(0))
        forever = asyncio.get_running_loop().create_future()
        with pytest.raises(TimeoutError):
            await patience.wait(forever)
        assert forever.cancelled()
        assert await patience.wait(asyncio.sleep(0, "again")) == "again"
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    asyncio.run(run())


def test_the_timer_of_an_earlier_wait_leaves_a_later_one_alone() -> None:
    async def run() -> None:
        patience = Patience(LATE)
        await patience.wait(asyncio.sleep(0))
        later = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(patience.wait(later))
        await asyncio.sleep(0)
        patience._look()  # as the timer that the first wait set does
        later.set_result("in time")
        assert await task == "in time"
        patience._look()
        assert patience._timer is None, "no wait, no timer"

    asyncio.run(run())


def test_a_cancel_from_outside_stays_one() -> None:
    async def run() -> None:
        patience = Patience(LATE)
        task = asyncio.ensure_future(patience.wait(asyncio.get_running_loop().create_future()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_without_a_limit_nothing_is_timed() -> None:
    assert asyncio.run(Patience(None).wait(asyncio.sleep(0, 3))) == 3


def test_an_error_of_what_is_waited_for_passes_through() -> None:
    async def fail() -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        asyncio.run(Patience(LATE).wait(fail()))
