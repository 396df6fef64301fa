"""What requests may hold in the fields that are read by hand, for the OpenAPI document; they validate nothing."""

from typing import Literal

from pydantic import BaseModel


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    """`arguments` is a JSON object, written as a string."""

    name: str
    arguments: str


class ChatToolCall(BaseModel):
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ChatMessage(BaseModel):
    """Of role tool: the result of a call. `content` may be null for the assistant only."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ChatToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class RequestDocument(BaseModel):
    """A document to answer from. `content` is another name of `text`."""

    text: str
    title: str | None = None
    url: str | None = None


class InputPart(BaseModel):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(BaseModel):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputPart]


class InputFunctionCall(BaseModel):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputFunctionCallOutput(BaseModel):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputPart]


class InputReasoning(BaseModel):
    """Reasoning of another model; left out of the prompt."""

    type: Literal["reasoning"]


ResponsesInput = str | list[InputMessage | InputFunctionCall | InputFunctionCallOutput | InputReasoning] | None


class ToolUse(BaseModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, object]


class ToolResult(BaseModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextPart] | None = None
    is_error: bool | None = None


class PastThinking(BaseModel):
    """Thinking of another model; left out of the prompt."""

    type: Literal["thinking", "redacted_thinking"]


class UserTurn(BaseModel):
    role: Literal["user"]
    content: str | list[TextPart | ToolResult]


class AssistantTurn(BaseModel):
    role: Literal["assistant"]
    content: str | list[TextPart | ToolUse | PastThinking]


Turns = list[UserTurn | AssistantTurn]
SystemText = str | list[TextPart] | None
