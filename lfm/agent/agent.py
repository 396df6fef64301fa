"""The loop: ask the model, run the tools that it calls, tell it the results, until it answers.

Tool results are data. They go back as `tool` messages, whose text the server cannot mistake for control tokens, and
nothing in them is followed or evaluated here.
"""

import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from lfm.agent.calls import Approve, Limits, run_calls
from lfm.agent.endpoint import Answer, Endpoint
from lfm.agent.events import Event, Json, Result, StepEnded, TextDelta, ToolCall, ToolCalled, ToolReturned, Usage
from lfm.agent.tools import Tool, as_tools
from lfm.errors import InternalError, UsageError

_OWN_FIELDS = {"model", "messages", "tools", "tool_choice", "stream", "stream_options", "n"}
_LAST_STEP = '{"error": "not run: this was the last step"}'


class Agent:
    """Instructions and tools at one endpoint. It holds no conversation: any number of runs may go on at once.

    Args:
        tools: Python functions, or Tools such as those of an MCP server.
        instructions: the system message.
        max_steps: model answers per run, at least 1. In the last one no tools may be called.
        tool_timeout_s: after this a call counts as failed. A function that is not async goes on in its thread.
        max_result_chars: longer results are cut, with a note.
        approve: asked before each call, one at a time; False declines it, which the model is told.
        tool_choice: as in the API, for the first step of a run; later ones are "auto".
        options: further fields of the requests, such as temperature and max_tokens.

    Raises UsageError for tools that no model could call.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        tools: Sequence[Tool | Callable[..., object]] = (),
        instructions: str | None = None,
        max_steps: int = 10,
        tool_timeout_s: float = 60.0,
        max_result_chars: int = 20_000,
        approve: Approve | None = None,
        tool_choice: str | Mapping[str, object] = "auto",
        options: Mapping[str, object] | None = None,
    ) -> None:
        for name, value in (("max_steps", max_steps), ("max_result_chars", max_result_chars)):
            if value < 1:
                raise UsageError(f"{name}={value} is too small. Allowed: 1 and more.")
        if not tool_timeout_s > 0:
            raise UsageError(f"tool_timeout_s={tool_timeout_s} is too small. Allowed: seconds above 0.")
        if own := _OWN_FIELDS & set(options or {}):
            raise UsageError(f"options names {', '.join(sorted(own))}, which the agent sets itself. Leave it out.")
        self.tools = as_tools(tools)
        self._endpoint = endpoint
        self._instructions = instructions
        self._max_steps = max_steps
        self._limits = Limits(tool_timeout_s=tool_timeout_s, max_result_chars=max_result_chars)
        self._approve = approve
        self._tool_choice = tool_choice
        self._options = dict(options or {})
        self._definitions = [tool.definition() for tool in self.tools.values()]

    async def run(self, prompt: str | Sequence[Mapping[str, object]]) -> Result:
        """Answer a question, or go on with a conversation. Raises LfmError if the server refuses or fails."""
        async with contextlib.aclosing(self.stream(prompt)) as events:
            async for event in events:
                if isinstance(event, Result):
                    return event
        raise InternalError("A run ended without its result.")

    async def stream(self, prompt: str | Sequence[Mapping[str, object]]) -> AsyncGenerator[Event]:
        """As `run`, event by event; the Result is the last. Close it early to abort what runs."""
        messages: list[Json] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _copied(prompt)
        usage, num_calls = Usage(), 0
        for step in range(1, self._max_steps + 1):
            answer, pieces = Answer(), list[str]()
            async with contextlib.aclosing(self._endpoint.stream(self._body(messages, step), answer)) as texts:
                async for text in texts:
                    pieces.append(text)
                    yield TextDelta(text)
            calls = answer.calls(num_calls)
            num_calls += len(calls)
            usage += answer.usage
            results: dict[str, str] = {}
            if step < self._max_steps:
                async with contextlib.aclosing(self._run(calls)) as events:
                    async for event in events:
                        if isinstance(event, ToolReturned):
                            results[event.call.id] = event.content
                        yield event
            said = "".join(pieces)
            added = [_spoken(said, calls), *(_heard(call, results.get(call.id, _LAST_STEP)) for call in calls)]
            messages += added
            yield StepEnded(messages=tuple(added), usage=answer.usage)
            if not calls or step == self._max_steps:
                yield Result(
                    text=said,
                    messages=tuple(messages),
                    usage=usage,
                    num_steps=step,
                    stop_reason="max_steps" if calls else "length" if answer.finish_reason == "length" else "answer",
                )
                return

    def _body(self, messages: Sequence[Json], step: int) -> Json:
        system: list[Json] = [] if self._instructions is None else [{"role": "system", "content": self._instructions}]
        body: Json = {**self._options, "messages": [*system, *messages]}
        if self._definitions:
            body["tools"] = self._definitions  # in the last step too: without them the prompt would be another
            body["tool_choice"] = "none" if step == self._max_steps else self._tool_choice if step == 1 else "auto"
        return body

    async def _run(self, calls: Sequence[ToolCall]) -> AsyncGenerator[ToolCalled | ToolReturned]:
        for call in calls:
            yield ToolCalled(call)
        running = run_calls(calls, self.tools, limits=self._limits, approve=self._approve)
        async with contextlib.aclosing(running) as returned:
            async for event in returned:
                yield event


def _copied(messages: Sequence[Mapping[str, object]]) -> list[Json]:
    if not messages:
        raise UsageError("The conversation is empty. Give a question, or at least one message.")
    return [dict(message) for message in messages]


def _spoken(text: str, calls: Sequence[ToolCall]) -> Json:
    """The assistant's message. Arguments that are no JSON object are left out: no server would take them back."""
    message: Json = {"role": "assistant", "content": text or (None if calls else "")}
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": "{}" if call.arguments is None else call.raw or "{}"},
            }
            for call in calls
        ]
    return message


def _heard(call: ToolCall, content: str) -> Json:
    return {"role": "tool", "tool_call_id": call.id, "content": content}
