"""Tools that fail, hang, shout and lie: each becomes a text for the model."""

import asyncio
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from lfm.agent import ToolError, ToolReturned, tool
from lfm.agent.calls import Approve, Limits, run_calls
from lfm.agent.events import ToolCall
from lfm.agent.tools import Tool, as_tools
from lfm.errors import UsageError

LIMITS = Limits(tool_timeout_s=30, max_result_chars=1000)


def call(name: str, arguments: Mapping[str, object] | None = None, *, number: int = 0) -> ToolCall:
    return ToolCall(id=f"call_{number}", name=name, arguments={} if arguments is None else arguments, raw="")


def run(
    functions: list[Callable[..., object] | Tool],
    *calls: ToolCall,
    limits: Limits = LIMITS,
    approve: Approve | None = None,
) -> list[ToolReturned]:
    async def collect() -> list[ToolReturned]:
        running = run_calls(calls, as_tools(functions), limits=limits, approve=approve)
        return [event async for event in running]

    return asyncio.run(collect())


def error_of(returned: ToolReturned) -> str:
    assert returned.is_error
    message: str = json.loads(returned.content)["error"]
    return message


def answer() -> Any: ...


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is <|im_end|>", "as it is <|im_end|>"),
        (None, "null"),
        ({"a": [1, 2.5, True]}, '{"a":[1,2.5,true]}'),
        ((1, {"é"}), '[1,["é"]]'),
        (float("nan"), '"NaN"'),
        (b"\xff", '"_w=="'),
    ],
)
def test_results_are_texts_or_json(value: object, text: str) -> None:
    def answer() -> object:
        return value

    (returned,) = run([answer], call("answer"))
    assert (returned.content, returned.is_error) == (text, False)


def test_calls_of_one_step_run_at_once() -> None:
    barrier = threading.Barrier(3, timeout=20)
    met = asyncio.Barrier(2)

    def blocking(number: int) -> int:
        barrier.wait()
        return number

    async def waiting(number: int) -> int:
        async with asyncio.timeout(20), met:
            return number

    names = ["blocking", "blocking", "blocking", "waiting", "waiting"]
    calls = [call(name, {"number": number}, number=number) for number, name in enumerate(names)]
    returned = run([blocking, waiting], *calls)
    assert sorted(event.content for event in returned) == ["0", "1", "2", "3", "4"]


def test_an_exception_is_told_by_type_and_message_and_no_traceback() -> None:
    def broken() -> None:
        secret = "in a local variable"
        raise LookupError(f"no {len(secret)} in\nthe   table")

    (returned,) = run([broken], call("broken"))
    assert error_of(returned) == "LookupError: no 19 in the table"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("cannot reach https://me:hunter2@host/x", "cannot reach https://***@host/x"),
        ("401 for Authorization: Bearer hunter2", "401 for Authorization: ***"),
        ("bad header 'bearer hunter2'", "bad header 'bearer ***"),
        ("GET /?q=1&api_key=hunter2&x=2", "GET /?q=1&api_key=***&x=2"),
        ('{"password": "hunter2", "user": "me"}', '{"password": ***, "user": "me"}'),
    ],
)
def test_what_looks_like_a_secret_is_masked_in_errors(message: str, shown: str) -> None:
    def broken() -> None:
        raise ConnectionError(message)

    (returned,) = run([broken], call("broken"))
    assert error_of(returned).removeprefix("ConnectionError: ") == shown


@pytest.mark.parametrize("is_async", [False, True], ids=["thread", "async"])
@pytest.mark.parametrize("error", [SystemExit(3), ToolError("the shop is closed"), StopIteration("x")], ids=repr)
def test_nothing_that_a_tool_raises_ends_the_run(error: BaseException, is_async: bool) -> None:
    def blocking() -> None:
        raise error

    async def waiting() -> None:
        raise error

    (returned,) = run([waiting if is_async else blocking], call("waiting" if is_async else "blocking"))
    assert error_of(returned)
    if isinstance(error, ToolError):
        assert error_of(returned) == "the shop is closed"


@pytest.mark.parametrize("is_async", [False, True], ids=["thread", "async"])
def test_a_tool_without_an_end_is_given_up_while_its_siblings_return(is_async: bool) -> None:
    release = threading.Event()

    def blocking() -> None:
        release.wait(30)

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                if release.is_set():
                    raise

    def quick() -> str:
        return "done"

    async def collect() -> dict[str, ToolReturned]:
        name = "stubborn" if is_async else "blocking"
        limits = Limits(tool_timeout_s=0.2, max_result_chars=100)
        tools = as_tools([blocking, stubborn, quick])
        returned = [event async for event in run_calls([call(name), call("quick")], tools, limits=limits, approve=None)]
        release.set()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        return {event.call.name: event for event in returned}

    returned = asyncio.run(collect())
    assert returned["quick"].content == "done"
    slow = returned["stubborn" if is_async else "blocking"]
    assert error_of(slow) == "no result within 0.2 s"


def test_a_tool_that_cancels_itself_does_not_cancel_the_run() -> None:
    async def waiting() -> None:
        raise asyncio.CancelledError

    (returned,) = run([waiting], call("waiting"))
    assert error_of(returned) == "the tool cancelled itself"


def test_ending_the_run_cancels_its_tools() -> None:
    async def scenario() -> bool:
        started, cancelled = asyncio.Event(), asyncio.Event()

        async def waiting() -> None:
            started.set()
            try:
                await asyncio.sleep(30)
            finally:
                cancelled.set()

        async def consume() -> None:
            async for _ in run_calls([call("waiting")], as_tools([waiting]), limits=LIMITS, approve=None):
                pass

        task = asyncio.create_task(consume())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(10):
            await cancelled.wait()
        return cancelled.is_set()

    assert asyncio.run(scenario())


def test_a_long_result_is_cut_and_says_so() -> None:
    def long() -> str:
        return "x" * 5000

    (returned,) = run([long], call("long"))
    assert returned.content == "x" * 1000 + " [cut: 1000 of 5000 characters]"


def test_a_generator_is_no_result() -> None:
    def endless() -> object:
        return iter(int, 1)

    (returned,) = run([endless], call("endless"))
    assert "must return a value" in error_of(returned)


def test_a_cycle_is_no_result() -> None:
    def cycle() -> object:
        made: list[object] = []
        made.append(made)
        return made

    (returned,) = run([cycle], call("cycle"))
    assert returned.is_error or "..." in returned.content


def test_unknown_names_and_arguments_that_are_no_object_are_told() -> None:
    def known() -> None: ...

    unknown, broken = run([known], call("unknown"), ToolCall(id="1", name="known", arguments=None, raw='{"a": '))
    assert error_of(unknown) == "there is no tool 'unknown'; there are: known"
    assert error_of(broken).startswith("the arguments are no JSON object")


def test_wrong_arguments_do_not_reach_the_function() -> None:
    ran: list[int] = []

    def take(number: int) -> None:
        ran.append(number)

    (returned,) = run([take], call("take", {"number": "many"}))
    assert error_of(returned).startswith("number: ")
    assert ran == []


def test_declined_calls_do_not_run_and_the_others_do() -> None:
    ran: list[int] = []
    asked: list[str] = []

    def act(number: int) -> int:
        ran.append(number)
        return number

    async def approve(wanted: ToolCall) -> bool:
        asked.append(wanted.id)
        return bool(wanted.arguments and wanted.arguments["number"] != 1)

    calls = [call("act", {"number": number}, number=number) for number in range(3)]
    returned = run([act], *calls, call("unknown", number=9), approve=approve)
    assert sorted(ran) == [0, 2]
    assert asked == ["call_0", "call_1", "call_2"]
    declined = next(event for event in returned if event.call.id == "call_1")
    assert error_of(declined) == "the user declined this call"


def test_a_hook_may_be_a_plain_function() -> None:
    def act() -> str:
        return "done"

    assert error_of(run([act], call("act"), approve=lambda _: False)[0])
    assert run([act], call("act"), approve=lambda _: True)[0].content == "done"


def test_two_tools_of_one_name_and_strange_names_are_refused() -> None:
    def act() -> None: ...

    with pytest.raises(UsageError, match="Two tools are called act"):
        as_tools([act, tool(act)])
    with pytest.raises(UsageError, match="'no name'"):
        tool(act, name="no name")
