"""What an agent can call: a name, a schema, and an action. Python functions become tools here."""

import asyncio
import contextvars
import functools
import inspect
import re
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ConfigDict, TypeAdapter

from lfm.agent.signature import read_signature
from lfm.errors import UsageError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")

_ANYTHING: TypeAdapter[object] = TypeAdapter(
    object, config=ConfigDict(ser_json_inf_nan="strings", ser_json_bytes="base64")
)


class ToolError(Exception):
    """Raised by a tool to tell the model what went wrong, in the tool's own words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """Something that the model can call.

    Args:
        parameters: JSON Schema of the arguments, an object.
        invoke: takes the decoded arguments and returns the result as text. Whatever it raises is told to the model.
    """

    name: str
    description: str
    parameters: Mapping[str, object]
    invoke: Callable[[Mapping[str, object]], Awaitable[str]]

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError(
                f"A tool is called {self.name!r}. Allowed: 1 to 64 letters, digits, _ . and -, beginning with a letter."
            )

    def definition(self) -> dict[str, object]:
        """The tool as it stands in a request."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def tool(function: Callable[..., object], *, name: str | None = None, description: str | None = None) -> Tool:
    """Make a tool of a Python function, async or not; its docstring and annotations describe it.

    A function that is not async runs in a thread of its own. Raises UsageError if a model could not call it.
    """
    signature = read_signature(function)

    async def invoke(arguments: Mapping[str, object]) -> str:
        bound = signature.bind(arguments)
        if inspect.iscoroutinefunction(function):
            try:
                return to_text(await function(**bound))
            except SystemExit as error:  # must not end the event loop
                raise ToolError("the tool tried to end the program") from error
        return await in_thread(lambda: to_text(function(**bound)))

    return Tool(
        name=name or signature.name,
        description=signature.description if description is None else description,
        parameters=signature.parameters,
        invoke=invoke,
    )


def as_tools(tools: Sequence[Tool | Callable[..., object]]) -> dict[str, Tool]:
    """Tools by name. Raises UsageError for two of one name."""
    made: dict[str, Tool] = {}
    for item in tools:
        made_tool = item if isinstance(item, Tool) else tool(item)
        if made_tool.name in made:
            raise UsageError(f"Two tools are called {made_tool.name}. Rename one of them.")
        made[made_tool.name] = made_tool
    return made


def to_text(value: object) -> str:
    """A result as the model reads it: a text as it is, anything else as JSON. Raises ToolError for an iterator."""
    if isinstance(value, str):
        return value
    if isinstance(value, Iterator) or inspect.isasyncgen(value) or inspect.isawaitable(value):
        raise ToolError(f"the tool returned a {type(value).__name__}, which has no end known; it must return a value")
    return _ANYTHING.dump_json(value, fallback=str).decode()


async def in_thread(work: Callable[[], str]) -> str:
    """Run a blocking function beside the event loop.

    The thread is a daemon and belongs to no pool: one that outlives its time limit keeps neither the next call nor the
    end of the program waiting. Python cannot stop it.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[str, BaseException | None]] = loop.create_future()

    def settle(result: str, error: BaseException | None) -> None:
        if not done.done():
            done.set_result((result, error))

    def run() -> None:
        result, failure = "", None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - handed to the waiting task, SystemExit included
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, failure)

    context = contextvars.copy_context()
    threading.Thread(target=functools.partial(context.run, run), daemon=True, name="lfm-tool").start()
    result, error = await done
    if error is None:
        return result
    if not isinstance(error, Exception):
        raise ToolError("the tool tried to end the program") from error
    raise error
