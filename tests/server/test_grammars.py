"""Whose new grammar is tried next, when several clients wait for the one process that tries them."""

import asyncio
import threading

import pytest

from lfm.errors import RequestError
from lfm.protocol import GrammarSpec
from lfm.server.grammars import Grammars
from tests.server.fakes import TOKENIZER, FakeBackend, until


class GatedTrial:
    """Lets one grammar through for each `gate.release()`, and remembers in which order they came."""

    def __init__(self) -> None:
        self.tried: list[str] = []
        self.gate = threading.Semaphore(0)

    def has_passed(self, spec: GrammarSpec) -> bool:
        return False

    def check(self, spec: GrammarSpec, *, param: str) -> None:
        self.tried.append(spec.text)
        assert self.gate.acquire(timeout=30)
        if "bad" in spec.text:
            raise RequestError("it takes more than 5 s", param=param)

    def close(self) -> None:
        pass


@pytest.fixture
def trial() -> GatedTrial:
    return GatedTrial()


@pytest.fixture
def grammars(trial: GatedTrial) -> Grammars:
    return Grammars(FakeBackend(), TOKENIZER, trial=trial)


async def wait_in_line(grammars: Grammars, name: str) -> asyncio.Task[None]:
    task = asyncio.create_task(grammars.check(GrammarSpec(text=name), param="tools", tenant=name[0]))
    await asyncio.sleep(0)  # until it waits
    return task


def test_tenants_take_turns(grammars: Grammars, trial: GatedTrial) -> None:
    """Who sends many slow grammars waits for them; everybody else waits for one of them at most."""

    async def scenario() -> None:
        tasks = [await wait_in_line(grammars, name) for name in ("a-bad-1", "a-bad-2", "a-bad-3", "b1", "c1", "c2")]
        await until(lambda: len(trial.tried) == 1)
        trial.gate.release(len(tasks))
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(one, RequestError) for one in found] == [True] * 3 + [False] * 3

    asyncio.run(scenario())
    grammars.close()
    assert trial.tried == ["a-bad-1", "b1", "c1", "a-bad-2", "c2", "a-bad-3"]


@pytest.mark.parametrize("leaving", [0, 1, 2], ids=["the one that is tried", "the next one", "a later one"])
def test_who_leaves_the_line_holds_up_nobody(grammars: Grammars, trial: GatedTrial, leaving: int) -> None:
    names = ["a1", "a2", "b1", "b2"]

    async def scenario() -> None:
        tasks = [await wait_in_line(grammars, name) for name in names]
        await until(lambda: len(trial.tried) == 1)
        tasks[leaving].cancel()
        await asyncio.sleep(0)
        trial.gate.release(len(names) + 1)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(one, asyncio.CancelledError) for one in found] == [i == leaving for i in range(4)]
        await asyncio.wait_for(grammars.check(GrammarSpec(text="later"), param="tools", tenant="z"), 30)

    asyncio.run(scenario())
    grammars.close()
    assert set(trial.tried) >= {name for index, name in enumerate(names) if index != leaving}
    assert trial.tried[-1] == "later"
