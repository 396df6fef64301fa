"""An agent as the one who answers in `lfm chat`: its loop in a thread, its questions at the terminal.

The agent, its MCP servers and its HTTP live in one event loop in a thread of their own. The main thread keeps the
terminal: Ctrl-C arrives there, and calls are approved there.
"""

import asyncio
import contextlib
import json
import logging
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from lfm.agent import Agent, Endpoint, StepEnded, TextDelta, Tool, ToolCall, ToolCalled, ToolReturned, mcp_tools
from lfm.agent.events import Event
from lfm.cli.speakers import Json, Turn
from lfm.cli.terminal import note
from lfm.errors import InternalError

logger = logging.getLogger(__name__)

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
MAX_SHOWN_CHARS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """What the flags say of the agent. `approve` runs in the main thread."""

    url: str
    api_key: str | None
    tools: Sequence[Tool]
    mcp: Sequence[str]
    max_steps: int
    approve: Callable[[ToolCall], bool]
    options: Mapping[str, object]


def is_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty()


class AskUser:
    """Approval at the terminal: yes, no, or always for this tool. Without a terminal every call is declined."""

    def __init__(self) -> None:
        self._always: set[str] = set()

    def __call__(self, call: ToolCall) -> bool:
        if call.name in self._always:
            return True
        if not is_terminal():
            note("declined: there is no terminal to ask at. Allow all calls with --yes.")
            return False
        while True:
            try:
                answer = input("run it? [y]es, [n]o, [a]lways this tool: ").strip().lower()
            except EOFError:
                return False
            if answer in ("a", "always"):
                self._always.add(call.name)
            if answer in ("y", "yes", "n", "no", "a", "always"):
                return answer[0] != "n"


@dataclass(frozen=True, slots=True)
class _Question:
    call: ToolCall
    answer: "Future[bool]"


class AgentSpeaker:
    """Answers with the help of tools. Use it in a `with` block: entering connects, leaving ends its thread."""

    def __init__(self, settings: AgentSettings) -> None:
        self.name = ""
        self._settings = settings
        self._box: queue.SimpleQueue[Event | _Question | None] = queue.SimpleQueue()
        self._began: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = Future()
        self._ready: Future[Agent] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name="lfm-agent")

    def __enter__(self) -> Self:
        """Connect to the server and the MCP servers. Raises LfmError if one of them cannot be used."""
        self._thread.start()
        try:
            self._ready.result()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        loop, task = self._began.result()
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            loop.call_soon_threadsafe(task.cancel)
        self._thread.join()

    async def _live(self) -> None:
        """Keep the connections open until the end, all in this one task, as MCP's client wants it."""
        settings = self._settings
        task = asyncio.current_task()
        assert task is not None
        self._began.set_result((asyncio.get_running_loop(), task))
        try:
            async with contextlib.AsyncExitStack() as stack:
                endpoint = await stack.enter_async_context(Endpoint(settings.url, api_key=settings.api_key))
                self.name = await endpoint.model()
                tools = list(settings.tools)
                for target in settings.mcp:
                    tools += await stack.enter_async_context(mcp_tools(target))
                agent = Agent(
                    endpoint,
                    tools=tools,
                    max_steps=settings.max_steps,
                    approve=self._ask,
                    options=settings.options,
                )
                note(f"Tools: {', '.join(agent.tools)}")
                self._ready.set_result(agent)
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not self._ready.done():
                self._ready.cancel()
        except Exception as error:
            if self._ready.done():
                logger.exception("the agent has ended")
            else:
                self._ready.set_exception(error)  # raised again in the thread that waits

    def answer(self, messages: list[Json], turn: Turn) -> Iterator[str]:
        if not self._thread.is_alive():
            raise InternalError("The agent has ended, perhaps with one of its MCP servers. Start again.")
        self._box = queue.SimpleQueue()
        job = asyncio.run_coroutine_threadsafe(self._feed(messages, self._box), self._began.result()[0])
        try:
            while (item := self._box.get()) is not None:
                if isinstance(item, _Question):
                    item.answer.set_result(self._settings.approve(item.call))
                elif isinstance(item, TextDelta):
                    yield item.text
                else:
                    _tell(item, turn)
            job.result()  # raises what ended the run
        finally:
            job.cancel()

    async def _feed(self, messages: list[Json], box: "queue.SimpleQueue[Event | _Question | None]") -> None:
        try:
            async with contextlib.aclosing(self._ready.result().stream(messages)) as events:
                async for event in events:
                    box.put(event)
        finally:
            box.put(None)

    async def _ask(self, call: ToolCall) -> bool:
        question = _Question(call, Future())
        self._box.put(question)
        return await asyncio.wrap_future(question.answer)


def _tell(event: Event, turn: Turn) -> None:
    """Show what happens to the person, and keep what belongs to the conversation."""
    if isinstance(event, ToolCalled):
        arguments = event.call.raw if event.call.arguments is None else json.dumps(event.call.arguments)
        note(f"\ncalls {_printable(event.call.name)} {_printable(arguments)}")
    elif isinstance(event, ToolReturned):
        content = event.content if len(event.content) <= MAX_SHOWN_CHARS else f"{event.content[:MAX_SHOWN_CHARS]} ..."
        note(f"{_printable(event.call.name)} ({event.duration_s:.2f} s): {_printable(content)}")
    elif isinstance(event, StepEnded):
        turn.num_prompt_tokens = event.usage.num_prompt_tokens
        turn.num_cached_tokens = event.usage.num_cached_tokens
        turn.num_output_tokens += event.usage.num_output_tokens
        if len(event.messages) > 1:  # else it is the answer itself
            turn.messages += event.messages
            turn.text = ""


def _printable(text: str) -> str:
    """Data on one line: an escape sequence of a model or a tool must not drive the terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
