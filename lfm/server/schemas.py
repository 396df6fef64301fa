"""The request bodies as pydantic models: types are strict, null means "not given", unknown fields are tolerated.

Only what concerns HTTP is checked here. The bounds of sampling values belong to the engine's boundary, where no front
end can get past them; what the messages mean belongs to `lfm.chat`.
"""

import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from lfm.chat.defaults import RequestedSampling
from lfm.chat.messages import Message, parse_messages
from lfm.errors import RequestError
from lfm.protocol import MAX_PROMPTS, MAX_TOP_LOGPROBS
from lfm.search.packing import SourceDocument, parse_documents
from lfm.server.input_models import ChatMessage, RequestDocument
from lfm.server.output_fields import OutputFields
from lfm.server.search_models import WebSearchOptions
from lfm.server.server_tools import SearchTool, web_search_options, with_tool
from lfm.server.tool_models import AnswerFormatField, ChatTool, ToolChoiceField, ToolFormat
from lfm.server.tool_turns import pair_results

_R = TypeVar("_R", bound=BaseModel)


def _parse_stop(value: object) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise RequestError(f"stop={shown(value)} is not valid. Allowed: a string or an array of strings.", param="stop")


def _parse_logprobs(value: object) -> bool | int | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and 0 <= value <= MAX_TOP_LOGPROBS:
        return value
    raise RequestError(
        f"logprobs={shown(value)} is not valid. Allowed: true, false, or a number of alternatives from 0 to "
        f"{MAX_TOP_LOGPROBS}.",
        param="logprobs",
    )


def _parse_prompts(value: object) -> list[str | list[int]]:
    """A text, ids, or a list of either; always returned as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if _is_ids(value):
        return [value]  # type: ignore[list-item]  # _is_ids has looked
    if isinstance(value, list) and value and all(isinstance(item, str) or _is_ids(item) for item in value):
        if len(value) > MAX_PROMPTS:
            raise RequestError(f"prompt has {len(value)} entries. Allowed: 1 to {MAX_PROMPTS}.", param="prompt")
        return value
    raise RequestError(
        f"prompt={shown(value)} is not valid. Allowed: a text, an array of texts, an array of token ids, or an array "
        "of such arrays, none of them empty.",
        param="prompt",
    )


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _check_logit_bias(value: dict[str, float] | None) -> dict[str, float] | None:
    for key in value or {}:
        if not re.fullmatch(r"[0-9]{1,9}", key):
            raise RequestError(
                f"logit_bias has the key {shown(key)}. Allowed: token ids, written as decimal numbers.",
                param="logit_bias",
            )
    return value


def _check_top_logprobs(value: int | None) -> int | None:
    if value is not None and not 0 <= value <= MAX_TOP_LOGPROBS:
        raise RequestError(
            f"top_logprobs={value} is out of range. Allowed: 0 to {MAX_TOP_LOGPROBS}.", param="top_logprobs"
        )
    return value


def _parse_documents(value: object) -> list[SourceDocument]:
    return [] if value is None else parse_documents(value)


def _parse_web_search(value: object) -> SearchTool | None:
    return None if value is None else web_search_options(value)


def _check_document_tokens(value: int | None) -> int | None:
    if value is not None and value < 1:
        raise RequestError(
            f"max_document_tokens={value} is out of range. Allowed: 1 or more.", param="max_document_tokens"
        )
    return value


def parse_chat(value: object) -> list[Message]:
    """The messages of a chat request, its tool results in the order of their calls."""
    return pair_results(parse_messages(value))


def keep(value: object) -> object:
    """Leave a field as it is, for a reader that knows more of the request."""
    return value


StopField = Annotated[list[str] | None, BeforeValidator(_parse_stop, json_schema_input_type=str | list[str] | None)]
# Fields that `lfm.server.constraints` reads, with the types that the OpenAPI document tells.
ToolsField = Annotated[object, PlainValidator(keep, json_schema_input_type=list[ChatTool] | None)]
ChoiceField = Annotated[object, PlainValidator(keep, json_schema_input_type=ToolChoiceField | None)]
FormatField = Annotated[object, PlainValidator(keep, json_schema_input_type=AnswerFormatField | None)]
ToolFormatField = Annotated[object, PlainValidator(keep, json_schema_input_type=ToolFormat | None)]
TopLogprobsField = Annotated[int | None, AfterValidator(_check_top_logprobs)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingRequest(BaseModel):
    """What all API families have in common, and in which ways they may differ."""

    model_config = ConfigDict(strict=True, frozen=True, arbitrary_types_allowed=True)

    model: str
    min_tokens: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, AfterValidator(_check_logit_bias)] = None
    ignore_eos: bool | None = None
    stream: bool | None = None

    stop_field: ClassVar[str] = "stop"

    @property
    def num_choices(self) -> int:
        return 1

    @property
    def stop_strings(self) -> Sequence[str]:
        return ()

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report per token; None: no logprobs."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        return None

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate; None: all that is left of the context."""
        return None

    @property
    def max_tokens_field(self) -> str:
        """The name under which the client gave its limit: errors must name that one."""
        return "max_tokens"

    @property
    def is_clamped(self) -> bool:
        """Whether a limit beyond the context is lowered to what is left of it, not refused."""
        return False

    @property
    def includes_usage(self) -> bool:
        return False

    @property
    def runs_usage(self) -> bool:
        """Whether every chunk of a stream says what was used up to it."""
        return False

    def requested_sampling(self) -> RequestedSampling:
        return RequestedSampling(
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=None if self.logit_bias is None else {int(key): bias for key, bias in self.logit_bias.items()},
            seed=self.seed,
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
        )

    def check_combinations(self) -> None:
        """Raises RequestError for fields that contradict each other."""


class GenerationRequest(SamplingRequest):
    """What chat and completions have in common."""

    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: StopField = None
    logprobs: Annotated[
        bool | int | None, PlainValidator(_parse_logprobs, json_schema_input_type=bool | int | None)
    ] = None
    top_logprobs: TopLogprobsField = None
    echo: bool | None = None
    stream_options: StreamOptions | None = None
    context_length_exceeded_behavior: Literal["error", "truncate"] | None = None
    user: str | None = None

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def stop_strings(self) -> Sequence[str]:
        return self.stop or ()

    @property
    def num_logprobs(self) -> int | None:
        """From OpenAI's pair of fields or Together's number."""
        if self.logprobs is None or self.logprobs is False:
            return None
        return (self.top_logprobs or 0) if self.logprobs is True else max(self.logprobs, self.top_logprobs or 0)

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.num_logprobs if self.echo else None

    @property
    def max_tokens_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def is_clamped(self) -> bool:
        return self.context_length_exceeded_behavior == "truncate"

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def runs_usage(self) -> bool:
        return self.includes_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def check_combinations(self) -> None:
        if self.top_logprobs and (self.logprobs is None or self.logprobs is False):
            raise RequestError(
                f"top_logprobs={self.top_logprobs} needs logprobs=true. Set it, or leave top_logprobs out.",
                param="top_logprobs",
            )
        if None not in (self.max_tokens, limit := self.max_completion_tokens) and self.max_tokens != limit:
            raise RequestError(
                f"max_tokens={self.max_tokens} and max_completion_tokens={limit} differ. Send one of them.",
                param="max_completion_tokens",
            )


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], PlainValidator(parse_chat, json_schema_input_type=list[ChatMessage])]
    tools: ToolsField = None
    tool_choice: ChoiceField = None
    parallel_tool_calls: bool | None = None
    tool_format: ToolFormatField = None
    response_format: FormatField = None
    documents: Annotated[
        list[SourceDocument],
        PlainValidator(_parse_documents, json_schema_input_type=list[str | RequestDocument] | None),
    ] = Field(default_factory=list)
    max_document_tokens: Annotated[int | None, AfterValidator(_check_document_tokens)] = None
    web_search_options: Annotated[
        SearchTool | None, PlainValidator(_parse_web_search, json_schema_input_type=WebSearchOptions | None)
    ] = None

    @property
    def output_fields(self) -> OutputFields:
        search = self.web_search_options
        return OutputFields(
            tools=self.tools if search is None else with_tool(self.tools, search),
            tool_choice=self.tool_choice,
            is_parallel=self.parallel_tool_calls is not False,
            answer_format=self.response_format,
            tool_format=self.tool_format,
        )

    @property
    def search_tools(self) -> dict[str, SearchTool]:
        search = self.web_search_options
        return {} if search is None else {search.name: search}

    def check_combinations(self) -> None:
        super().check_combinations()
        if self.search_tools and self.num_choices != 1:
            raise RequestError(f"n={self.n} cannot be combined with web_search_options. Allowed: 1.", param="n")
        if self.search_tools and self.num_logprobs is not None:
            raise RequestError(
                "logprobs cannot be combined with web_search_options. Send one of them.", param="logprobs"
            )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. Each prompt is a text or token ids."""

    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(_parse_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    response_format: FormatField = None

    @property
    def output_fields(self) -> OutputFields:
        return OutputFields(answer_format=self.response_format)


EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "a smaller integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
}


def parse_request(kind: type[_R], body: dict[str, object]) -> _R:
    """Validate a body. Raises RequestError that names the first wrong field, what was given and what is allowed."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    # A part of the path may be a key of the client's own, of any length.
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        raise RequestError(f"{path} is missing. Send it.", param=path)
    expected = (
        first["ctx"]["expected"] if first["type"] == "literal_error" else EXPECTED.get(first["type"], first["msg"])
    )
    raise RequestError(f"{path}={shown(first['input'])} is not valid. Allowed: {expected}.", param=path)


def shown(value: object) -> str:
    """A value as a short piece of an error message; of arrays and objects only their kind."""
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
