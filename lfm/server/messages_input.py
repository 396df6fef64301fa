"""The bodies of Anthropic's Messages API, and how their blocks become chat messages."""

from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, ClassVar, NamedTuple

from pydantic import BeforeValidator, PlainValidator

from lfm.chat.grammar_tools import ANTHROPIC_TOOLS
from lfm.chat.json_fields import json_type, typed
from lfm.chat.messages import Message, ToolCall
from lfm.errors import RequestError
from lfm.server.input_models import SystemText, Turns
from lfm.server.output_fields import OutputFields
from lfm.server.past_searches import past_results
from lfm.server.schemas import FormatField, SamplingRequest, ToolFormatField, keep, shown
from lfm.server.search_models import MessagesWebSearch
from lfm.server.server_tools import SearchTool, take_tools
from lfm.server.tool_models import MessagesTool, MessagesToolChoice
from lfm.server.tool_turns import ToolTurns

# Claude Code's first system block. It changes with every request, so no prefix after it would ever be found again.
BILLING_HEADER = "x-anthropic-billing-header"
SEARCH_RESULTS = ("web_search_tool_result", "file_search_tool_result")
PAST_THINKING = ("thinking", "redacted_thinking")  # of other models; this one has no place for it

CHOICES = {"auto": "auto", "any": "required", "none": "none"}  # what OpenAI calls them; the fourth is a tool by name

Block = dict[str, object]


class ParsedChoice(NamedTuple):
    """A tool choice in the form of OpenAI's API, and whether the model may make several calls at once."""

    choice: object = None
    is_parallel: bool = True


def parse_choice(value: object) -> ParsedChoice:
    """Read `tool_choice`. Raises RequestError; which tools there are is not known here."""
    if value is None:
        return ParsedChoice()
    raw = typed(value, dict, "tool_choice")
    kind = typed(raw.get("type"), str, "tool_choice.type")
    where = "tool_choice.disable_parallel_tool_use"
    is_parallel = not typed(raw.get("disable_parallel_tool_use") or False, bool, where)
    if kind == "tool":
        return ParsedChoice({"type": "function", "name": raw.get("name")}, is_parallel)
    if kind not in CHOICES:
        raise RequestError(
            f"tool_choice.type={shown(kind)} is not known. Allowed: auto, any, tool, none.", param="tool_choice.type"
        )
    return ParsedChoice(CHOICES[kind], is_parallel)


def parse_system(value: object) -> str:
    """The system text: a string, or text blocks, one per line."""
    if value is None:
        return ""
    blocks = _blocks(value, "system")
    texts = [_without_billing_header(_text(block, where, "text")) for block, where in blocks]
    return "\n".join(text for text in texts if text)


def parse_turns(value: object) -> list[Message]:
    """The turns as chat messages. Raises RequestError with the path of whatever no prompt can be built from."""
    messages: list[Message] = []
    turns = ToolTurns()
    for index, item in enumerate(typed(value, list, "messages")):
        where = f"messages[{index}]"
        raw = typed(item, dict, where)
        role = typed(raw.get("role"), str, f"{where}.role")
        blocks = _blocks(raw.get("content"), f"{where}.content")
        if role == "assistant":
            messages += _assistant_turns(blocks, turns)
        elif role == "user":
            messages += _user_turns(blocks, turns)
        else:
            raise RequestError(
                f"{where}.role={role[:80]!r} is not known. Allowed: user, assistant. A system text goes into `system`.",
                param=f"{where}.role",
            )
    if not messages:
        raise RequestError("messages is empty. Send at least one message.", param="messages")
    if messages[-1].tool_calls:
        raise RequestError(
            "messages ends with a tool_use that has no result. Send its tool_result in a user message after it.",
            param="messages",
        )
    return messages


def _parse_stop_sequences(value: object) -> object:
    if value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return value
    raise RequestError(
        f"stop_sequences={shown(value)} is not valid. Allowed: an array of strings.", param="stop_sequences"
    )


class TokenCountRequest(SamplingRequest):
    """POST /v1/messages/count_tokens."""

    messages: Annotated[list[Message], PlainValidator(parse_turns, json_schema_input_type=Turns)]
    system: Annotated[str, PlainValidator(parse_system, json_schema_input_type=SystemText)] = ""
    tools: Annotated[
        object, PlainValidator(keep, json_schema_input_type=list[MessagesTool | MessagesWebSearch] | None)
    ] = None
    tool_choice: Annotated[
        ParsedChoice, PlainValidator(parse_choice, json_schema_input_type=MessagesToolChoice | None)
    ] = ParsedChoice()
    tool_format: ToolFormatField = None
    output_format: FormatField = None
    output_config: dict[str, object] | None = None

    @property
    def conversation(self) -> list[Message]:
        system = [Message(role="system", content=self.system)] if self.system else []
        return [*system, *self.messages]

    @property
    def is_prefilled(self) -> bool:
        """Whether the answer continues the last turn."""
        return self.messages[-1].role == "assistant"

    @property
    def output_fields(self) -> OutputFields:
        config_format = (self.output_config or {}).get("format")
        is_old = config_format is None
        return OutputFields(
            tools=take_tools(self.tools, syntax=ANTHROPIC_TOOLS)[0],
            tool_choice=self.tool_choice.choice,
            is_parallel=self.tool_choice.is_parallel,
            answer_format=self.output_format if is_old else config_format,
            tool_format=self.tool_format,
            tool_syntax=ANTHROPIC_TOOLS,
            format_param="output_format" if is_old else "output_config.format",
        )

    @property
    def search_tools(self) -> dict[str, SearchTool]:
        return take_tools(self.tools)[1]

    def check_combinations(self) -> None:
        fields = self.output_fields
        if self.output_format is not None and fields.format_param != "output_format":
            raise RequestError(
                "output_format and output_config.format are the same field. Send one of them.", param="output_format"
            )
        if self.is_prefilled and fields.answer_format is not None:
            raise RequestError(
                f"messages ends with a turn of the assistant, which {fields.format_param} would not hold for. "
                "Send one of them.",
                param=fields.format_param,
            )


class MessagesRequest(TokenCountRequest):
    """POST /v1/messages. `max_tokens` beyond the context is lowered to what is left: clients send their own models'."""

    stop_field: ClassVar[str] = "stop_sequences"

    max_tokens: int
    stop_sequences: Annotated[
        list[str] | None, BeforeValidator(_parse_stop_sequences, json_schema_input_type=list[str] | None)
    ] = None

    @property
    def stop_strings(self) -> Sequence[str]:
        return self.stop_sequences or ()

    @property
    def token_limit(self) -> int:
        return self.max_tokens

    @property
    def is_clamped(self) -> bool:
        return True


def _assistant_turns(blocks: Sequence[tuple[Block, str]], turns: ToolTurns) -> list[Message]:
    """One turn, or several where tools of the server ran between them."""
    messages: list[Message] = []
    own: list[tuple[Block, str]] = []
    for block, where in blocks:
        if block["type"] not in SEARCH_RESULTS:
            own.append((block, where))
            continue
        call_id = typed(block.get("tool_use_id"), str, f"{where}.tool_use_id")
        if own:
            messages.append(_assistant_turn(own, turns))
            own = []
        turns.add_result(call_id, f"{where}.tool_use_id")
        messages.append(past_results(block.get("content"), call_id=call_id))
    return [*messages, _assistant_turn(own, turns)] if own or not messages else messages


def _assistant_turn(blocks: Sequence[tuple[Block, str]], turns: ToolTurns) -> Message:
    texts, calls = [], []
    for block, where in blocks:
        kind = block["type"]
        if kind in ("tool_use", "server_tool_use"):
            turns.add_call(typed(block.get("id"), str, f"{where}.id"), f"{where}.id")
            name = typed(block.get("name"), str, f"{where}.name")
            calls.append(ToolCall(name=name, arguments=typed(block.get("input"), dict, f"{where}.input")))
        elif kind not in PAST_THINKING:
            texts.append(_text(block, where, "text, tool_use"))
    return Message(role="assistant", content="".join(texts), tool_calls=tuple(calls))


def _user_turns(blocks: Sequence[tuple[Block, str]], turns: ToolTurns) -> list[Message]:
    """Tool results become messages of their own, in front of or behind the text as they stand."""
    messages: list[Message] = []
    for are_results, group in groupby(blocks, key=lambda block: block[0]["type"] == "tool_result"):
        if are_results:
            messages += turns.in_call_order([_tool_result(block, where, turns) for block, where in group])
        else:
            text = "\n".join(_text(block, where, "text, tool_result") for block, where in group)
            messages.append(Message(role="user", content=text))
    return messages or [Message(role="user", content="")]


def _tool_result(block: Block, where: str, turns: ToolTurns) -> Message:
    call_id = typed(block.get("tool_use_id"), str, f"{where}.tool_use_id")
    turns.add_result(call_id, f"{where}.tool_use_id")
    content = block.get("content")
    parts = [] if content is None else _blocks(content, f"{where}.content")
    text = "\n".join(_text(part, part_where, "text") for part, part_where in parts)
    if block.get("is_error"):
        text = f"Error: {text}"  # the layout has no other place for the mark
    return Message(role="tool", content=text, tool_call_id=call_id)


def _blocks(value: object, where: str) -> list[tuple[Block, str]]:
    """The content blocks with their paths; a string is one text block."""
    if isinstance(value, str):
        return [({"type": "text", "text": value}, where)]
    if not isinstance(value, list):
        raise RequestError(f"{where} is {json_type(value)}. Allowed: a string or an array of blocks.", param=where)
    blocks = []
    for index, item in enumerate(value):
        block = typed(item, dict, f"{where}[{index}]")
        typed(block.get("type"), str, f"{where}[{index}].type")
        blocks.append((block, f"{where}[{index}]"))
    return blocks


def _text(block: Block, where: str, allowed: str) -> str:
    if block["type"] != "text":
        raise RequestError(
            f"{where}.type={shown(block['type'])} is not supported: this model reads text only. Allowed: {allowed}.",
            param=where,
        )
    return typed(block.get("text"), str, f"{where}.text")


def _without_billing_header(text: str) -> str:
    """That header is one line; whatever may follow it stays."""
    return text.partition("\n")[2] if text.startswith(BILLING_HEADER) else text
