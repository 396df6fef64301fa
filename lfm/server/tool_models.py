"""What requests may hold in the fields of tools and answer formats, for the OpenAPI document; they validate nothing."""

from typing import Literal

from pydantic import BaseModel, Field

JsonSchema = dict[str, object]
ToolFormat = Literal["pythonic", "json"]


class FunctionDefinition(BaseModel):
    """`parameters` is a JSON Schema of an object. Arguments always keep to it, `strict` or not."""

    name: str
    description: str | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class ChatTool(BaseModel):
    type: Literal["function"]
    function: FunctionDefinition


class ResponsesTool(FunctionDefinition):
    type: Literal["function"]


class MessagesTool(BaseModel):
    name: str
    description: str | None = None
    input_schema: JsonSchema
    type: Literal["custom"] | None = None


class NamedFunction(BaseModel):
    name: str


class ChosenFunction(BaseModel):
    """One function, in the form of chat completions or in that of responses."""

    type: Literal["function"]
    function: NamedFunction | None = None
    name: str | None = None


class AllowedTools(BaseModel):
    mode: Literal["auto", "required"]
    tools: list[ChosenFunction]


class ChosenTools(BaseModel):
    """Some of the tools, in the form of chat completions or in that of responses."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[ChosenFunction] | None = None


ToolChoiceField = Literal["none", "auto", "required"] | ChosenFunction | ChosenTools


class MessagesToolChoice(BaseModel):
    """`name` with type tool only."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class NamedSchema(BaseModel):
    """In the form of chat completions."""

    name: str | None = None
    description: str | None = None
    definition: JsonSchema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class AnswerFormatField(BaseModel):
    """`json_schema` is where chat completions have the schema; responses and messages have it in `schema`.

    `pattern` belongs to type regex, `grammar` (in Lark's form) to type grammar.
    """

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: NamedSchema | None = None
    name: str | None = None
    definition: JsonSchema | None = Field(default=None, alias="schema")
    strict: bool | None = None
    pattern: str | None = None
    grammar: str | None = None
