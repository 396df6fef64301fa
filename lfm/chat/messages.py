"""The messages of a conversation, and the checks that every front end needs before a prompt is built from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lfm.chat.json_fields import json_type, optional_text, parse_arguments, typed
from lfm.errors import RequestError
from lfm.protocol import MAX_MESSAGES

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentPart:
    """One part of a message's content. Only type "text" is readable; `check_messages` refuses the others by name."""

    type: str = "text"
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the assistant made in an earlier turn; `arguments` holds JSON values.

    `id` is what results refer to it by. It is no part of what the model reads.
    """

    name: str
    arguments: Mapping[str, object]
    id: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. `tool_call_id` and `name` are kept for front ends: LFM2's chat layout has no place for them."""

    role: str
    content: str | Sequence[ContentPart] | None = None
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one text: parts joined without a separator, as the chat template does; null is empty."""
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def check_messages(messages: Sequence[Message]) -> None:
    """Raise RequestError whose `param` names the first thing that no prompt can be built from."""
    if not messages:
        raise RequestError("messages is empty. Send at least one message.", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"messages has {len(messages)} entries. Allowed: 1 to {MAX_MESSAGES}.", param="messages")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")


def _check_message(message: Message, where: str) -> None:
    if message.role not in ROLES:
        raise RequestError(
            f"{where}.role={message.role!r} is not known. Allowed: {', '.join(ROLES)}.", param=f"{where}.role"
        )
    if message.content is None and message.role != "assistant":
        raise RequestError(
            f"{where}.content is missing or null. Send a text, if only an empty one.", param=f"{where}.content"
        )
    if message.tool_calls and message.role != "assistant":
        raise RequestError(
            f"{where}.tool_calls belongs to role assistant, not {message.role}.", param=f"{where}.tool_calls"
        )
    if message.content is None or isinstance(message.content, str):
        return
    for index, part in enumerate(message.content):
        if part.type != "text":
            raise RequestError(
                f"{where}.content[{index}] is of type {part.type!r}, but this model reads text only. Allowed: text.",
                param=f"{where}.content[{index}]",
            )


def parse_messages(value: object, *, param: str = "messages") -> list[Message]:
    """Read the `messages` array of a chat request from decoded JSON.

    Unknown keys are tolerated. Raises RequestError with the path of a value of the wrong type; what the values mean is
    checked by `check_messages`.
    """
    return [_parse_message(item, f"{param}[{index}]") for index, item in enumerate(typed(value, list, param))]


def _parse_message(value: object, where: str) -> Message:
    raw = typed(value, dict, where)
    return Message(
        role=typed(raw.get("role"), str, f"{where}.role"),
        content=_parse_content(raw.get("content"), f"{where}.content"),
        tool_calls=tuple(
            _parse_tool_call(call, f"{where}.tool_calls[{index}]")
            for index, call in enumerate(typed(raw.get("tool_calls") or [], list, f"{where}.tool_calls"))
        ),
        tool_call_id=optional_text(raw.get("tool_call_id"), f"{where}.tool_call_id"),
        name=optional_text(raw.get("name"), f"{where}.name"),
    )


def _parse_content(value: object, where: str) -> str | list[ContentPart] | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RequestError(f"{where} is {json_type(value)}. Allowed: a string, an array of parts or null.", param=where)
    parts = []
    for index, item in enumerate(value):
        raw = typed(item, dict, f"{where}[{index}]")
        kind = typed(raw.get("type"), str, f"{where}[{index}].type")
        text = typed(raw.get("text"), str, f"{where}[{index}].text") if kind == "text" else ""
        parts.append(ContentPart(type=kind, text=text))
    return parts


def _parse_tool_call(value: object, where: str) -> ToolCall:
    raw = typed(value, dict, where)
    function = typed(raw.get("function"), dict, f"{where}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_arguments(arguments, f"{where}.function.arguments")
    return ToolCall(
        name=typed(function.get("name"), str, f"{where}.function.name"),
        arguments=typed(arguments, dict, f"{where}.function.arguments"),
        id=optional_text(raw.get("id"), f"{where}.id"),
    )
