"""The body of POST /v1/responses, and how its items become chat messages.

An item is kept as JSON, in the form in which the API shows it again; `Item.where` is its path in the request.
"""

import uuid
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from lfm.chat.json_fields import json_type, optional_text, parse_arguments, typed
from lfm.chat.messages import Message, ToolCall
from lfm.errors import RequestError
from lfm.server.input_models import ResponsesInput
from lfm.server.output_fields import OutputFields
from lfm.server.past_searches import past_sources
from lfm.server.schemas import (
    FormatField,
    SamplingRequest,
    StopField,
    ToolFormatField,
    TopLogprobsField,
    keep,
    shown,
)
from lfm.server.search_models import ChosenSearch, ResponsesFileSearch, ResponsesWebSearch
from lfm.server.server_tools import SearchTool, take_choice, take_tools
from lfm.server.tool_models import ResponsesTool, ToolChoiceField
from lfm.server.tool_turns import ToolTurns

Json = dict[str, object]

MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
LOGPROBS = "message.output_text.logprobs"  # the one thing that `include` can add to our answers
ID_PREFIX = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_"}
SEARCHES = ("web_search_call", "file_search_call")  # of earlier responses: the model sees them if they hold results
ROLES = ("user", "assistant", "system", "developer")
PART_TYPES = ("input_text", "output_text", "text")


class Item(NamedTuple):
    value: Json
    where: str


class InputItems(NamedTuple):
    """What the request says, item by item; `num_reasoning` items of other models' reasoning are left out."""

    items: list[Item]
    num_reasoning: int = 0


def new_id(kind: str) -> str:
    """An id for an item of this type."""
    return ID_PREFIX[kind] + uuid.uuid4().hex


def parse_input(value: object) -> InputItems:
    """A text is one message of the user. Raises RequestError with the path of whatever cannot be read."""
    if value is None:
        return InputItems([])
    if isinstance(value, str):
        return InputItems([Item(_message("user", [value]), "input")])
    if not isinstance(value, list):
        raise RequestError(f"input is {json_type(value)}. Allowed: a string or an array of items.", param="input")
    items, num_reasoning = [], 0
    for index, entry in enumerate(value):
        where = f"input[{index}]"
        raw = typed(entry, dict, where)
        kind = typed(raw.get("type", "message"), str, f"{where}.type")
        if kind == "reasoning":
            num_reasoning += 1
        elif kind in SEARCHES:
            items.append(Item(_read_search(raw, where), where))
        elif kind in _READERS:
            items.append(Item(_READERS[kind](raw, where), where))
        else:
            raise RequestError(
                f"{where}.type={shown(kind)} is not supported. Allowed: {', '.join(ID_PREFIX)}.", param=f"{where}.type"
            )
    return InputItems(items, num_reasoning)


def to_messages(items: Sequence[Item]) -> list[Message]:
    """The items as turns. Raises RequestError for a result without its call and for arguments that are no JSON."""
    messages: list[Message] = []
    turns = ToolTurns()
    items = [item for item in items if item.value["type"] not in SEARCHES or item.value.get("results")]
    for are_results, group in groupby(items, key=lambda item: item.value["type"] == "function_call_output"):
        if are_results:
            messages += turns.in_call_order([_result_turn(item, turns) for item in group])
        else:
            for item in group:
                _add_turn(messages, item, turns)
    return messages


def _add_turn(messages: list[Message], item: Item, turns: ToolTurns) -> None:
    """Text and calls of the assistant that follow each other are one turn, as the model wrote them."""
    last = messages[-1] if messages and messages[-1].role == "assistant" else None
    if item.value["type"] in SEARCHES:
        _add_search(messages, item, last)
        return
    if item.value["type"] == "function_call":
        call = _call(item, turns)
        if last is None:
            messages.append(Message(role="assistant", tool_calls=(call,)))
        else:
            messages[-1] = replace(last, tool_calls=(*last.tool_calls, call))
        return
    role, text = str(item.value["role"]), _text_of(item.value["content"])
    if role == "assistant" and last is not None and last.tool_calls and not last.text:
        messages[-1] = replace(last, content=text)
    else:
        messages.append(Message(role=role, content=text))


def _add_search(messages: list[Message], item: Item, last: Message | None) -> None:
    """A search and what it found, as the model saw them; in front of calls whose results are still to come."""
    action, queries = item.value.get("action"), item.value.get("queries")
    if isinstance(action, dict):
        query = str(action.get("query", ""))
    else:
        query = str(queries[0]) if isinstance(queries, list) and queries else ""
    call = ToolCall(name=str(item.value["type"]).removesuffix("_call"), arguments={"query": query})
    found = past_sources(item.value["results"], is_file=call.name == "file_search")
    if last is not None and not last.tool_calls:
        messages[-1:] = [replace(last, tool_calls=(call,)), found]
    else:
        at = len(messages) if last is None else len(messages) - 1
        messages[at:at] = [Message(role="assistant", tool_calls=(call,)), found]


def _call(item: Item, turns: ToolTurns) -> ToolCall:
    turns.add_call(str(item.value["call_id"]), f"{item.where}.call_id")
    where = f"{item.where}.arguments"
    arguments = typed(parse_arguments(str(item.value["arguments"]), where), dict, where)
    return ToolCall(name=str(item.value["name"]), arguments=arguments)


def _result_turn(item: Item, turns: ToolTurns) -> Message:
    call_id = str(item.value["call_id"])
    turns.add_result(call_id, f"{item.where}.call_id")
    return Message(role="tool", content=_text_of(item.value["output"]), tool_call_id=call_id)


def _text_of(content: object) -> str:
    if isinstance(content, str):
        return content
    assert isinstance(content, list), "items were read by parse_input"
    return "".join(part["text"] for part in content)


def _read_message(raw: Json, where: str) -> Json:
    role = typed(raw.get("role"), str, f"{where}.role")
    if role not in ROLES:
        raise RequestError(
            f"{where}.role={shown(role)} is not known. Allowed: {', '.join(ROLES)}.", param=f"{where}.role"
        )
    return _message(role, _read_texts(raw.get("content"), f"{where}.content"))


def _message(role: str, texts: list[str]) -> Json:
    if role == "assistant":
        content: list[Json] = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
    else:
        content = [{"type": "input_text", "text": text} for text in texts]
    return {"id": new_id("message"), "type": "message", "role": role, "status": "completed", "content": content}


def _read_call(raw: Json, where: str) -> Json:
    return {
        "id": new_id("function_call"),
        "type": "function_call",
        "call_id": typed(raw.get("call_id"), str, f"{where}.call_id"),
        "name": typed(raw.get("name"), str, f"{where}.name"),
        "arguments": typed(raw.get("arguments"), str, f"{where}.arguments"),
        "status": "completed",
    }


def _read_result(raw: Json, where: str) -> Json:
    output: object = raw.get("output")
    if not isinstance(output, str):
        output = [{"type": "input_text", "text": text} for text in _read_texts(output, f"{where}.output")]
    return {
        "id": new_id("function_call_output"),
        "type": "function_call_output",
        "call_id": typed(raw.get("call_id"), str, f"{where}.call_id"),
        "output": output,
        "status": "completed",
    }


def _read_search(raw: Json, where: str) -> Json:
    """A search as it was shown. Of its fields only those are kept that an answer of ours has."""
    item_id = optional_text(raw.get("id"), f"{where}.id") or uuid.uuid4().hex
    results = typed(raw.get("results") or [], list, f"{where}.results")
    kept: Json = {"results": [typed(result, dict, f"{where}.results[]") for result in results] or None}
    if raw["type"] == "web_search_call":
        action = raw.get("action")
        action = {"type": "search", "query": ""} if action is None else typed(action, dict, f"{where}.action")
        kept = kept if results else {}
        return {"id": item_id, "type": "web_search_call", "status": "completed", "action": action, **kept}
    queries = typed(raw.get("queries") or [], list, f"{where}.queries")
    return {"id": item_id, "type": "file_search_call", "status": "completed", "queries": queries, **kept}


def _read_texts(value: object, where: str) -> list[str]:
    """The texts of a content: a string, or text parts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise RequestError(f"{where} is {json_type(value)}. Allowed: a string or an array of parts.", param=where)
    texts = []
    for index, entry in enumerate(value):
        part_where = f"{where}[{index}]"
        part = typed(entry, dict, part_where)
        kind = typed(part.get("type"), str, f"{part_where}.type")
        if kind not in PART_TYPES:
            raise RequestError(
                f"{part_where} is of type {shown(kind)}, but this model reads text only. "
                f"Allowed: {', '.join(PART_TYPES)}.",
                param=part_where,
            )
        texts.append(typed(part.get("text"), str, f"{part_where}.text"))
    return texts


_READERS = {"message": _read_message, "function_call": _read_call, "function_call_output": _read_result}


def _check_metadata(value: dict[str, str] | None) -> dict[str, str] | None:
    if value and len(value) > MAX_METADATA:
        raise RequestError(f"metadata has {len(value)} pairs. Allowed: {MAX_METADATA}.", param="metadata")
    for key, text in (value or {}).items():
        if len(key) > MAX_METADATA_KEY or len(text) > MAX_METADATA_VALUE:
            raise RequestError(
                f"metadata has the key {shown(key)} of {len(key)} characters with a value of {len(text)}. "
                f"Allowed: {MAX_METADATA_KEY} and {MAX_METADATA_VALUE}.",
                param="metadata",
            )
    return value


class TextOptions(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    format: FormatField = None


class ResponsesRequest(SamplingRequest):
    """POST /v1/responses."""

    input: Annotated[InputItems, PlainValidator(parse_input, json_schema_input_type=ResponsesInput)] = Field(
        default_factory=lambda: InputItems([])
    )
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    stop: StopField = None
    top_logprobs: TopLogprobsField = None
    include: list[str] | None = None
    metadata: Annotated[dict[str, str] | None, AfterValidator(_check_metadata)] = None
    store: bool | None = None
    text: TextOptions | None = None
    tools: Annotated[
        object,
        PlainValidator(
            keep, json_schema_input_type=list[ResponsesTool | ResponsesWebSearch | ResponsesFileSearch] | None
        ),
    ] = None
    tool_choice: Annotated[
        object, PlainValidator(keep, json_schema_input_type=ToolChoiceField | ChosenSearch | None)
    ] = None
    parallel_tool_calls: bool | None = None
    tool_format: ToolFormatField = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    @property
    def stop_strings(self) -> Sequence[str]:
        return self.stop or ()

    @property
    def num_logprobs(self) -> int | None:
        wants_logprobs = self.top_logprobs or LOGPROBS in (self.include or ())
        return (self.top_logprobs or 0) if wants_logprobs else None

    @property
    def token_limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def max_tokens_field(self) -> str:
        return "max_output_tokens"

    @property
    def answer_format(self) -> object:
        return None if self.text is None else self.text.format

    @property
    def output_fields(self) -> OutputFields:
        return OutputFields(
            tools=take_tools(self.tools)[0],
            tool_choice=take_choice(self.tool_choice),
            is_parallel=self.parallel_tool_calls is not False,
            answer_format=self.answer_format,
            tool_format=self.tool_format,
            format_param="text.format",
        )

    @property
    def search_tools(self) -> dict[str, SearchTool]:
        return take_tools(self.tools)[1]

    @property
    def is_stored(self) -> bool:
        """As in OpenAI's API, a response is stored unless the request says otherwise."""
        return self.store is not False

    def check_combinations(self) -> None:
        if not self.input.items and self.previous_response_id is None:
            raise RequestError("input is missing or empty. Send a text or an array of items.", param="input")
        if self.num_logprobs is not None and self.search_tools:
            raise RequestError(
                "top_logprobs cannot be combined with tools that search. Send one of them.", param="top_logprobs"
            )
