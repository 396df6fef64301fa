"""POST /v1/messages and /v1/messages/count_tokens in Anthropic's form: blocks in, blocks and their events out."""

from collections.abc import Sequence
from functools import partial

from starlette.types import Receive, Scope, Send

from lfm.chat.output import Delta
from lfm.protocol import ErrorInfo
from lfm.server.admission import chat_prompt, check_model
from lfm.server.answer import AnswerHead, Json, Usage
from lfm.server.asgi import read_json_object, send_json
from lfm.server.endpoint import Call, Prepared
from lfm.server.errors import anthropic_error_body
from lfm.server.generation import Choice
from lfm.server.messages_input import MessagesRequest, TokenCountRequest
from lfm.server.refusals import MESSAGES_RULES
from lfm.server.schemas import parse_request
from lfm.server.sse import KEEP_ALIVE, named_event
from lfm.server.state import AppState

PING = named_event({"type": "ping"})


class Messages:
    """The family of Anthropic's messages."""

    request_type = MessagesRequest
    id_prefix = "msg_"
    prompt_field = "messages"
    rules = MESSAGES_RULES

    async def prepare(self, request: MessagesRequest, *, call: Call) -> Prepared:
        prompt_ids = await _prompt_ids(request, state=call.state, num_bytes=call.num_bytes)
        return Prepared([prompt_ids], partial(MessageShape, max_tokens=request.max_tokens))


class TokenCount:
    """POST /v1/messages/count_tokens: how long the prompt of such a request would be."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._state.check_ready()
        body = await read_json_object(scope, receive, stalled_s=self._state.config.stalled_reader_seconds)
        request = parse_request(TokenCountRequest, body.value)
        check_model(request.model, self._state.model_name)
        MESSAGES_RULES.refuse(body.value)
        prompt_ids = await _prompt_ids(request, state=self._state, num_bytes=body.num_bytes)
        await send_json(send, {"input_tokens": len(prompt_ids)})


async def _prompt_ids(request: TokenCountRequest, *, state: AppState, num_bytes: int) -> list[int]:
    prompt_ids = await chat_prompt(
        request.conversation,
        state=state,
        num_bytes=num_bytes,
        param="messages",
        add_generation_prompt=not request.is_prefilled,
    )
    if request.is_prefilled:  # leave the last turn open: its end marker, which no text can contain, is the last one
        del prompt_ids[len(prompt_ids) - 1 - prompt_ids[::-1].index(state.tokenizer.special.im_end) :]
    return prompt_ids


class MessageShape:
    """One answer. `max_tokens` is what the client asked for, which may be more than the context had left."""

    def __init__(self, head: AnswerHead, *, max_tokens: int) -> None:
        self._head = head
        self._max_tokens = max_tokens
        self._has_begun = False
        self._has_text = False
        self._end: tuple[Choice, Delta] | None = None

    def begin(self, choices: Sequence[Choice]) -> bytes:
        """Nothing yet: the first event tells how much of the prompt was cached, which comes with the first token."""
        return b""

    def news(self, news: Sequence[tuple[Choice, Delta]], usage: Usage, *, is_last: bool) -> bytes:
        events: list[Json] = []
        if not self._has_begun:
            self._has_begun = True
            message = self._message(content=[], usage=usage) | {"stop_reason": None, "stop_sequence": None}
            events.append({"type": "message_start", "message": message})
        for choice, delta in news:
            events += self._content_events(delta)
            if delta.finish_reason is not None:
                self._end = choice, delta
        return b"".join(map(named_event, events))

    def keep_alive(self) -> bytes:
        return PING if self._has_begun else KEEP_ALIVE

    async def end(self, usage: Usage) -> bytes:
        assert self._end is not None, "the last delta comes before the end"
        events: list[Json] = [{"type": "content_block_stop", "index": 0}] if self._has_text else []
        events.append({"type": "message_delta", "delta": self._stop(*self._end), "usage": _usage_json(usage)})
        events.append({"type": "message_stop"})
        return b"".join(map(named_event, events))

    def failure(self, error: ErrorInfo, http_request_id: str) -> bytes:
        return named_event(anthropic_error_body(error, http_request_id))

    async def body(self, choices: Sequence[tuple[Choice, Delta]], usage: Usage) -> Json:
        choice, delta = choices[0]
        content: list[Json] = [{"type": "text", "text": delta.text}] if delta.text else []
        return self._message(content=content, usage=usage) | self._stop(choice, delta)

    def _content_events(self, delta: Delta) -> list[Json]:
        if not delta.text:
            return []
        events: list[Json] = []
        if not self._has_text:
            self._has_text = True
            events.append({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
            events.append({"type": "ping"})  # where Anthropic sends its first
        events.append({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": delta.text}})
        return events

    def _message(self, *, content: list[Json], usage: Usage) -> Json:
        message: Json = {
            "id": self._head.request_id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": content,
            "usage": _usage_json(usage),
        }
        return message | {"warnings": self._head.warnings} if self._head.warnings else message

    def _stop(self, choice: Choice, delta: Delta) -> Json:
        if delta.finish_reason == "length":
            is_clamped = choice.request.sampling.max_tokens < self._max_tokens
            return {
                "stop_reason": "model_context_window_exceeded" if is_clamped else "max_tokens",
                "stop_sequence": None,
            }
        stop_string = choice.processor.stop_string
        return {"stop_reason": "end_turn" if stop_string is None else "stop_sequence", "stop_sequence": stop_string}


def _usage_json(usage: Usage) -> Json:
    """Anthropic counts the cached part of a prompt apart."""
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_output_tokens,
    }
