"""POST /tokenize and /detokenize: what a text or a conversation is in ids, and back."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from pydantic import BaseModel, ConfigDict, PlainValidator
from starlette.types import Receive, Scope, Send

from lfm.chat.messages import Message
from lfm.chat.tokenizer import Tokenizer
from lfm.errors import RequestError
from lfm.server.admission import (
    check_model,
    check_prompt_size,
    check_text_size,
    in_thread_if_long,
    shown_prompt,
)
from lfm.server.asgi import read_json_object, send_json
from lfm.server.constraints import chat_prompt, read_rules
from lfm.server.input_models import ChatMessage
from lfm.server.output_fields import OutputFields
from lfm.server.schemas import ToolFormatField, ToolsField, parse_chat, parse_request
from lfm.server.state import AppState


def _parse_messages(value: object) -> list[Message] | None:
    return None if value is None else parse_chat(value)


class TokenizeRequest(BaseModel):
    """Either `prompt`, read as by /v1/completions, or `messages`, read as by /v1/chat/completions.

    `parse_special` false reads control tokens in `prompt` as the letters that they are written with, as in messages.
    """

    model_config = ConfigDict(strict=True, frozen=True, arbitrary_types_allowed=True)

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[
        list[Message] | None, PlainValidator(_parse_messages, json_schema_input_type=list[ChatMessage] | None)
    ] = None
    tools: ToolsField = None
    tool_format: ToolFormatField = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    model: str | None = None
    tokens: list[int]


class Tokenize:
    def __init__(self, state: AppState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = self._state
        state.check_ready()
        body = await read_json_object(scope, receive, stalled_s=state.config.stalled_reader_seconds)
        request = parse_request(TokenizeRequest, body.value)
        check_model(request.model or state.model_name, state.model_name)
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("Send either prompt or messages.", param="prompt")
        if request.messages is not None:
            fields = OutputFields(tools=request.tools, tool_format=request.tool_format)
            rules = await read_rules(request.messages, fields, state=state)
            ids = await chat_prompt(
                request.messages,
                rules,
                state=state,
                num_bytes=body.num_bytes,
                param="messages",
                add_generation_prompt=request.add_generation_prompt is not False,
            )
        else:
            check_text_size(len(request.prompt or ""), state, param="prompt")
            ids = await in_thread_if_long(partial(_encode, state.tokenizer, request), num_bytes=body.num_bytes)
        answer = {
            "count": len(ids),
            "max_model_len": state.backend.info.max_model_len,
            "tokens": ids,
            "token_strs": _shown(ids, state.tokenizer) if request.return_token_strs else None,
        }
        await send_json(send, answer)


class Detokenize:
    """The text of ids, control tokens shown."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = self._state
        state.check_ready()
        body = await read_json_object(scope, receive, stalled_s=state.config.stalled_reader_seconds)
        request = parse_request(DetokenizeRequest, body.value)
        check_model(request.model or state.model_name, state.model_name)
        check_prompt_size(len(request.tokens), state, param="tokens")
        state.tokenizer.check_ids(request.tokens, param="tokens")
        await send_json(send, {"prompt": shown_prompt(request.tokens, state.tokenizer)})


def _encode(tokenizer: Tokenizer, request: TokenizeRequest) -> list[int]:
    text = request.prompt or ""
    if request.parse_special is False:
        ids = [tokenizer.special.bos, *tokenizer.encode(text, param="prompt")]
    else:
        ids = tokenizer.encode_raw(text, param="prompt")
    return ids[1:] if request.add_special_tokens is False else ids


def _shown(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.token_bytes(token_id).decode("utf-8", errors="replace") for token_id in ids]
