"""Running the calls of one step: approval one by one, then all of them at once, each with a limit of time and size.

Nothing that a tool does ends the run: an unknown name, wrong arguments, an exception, a limit or a refusal becomes a
short text that the model reads. Exceptions are told by type and message; tracebacks stay in our debug log.
"""

import asyncio
import inspect
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from lfm.agent.events import ToolCall, ToolReturned
from lfm.agent.signature import ArgumentError
from lfm.agent.tools import Tool, ToolError

logger = logging.getLogger(__name__)

Approve = Callable[[ToolCall], bool | Awaitable[bool]]

MAX_ERROR_CHARS = 500
MAX_AT_ONCE = 32
_SECRETS = re.compile(
    r"(?i)(://)[^/\s@]+(?=@)"  # user:password in an address
    r"|(\b(?:bearer|basic)\s+)\S+"
    r"|(\b[\w-]*(?:api[_-]?key|token|secret|password|passwd|authorization)[\"']?\s*[=:]\s*)(?:(?:bearer|basic)\s+)?[^\s&,;]+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one call: seconds until it counts as lost, characters of its result that the model reads."""

    tool_timeout_s: float
    max_result_chars: int


async def run_calls(
    calls: Sequence[ToolCall], tools: Mapping[str, Tool], *, limits: Limits, approve: Approve | None
) -> AsyncGenerator[ToolReturned]:
    """Run the calls of one step and yield each as it ends. Closing the iterator cancels those that run."""
    allowed = []
    for call in calls:
        if await _is_approved(call, approve, tools):
            allowed.append(call)
        else:
            yield _failed(call, "the user declined this call", start_s=time.monotonic())
    at_once = asyncio.Semaphore(MAX_AT_ONCE)
    tasks = [asyncio.create_task(_run_call(call, tools, limits=limits, at_once=at_once)) for call in allowed]
    try:
        for next_one in asyncio.as_completed(tasks):
            yield await next_one
    finally:
        for task in tasks:
            task.cancel()


async def _is_approved(call: ToolCall, approve: Approve | None, tools: Mapping[str, Tool]) -> bool:
    if approve is None or call.name not in tools or call.arguments is None:  # those fail without being run
        return True
    answer = approve(call)
    return await answer if inspect.isawaitable(answer) else answer


async def _run_call(
    call: ToolCall, tools: Mapping[str, Tool], *, limits: Limits, at_once: asyncio.Semaphore
) -> ToolReturned:
    start_s = time.monotonic()
    if call.name not in tools:
        return _failed(call, f"there is no tool {call.name!r}; there are: {', '.join(tools)}", start_s=start_s)
    if call.arguments is None:
        return _failed(call, "the arguments are no JSON object, perhaps cut at max_tokens", start_s=start_s)
    async with at_once:
        start_s = time.monotonic()
        task = asyncio.ensure_future(tools[call.name].invoke(call.arguments))
        try:
            await asyncio.wait({task}, timeout=limits.tool_timeout_s)
            if not task.done():
                return _failed(call, f"no result within {limits.tool_timeout_s:g} s", start_s=start_s)
            content = _cut(task.result(), limits.max_result_chars)
        except (ToolError, ArgumentError) as error:
            return _failed(call, str(error), start_s=start_s)
        except asyncio.CancelledError:
            if not task.cancelled():  # not the tool but the run ends
                raise
            return _failed(call, "the tool cancelled itself", start_s=start_s)
        except Exception as error:
            logger.debug("tool %s failed", call.name, exc_info=True)
            return _failed(call, f"{type(error).__name__}: {error}", start_s=start_s)
        finally:
            task.cancel()  # asked, not awaited: a tool that ignores it must not hold the run
    return ToolReturned(call=call, content=content, is_error=False, duration_s=time.monotonic() - start_s)


def _failed(call: ToolCall, message: str, *, start_s: float) -> ToolReturned:
    shown = _cut(_SECRETS.sub(lambda match: f"{match[1] or match[2] or match[3]}***", message), MAX_ERROR_CHARS)
    content = json.dumps({"error": " ".join(shown.split())}, ensure_ascii=False)
    return ToolReturned(call=call, content=content, is_error=True, duration_s=time.monotonic() - start_s)


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]} [cut: {max_chars} of {len(text)} characters]"
