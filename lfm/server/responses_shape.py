"""One answer in the form of OpenAI's Responses API: an object with output items, or the events that build it up."""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from lfm.chat.output import Delta
from lfm.protocol import ErrorInfo
from lfm.server.answer import AnswerHead, Json, Usage
from lfm.server.generation import Choice
from lfm.server.logprobs import logprob_entries
from lfm.server.refusals import as_warnings
from lfm.server.responses_input import ResponsesRequest, new_id
from lfm.server.sse import DONE, KEEP_ALIVE, named_event
from lfm.service.responses_store import StoreError

logger = logging.getLogger(__name__)

NOT_STORED = "store has no effect: this response could not be stored, so nothing can refer to it later"


class ResponseShape:
    """Follows one answer. `store` keeps the finished response object; it raises StoreError if it cannot."""

    def __init__(
        self,
        head: AnswerHead,
        *,
        request: ResponsesRequest,
        store: Callable[[Json], Awaitable[None]],
    ) -> None:
        self._head = head
        self._request = request
        self._store = store
        self._choice: Choice | None = None
        self._num_events = 0
        self._message: _MessageItem | None = None
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
        output = [self._message.value("incomplete")] if self._message is not None else []
        response = self._response("failed", output=output)
        response["error"] = {"code": "server_error", "message": error.message}
        return self._events({"type": "response.failed", "response": response}) + DONE

    async def body(self, choices: Sequence[tuple[Choice, Delta]], usage: Usage) -> Json:
        self._choice, delta = choices[0]
        self._read(delta)
        self._close()
        return await self._finished(usage)

    def _read(self, delta: Delta) -> list[Json]:
        """The events of one delta, without their numbers."""
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
        if not delta.text and not delta.logprobs:
            return []
        opening = self._open_message()
        assert self._message is not None
        return [*opening, self._message.add(delta)]

    def _open_message(self) -> list[Json]:
        if self._message is not None:
            return []
        self._message = _MessageItem(output_index=0)
        return self._message.opening()

    def _close(self) -> list[Json]:
        """Every answer has a message, if only an empty one."""
        opening = self._open_message()
        assert self._message is not None
        return [*opening, *self._message.closing(self._item_status)]

    @property
    def _item_status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    async def _finished(self, usage: Usage) -> Json:
        assert self._message is not None
        response = self._response(self._item_status, output=[self._message.value(self._item_status)])
        response["usage"] = _usage_json(usage)
        if self._finish_reason == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        if self._request.is_stored:
            try:
                await self._store(response)
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
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
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


class _MessageItem:
    """The output item of a text, while it grows."""

    def __init__(self, *, output_index: int) -> None:
        self._item_id = new_id("message")
        self._output_index = output_index
        self._texts: list[str] = []
        self._logprobs: list[Json] = []

    def opening(self) -> list[Json]:
        item = self.value("in_progress") | {"content": []}
        return [
            {"type": "response.output_item.added", "output_index": self._output_index, "item": item},
            self._part_event("response.content_part.added", {"part": self._part()}),
        ]

    def add(self, delta: Delta) -> Json:
        logprobs = logprob_entries(delta.logprobs)
        self._texts.append(delta.text)
        self._logprobs += logprobs
        return self._part_event("response.output_text.delta", {"delta": delta.text, "logprobs": logprobs})

    def closing(self, status: str) -> list[Json]:
        return [
            self._part_event("response.output_text.done", {"text": "".join(self._texts), "logprobs": self._logprobs}),
            self._part_event("response.content_part.done", {"part": self._part()}),
            {
                "type": "response.output_item.done",
                "output_index": self._output_index,
                "item": self.value(status),
            },
        ]

    def value(self, status: str) -> Json:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self._part()],
        }

    def _part(self) -> Json:
        return {
            "type": "output_text",
            "text": "".join(self._texts),
            "annotations": [],
            "logprobs": list(self._logprobs),
        }

    def _part_event(self, kind: str, fields: Json) -> Json:
        return {
            "type": kind,
            "item_id": self._item_id,
            "output_index": self._output_index,
            "content_index": 0,
            **fields,
        }


def _usage_json(usage: Usage) -> Json:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
    }
