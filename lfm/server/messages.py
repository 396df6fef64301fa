"""POST /v1/messages and /v1/messages/count_tokens in Anthropic's form: blocks in, blocks and their events out."""

from collections.abc import Callable, Sequence
from functools import partial

import orjson
from pydantic import TypeAdapter
from starlette.types import Receive, Scope, Send

from lfm.chat.call_parser_stream import CallDelta
from lfm.chat.messages import Message
from lfm.chat.output import Delta
from lfm.protocol import ErrorInfo
from lfm.server.admission import check_model
from lfm.server.answer import AnswerHead, Json, Usage
from lfm.server.asgi import read_json_object, send_json
from lfm.server.constraints import OutputRules, Turn, chat_prompt, check_grammar, read_rules
from lfm.server.endpoint import Call, Prepared
from lfm.server.errors import anthropic_error_body
from lfm.server.generation import Choice
from lfm.server.messages_input import MessagesRequest, TokenCountRequest
from lfm.server.past_searches import cite_past
from lfm.server.refusals import MESSAGES_RULES
from lfm.server.schemas import parse_request
from lfm.server.search_annotations import Citations
from lfm.server.search_items import in_order, tool_result_block, tool_use_block
from lfm.server.server_tools import ServerTools
from lfm.server.server_tools_loop import SearchStep
from lfm.server.sse import KEEP_ALIVE, named_event
from lfm.server.state import AppState

_PARTIAL_OBJECT = TypeAdapter(Json)
PING = named_event({"type": "ping"})


class Messages:
    """The family of Anthropic's messages."""

    request_type = MessagesRequest
    id_prefix = "msg_"
    prompt_field = "messages"
    rules = MESSAGES_RULES

    async def prepare(self, request: MessagesRequest, *, call: Call) -> Prepared:
        server_tools = ServerTools(request.search_tools)
        messages = cite_past(request.conversation, server_tools.citations)
        rules = await read_rules(messages, request.output_fields, state=call.state)
        await check_grammar(rules, state=call.state, tenant=call.owner)
        prompt_ids = await _prompt_ids(request, messages, rules, state=call.state, num_bytes=call.num_bytes)
        turn = Turn(messages=messages, rules=rules, prompt_ids=prompt_ids)
        cites = server_tools.citations.in_message if server_tools.may_cite and turn.rules.answer is None else None
        shape = partial(MessageShape, max_tokens=request.max_tokens, cites=cites)
        return Prepared.of_turn(turn, shape, server_tools=server_tools)


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
        request.check_combinations()
        messages = cite_past(request.conversation, Citations())
        rules = await read_rules(messages, request.output_fields, state=self._state)
        prompt_ids = await _prompt_ids(request, messages, rules, state=self._state, num_bytes=body.num_bytes)
        await send_json(send, {"input_tokens": len(prompt_ids)})


async def _prompt_ids(
    request: TokenCountRequest, messages: Sequence[Message], rules: OutputRules, *, state: AppState, num_bytes: int
) -> list[int]:
    prompt_ids = await chat_prompt(
        messages,
        rules,
        state=state,
        num_bytes=num_bytes,
        param="messages",
        add_generation_prompt=not request.is_prefilled,
    )
    if request.is_prefilled:  # leave the last turn open: its end marker, which no text can contain, is the last one
        del prompt_ids[len(prompt_ids) - 1 - prompt_ids[::-1].index(state.tokenizer.special.im_end) :]
    return prompt_ids


class MessageShape:
    """One answer. `max_tokens` is what the client asked for, which may be more than the context had left.

    `cites` says what a text cites, where tools of the server search.
    """

    def __init__(self, head: AnswerHead, *, max_tokens: int, cites: Callable[[str], list[Json]] | None = None) -> None:
        self._cites = cites
        self._texts: list[str] = []  # of the block being written, if it may cite
        self._num_searches = 0
        self._head = head
        self._max_tokens = max_tokens
        self._has_begun = False
        self._num_blocks = 0
        self._open: str | None = None  # what the block being written is: "text", or the id of a call
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
        events = self._close_block()
        events.append({"type": "message_delta", "delta": self._stop(*self._end), "usage": self._usage(usage)})
        events.append({"type": "message_stop"})
        return b"".join(map(named_event, events))

    def failure(self, error: ErrorInfo, http_request_id: str) -> bytes:
        return named_event(anthropic_error_body(error, http_request_id))

    async def body(self, choices: Sequence[tuple[Choice, Delta]], usage: Usage) -> Json:
        choice, delta = choices[0]
        content = [block for piece in in_order(delta) for block in self._blocks(piece)]
        return self._message(content=content, usage=usage) | self._stop(choice, delta)

    def _blocks(self, delta: Delta) -> list[Json]:
        """The blocks of a piece of a whole answer."""
        blocks: list[Json] = []
        if delta.text:
            citations = [] if self._cites is None else self._cites(delta.text)
            blocks.append({"type": "text", "text": delta.text} | ({"citations": citations} if citations else {}))
        blocks += [_tool_use(call) | {"input": _read_input(call.arguments)} for call in delta.calls]
        for step in delta.steps:
            if isinstance(step, SearchStep) and step.run is None:
                self._num_searches += 1
                blocks.append(tool_use_block(step) | {"input": {"query": step.query}})
            elif isinstance(step, SearchStep):
                blocks.append(tool_result_block(step))
        return blocks

    def _search_events(self, step: SearchStep) -> list[Json]:
        """A search is two blocks: what was looked for, and what was found."""
        if step.run is not None:
            return [*self._open_block(f"{step.call_id} done", tool_result_block(step)), *self._close_block()]
        self._num_searches += 1
        query = orjson.dumps({"query": step.query}).decode()
        return [
            *self._open_block(step.call_id, tool_use_block(step)),
            self._block_delta({"type": "input_json_delta", "partial_json": query}),
            *self._close_block(),
        ]

    def _content_events(self, delta: Delta) -> list[Json]:
        events: list[Json] = []
        if delta.text:
            events += self._open_block("text", {"type": "text", "text": ""})
            self._texts.append(delta.text)
            events.append(self._block_delta({"type": "text_delta", "text": delta.text}))
        for call in delta.calls:
            events += self._open_block(call.id, _tool_use(call))
            if call.arguments:
                events.append(self._block_delta({"type": "input_json_delta", "partial_json": call.arguments}))
        for step in delta.steps:
            if isinstance(step, SearchStep):
                events += self._search_events(step)
        return events

    def _open_block(self, key: str, block: Json) -> list[Json]:
        """Close the block before, if this piece belongs to another one."""
        if key == self._open:
            return []
        events = self._close_block()
        events.append({"type": "content_block_start", "index": self._num_blocks, "content_block": block})
        if self._num_blocks == 0:
            events.append({"type": "ping"})  # where Anthropic sends its first
        self._open = key
        self._num_blocks += 1
        return events

    def _close_block(self) -> list[Json]:
        if self._open is None:
            return []
        citations = [] if self._cites is None or self._open != "text" else self._cites("".join(self._texts))
        self._open, self._texts = None, []
        return [
            *(self._block_delta({"type": "citations_delta", "citation": citation}) for citation in citations),
            {"type": "content_block_stop", "index": self._num_blocks - 1},
        ]

    def _block_delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}

    def _message(self, *, content: list[Json], usage: Usage) -> Json:
        message: Json = {
            "id": self._head.request_id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": content,
            "usage": self._usage(usage),
        }
        return message | {"warnings": self._head.warnings} if self._head.warnings else message

    def _usage(self, usage: Usage) -> Json:
        searches: Json = {"server_tool_use": {"web_search_requests": self._num_searches, "web_fetch_requests": 0}}
        return _usage_json(usage) | (searches if self._num_searches else {})

    def _stop(self, choice: Choice, delta: Delta) -> Json:
        if delta.finish_reason == "length":
            is_clamped = choice.request.sampling.max_tokens < self._max_tokens
            return {
                "stop_reason": "model_context_window_exceeded" if is_clamped else "max_tokens",
                "stop_sequence": None,
            }
        if delta.finish_reason == "tool_calls":
            return {"stop_reason": "tool_use", "stop_sequence": None}
        stop_string = choice.processor.stop_string
        return {"stop_reason": "end_turn" if stop_string is None else "stop_sequence", "stop_sequence": stop_string}


def _tool_use(call: CallDelta) -> Json:
    """A call as a block, before its input."""
    return {"type": "tool_use", "id": f"toolu_{call.id.removeprefix('call_')}", "name": call.name, "input": {}}


def _read_input(arguments: str) -> Json:
    """The arguments as an object; of ones that max_tokens cut, what is whole: so Anthropic's clients read a stream."""
    return _PARTIAL_OBJECT.validate_json(arguments or "{}", experimental_allow_partial=True)


def _usage_json(usage: Usage) -> Json:
    """Anthropic counts the cached part of a prompt apart."""
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_output_tokens,
    }
