"""One answer in the form of OpenAI's Responses API: an object with output items, or the events that build it up."""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from lfm.chat.call_parser_stream import CallDelta
from lfm.chat.output import Delta, TokenScore
from lfm.protocol import ErrorInfo
from lfm.server.answer import AnswerHead, Json, Usage
from lfm.server.generation import Choice
from lfm.server.refusals import as_warnings
from lfm.server.responses_input import ResponsesRequest
from lfm.server.responses_items import CallItem, MessageItem
from lfm.server.search_items import SearchItem, in_order
from lfm.server.server_tools_loop import SearchStep
from lfm.server.sse import DONE, KEEP_ALIVE, named_event
from lfm.service.responses_store import StoreError

logger = logging.getLogger(__name__)

NOT_STORED = "store has no effect: this response could not be stored, so nothing can refer to it later"


class ResponseShape:
    """Follows one answer.

    Args:
        store: keeps the finished response object; it raises StoreError if it cannot.
        call_start_id: the token that opens a block of calls. Log-probabilities from it on belong to no text.
        annotate: says what a text cites.
    """

    def __init__(
        self,
        head: AnswerHead,
        *,
        request: ResponsesRequest,
        store: Callable[[Json, Json], Awaitable[None]],
        call_start_id: int | None = None,
        annotate: Callable[[str], list[Json]] | None = None,
    ) -> None:
        self._head = head
        self._request = request
        self._store = store
        self._choice: Choice | None = None
        self._num_events = 0
        self._call_start_id = call_start_id
        self._has_calls = False  # the text is over
        self._held_scores: list[TokenScore] = []  # of tokens before the first text
        self._annotate = annotate
        self._items: list[MessageItem | CallItem | SearchItem] = []
        self._finish_reason: str | None = None

    def begin(self, choices: Sequence[Choice]) -> bytes:
        self._choice = choices[0]
        response = self._response("in_progress", output=[])
        return self._events(
            {"type": "response.created", "response": response}, {"type": "response.in_progress", "response": response}
        )

    def news(self, news: Sequence[tuple[Choice, Delta]], usage: Usage, *, is_last: bool) -> bytes:
        return self._events(*(event for _, delta in news for event in self._read(delta)))

    def keep_alive(self) -> bytes:
        return KEEP_ALIVE

    async def end(self, usage: Usage) -> bytes:
        closing = self._close()
        response = await self._finished(usage)
        return self._events(*closing, {"type": f"response.{response['status']}", "response": response}) + DONE

    def failure(self, error: ErrorInfo, http_request_id: str) -> bytes:
        if self._items:
            self._items[-1].close("incomplete")
        response = self._response("failed", output=self._output())
        response["error"] = {"code": "server_error", "message": error.message}
        return self._events({"type": "response.failed", "response": response}) + DONE

    async def body(self, choices: Sequence[tuple[Choice, Delta]], usage: Usage) -> Json:
        self._choice, whole = choices[0]
        for delta in in_order(whole) if whole.steps else (whole,):
            self._read(delta)
        self._close()
        return await self._finished(usage)

    def _read(self, delta: Delta) -> list[Json]:
        """The events of one delta, without their numbers."""
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
        scores = self._scores_of_text(delta)
        events = self._add_text(delta.text, scores) if delta.text or scores else []
        for piece in delta.calls:
            events += self._add_call(piece)
        for step in delta.steps:
            if isinstance(step, SearchStep):
                events += self._add_search(step)
        return events

    def _add_search(self, step: SearchStep) -> list[Json]:
        if step.run is None:
            includes = frozenset(self._request.include or ())
            return self._open(SearchItem(step, output_index=len(self._items), includes=includes))
        begun = (item for item in self._items if isinstance(item, SearchItem) and item.call_id == step.call_id)
        return next(begun).finish(step.run)

    def _scores_of_text(self, delta: Delta) -> list[TokenScore]:
        scores: list[TokenScore] = []
        for score in delta.logprobs:
            self._has_calls = self._has_calls or score.token_id == self._call_start_id
            if not self._has_calls:
                scores.append(score)
        return scores

    def _add_text(self, text: str, scores: list[TokenScore]) -> list[Json]:
        last = self._items[-1] if self._items else None
        if isinstance(last, MessageItem):
            return [last.add(text, scores)]
        self._held_scores += scores
        if not text:
            return []
        opened = MessageItem(output_index=len(self._items), annotate=self._annotate)
        scores, self._held_scores = self._held_scores, []
        return [*self._open(opened), opened.add(text, scores)]

    def _add_call(self, piece: CallDelta) -> list[Json]:
        events = []
        last = self._items[-1] if self._items else None
        if not isinstance(last, CallItem) or last.index != piece.index:
            last = CallItem(piece, output_index=len(self._items))
            events = self._open(last)
        return [*events, last.add(piece.arguments)] if piece.arguments else events

    def _open(self, item: MessageItem | CallItem | SearchItem) -> list[Json]:
        """Begin an item; the one before is complete then."""
        closing = self._items[-1].close("completed") if self._items else []
        self._items.append(item)
        return [*closing, *item.opening()]

    def _close(self) -> list[Json]:
        """Every answer has an item, if only an empty message."""
        events: list[Json] = []
        if not self._items:
            message = MessageItem(output_index=0, annotate=self._annotate)
            events = self._open(message)
            if self._held_scores:
                events.append(message.add("", self._held_scores))
        return [*events, *self._items[-1].close(self._status)]

    def _output(self) -> list[Json]:
        return [item.value() for item in self._items]

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    async def _finished(self, usage: Usage) -> Json:
        response = self._response(self._status, output=self._output())
        response["usage"] = _usage_json(usage)
        if self._finish_reason == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        if self._request.is_stored:
            try:
                await self._store(response, dict(item.found() for item in self._items if isinstance(item, SearchItem)))
            except StoreError as error:
                logger.warning("%s is not stored: %s", self._head.request_id, error)
                response["store"] = False
                response["warnings"] = [*self._head.warnings, *as_warnings([f"{NOT_STORED}."])]
        return response

    def _response(self, status: str, *, output: list[Json]) -> Json:
        assert self._choice is not None
        sampling, request = self._choice.request.sampling, self._request
        response: Json = {
            "id": self._head.request_id,
            "object": "response",
            "created_at": self._head.created,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None,
            "metadata": request.metadata or {},
            "model": self._head.model,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": "default",
            "store": request.is_stored,
            "temperature": sampling.temperature,
            "text": {"format": request.answer_format or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": _shown_tools(request.tools),
            "top_logprobs": request.top_logprobs or 0,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }
        return response | {"warnings": self._head.warnings} if self._head.warnings else response

    def _events(self, *events: Json) -> bytes:
        data = []
        for event in events:
            data.append(named_event({**event, "sequence_number": self._num_events}))
            self._num_events += 1
        return b"".join(data)


def _shown_tools(tools: object) -> list[Json]:
    """The tools as the request had them, with every field that OpenAI's own answers have."""
    shown = []
    for tool in tools if isinstance(tools, list) else []:
        function = tool.get("function", tool)
        if tool.get("type", "function") != "function":
            shown.append(tool)
            continue
        shown.append({"description": None, "parameters": None, "strict": None, **function, "type": "function"})
    return shown


def _usage_json(usage: Usage) -> Json:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
    }
