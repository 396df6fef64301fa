"""The bodies of all answers, for the OpenAPI document. Answers are not made of these, but tests hold them to it."""

from typing import Literal

from pydantic import BaseModel, Field

from lfm.server.search_answer_models import (
    Annotation,
    FileSearchItem,
    ResultCitation,
    SearchCount,
    SearchResultBlock,
    SearchUseBlock,
    WebSearchItem,
)

JsonObject = dict[str, object]
JsonArray = list[object]


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorObject


class AnthropicErrorObject(BaseModel):
    type: str
    message: str


class AnthropicError(BaseModel):
    type: Literal["error"]
    error: AnthropicErrorObject
    request_id: str


class FieldWarning(BaseModel):
    """A field of the request that was accepted and changed nothing."""

    message: str


class CachedTokens(BaseModel):
    cached_tokens: int


class ChatUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(BaseModel):
    token: str
    logprob: float | None
    bytes: list[int]


class TokenLogprobEntry(TopLogprob):
    top_logprobs: list[TopLogprob]


class TokenArrays(BaseModel):
    """Together's form, one entry per token."""

    tokens: list[str]
    token_ids: list[int]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]


class ChatLogprobs(TokenArrays):
    content: list[TokenLogprobEntry]
    refusal: None


class CompletionLogprobs(TokenArrays):
    text_offset: list[int]


class EchoedPrompt(BaseModel):
    text: str
    logprobs: TokenArrays | None


class FunctionCall(BaseModel):
    """`arguments` is a JSON object, written as a string; of a call that max_tokens cut, its beginning."""

    name: str
    arguments: str


class ChatToolCall(BaseModel):
    """`index` is for Together's clients."""

    index: int | None = None
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatAnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ChatToolCall] = Field(default_factory=list)
    annotations: list[Annotation] = Field(default_factory=list)


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    seed: int


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    prompt: list[EchoedPrompt]
    warnings: list[FieldWarning] = Field(default_factory=list)


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    seed: int


class CompletionAnswer(BaseModel):
    id: str
    object: Literal["text_completion", "text.completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: ChatUsage
    prompt: list[EchoedPrompt]
    warnings: list[FieldWarning] = Field(default_factory=list)


class OutputText(BaseModel):
    type: Literal["output_text"]
    text: str
    annotations: JsonArray
    logprobs: list[TokenLogprobEntry] = Field(default_factory=list)


class InputText(BaseModel):
    type: Literal["input_text"]
    text: str


class MessageItem(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText | InputText]


class FunctionCallItem(BaseModel):
    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class FunctionCallOutputItem(BaseModel):
    id: str
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    status: Literal["completed"]


class InputTokensDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class ResponseError(BaseModel):
    code: str
    message: str


class ReasoningConfig(BaseModel):
    effort: None
    summary: None


class TextConfig(BaseModel):
    """The format as the request had it."""

    format: JsonObject


class ResponseAnswer(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[MessageItem | FunctionCallItem | WebSearchItem | FileSearchItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningConfig
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: TextConfig
    tool_choice: str | JsonObject
    tools: JsonArray
    top_logprobs: int
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    warnings: list[FieldWarning] = Field(default_factory=list)


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItemsPage(BaseModel):
    object: Literal["list"]
    data: list[MessageItem | FunctionCallItem | FunctionCallOutputItem | WebSearchItem | FileSearchItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class TextBlock(BaseModel):
    type: Literal["text"]
    text: str
    citations: list[ResultCitation] = Field(default_factory=list)


class ToolUseBlock(BaseModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: JsonObject


class MessageUsage(BaseModel):
    """`input_tokens` are those that were not found in the cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    server_tool_use: SearchCount | None = None


class MessageAnswer(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ToolUseBlock | SearchUseBlock | SearchResultBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
    stop_sequence: str | None
    usage: MessageUsage
    warnings: list[FieldWarning] = Field(default_factory=list)


class TokenCountAnswer(BaseModel):
    input_tokens: int


class RenderedPrompt(BaseModel):
    text: str
    token_ids: list[int]
    num_tokens: int


class RenderAnswer(BaseModel):
    object: Literal["rendered_prompt"]
    model: str
    n: int
    prompts: list[RenderedPrompt]
    sampling: JsonObject
    stop: list[str]
    warnings: list[FieldWarning]


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(BaseModel):
    prompt: str


class ModelItem(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: Literal["chat"]
    display_name: str
    organization: str
    context_length: int
    pricing: dict[str, float]
    default_sampling: dict[str, float]
    default_sampling_origin: str


class ModelListAnswer(BaseModel):
    object: Literal["list"]
    data: list[ModelItem]


class StatusAnswer(BaseModel):
    status: Literal["ok"]
