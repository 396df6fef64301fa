"""GET /openapi.json: this server's own document, made from the models of its requests and answers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.types import Receive, Scope, Send

import lfm
from lfm import protocol
from lfm.server import answer_models as answers
from lfm.server.asgi import send_bytes
from lfm.server.messages_input import MessagesRequest, TokenCountRequest
from lfm.server.responses_input import ResponsesRequest
from lfm.server.schemas import ChatRequest, CompletionRequest
from lfm.server.search import SearchRequest, SearchResults
from lfm.server.state import AppState
from lfm.server.tokenize import DetokenizeRequest, TokenizeRequest

Json = dict[str, object]

TEXT: Json = {"type": "string", "minLength": 1}
EVENT: Json = {  # of a stream; `data` is JSON, or [DONE] at the end
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
REF = "#/components/schemas/{model}"
DESCRIPTION = (
    "LFM2 behind the APIs of OpenAI, Together and Anthropic. Unknown fields are tolerated; fields that ask for "
    "something which this server cannot do are refused by name."
)


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `answer` None: plain text."""

    method: Literal["get", "post", "delete"]
    path: str
    summary: str
    answer: type[BaseModel] | None
    request: type[BaseModel] | None = None
    is_streamed: bool = False  # with `stream` the answer is an event stream
    error: type[BaseModel] = answers.Error
    query: Mapping[str, Json] = field(default_factory=dict)


PAGE_QUERY: Mapping[str, Json] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 100},
    "order": {"enum": ["asc", "desc"]},
    "after": {"type": "string"},
}

# fmt: off
OPERATIONS = (
    Operation("get", "/livez", "Whether the process answers", answers.StatusAnswer),
    Operation("get", "/readyz", "Whether the model is loaded and makes progress", answers.StatusAnswer),
    Operation("get", "/health", "The same as /readyz", answers.StatusAnswer),
    Operation("get", "/metrics", "Prometheus metrics", None),
    Operation("get", "/v1/models", "The served model", answers.ModelListAnswer),
    Operation("get", "/v1/models/{model}", "One model", answers.ModelItem),
    Operation("post", "/v1/chat/completions", "Answer a conversation", answers.ChatAnswer, ChatRequest, True),
    Operation("post", "/v1/completions", "Continue a text or ids", answers.CompletionAnswer, CompletionRequest, True),
    Operation("post", "/v1/responses", "Answer items", answers.ResponseAnswer, ResponsesRequest, True),
    Operation("get", "/v1/responses/{response_id}", "A stored response", answers.ResponseAnswer),
    Operation("delete", "/v1/responses/{response_id}", "Forget a stored response", answers.DeletedResponse),
    Operation("get", "/v1/responses/{response_id}/input_items", "What a stored response answered",
              answers.InputItemsPage, query=PAGE_QUERY),
    Operation("post", "/v1/messages", "Answer a conversation in Anthropic's form", answers.MessageAnswer,
              MessagesRequest, True, answers.AnthropicError),
    Operation("post", "/v1/messages/count_tokens", "The length of the prompt", answers.TokenCountAnswer,
              TokenCountRequest, error=answers.AnthropicError),
    Operation("post", "/v1/chat/completions/render", "The prompt of a request", answers.RenderAnswer, ChatRequest),
    Operation("post", "/v1/completions/render", "The prompts of a request", answers.RenderAnswer, CompletionRequest),
    Operation("post", "/v1/responses/render", "The prompt of a request", answers.RenderAnswer, ResponsesRequest),
    Operation("post", "/v1/messages/render", "The prompt of a request", answers.RenderAnswer, MessagesRequest,
              error=answers.AnthropicError),
    Operation("post", "/v1/search", "Results of a web or document search", SearchResults, SearchRequest),
    Operation("post", "/v1/tokenize", "A text or a conversation as ids", answers.TokenizeAnswer, TokenizeRequest),
    Operation("post", "/v1/detokenize", "Ids as text", answers.DetokenizeAnswer, DetokenizeRequest),
)
# fmt: on

# The bounds that the engine checks, for readers of the document.
BOUNDS: Mapping[str, Json] = {
    "n": {"minimum": 1, "maximum": protocol.MAX_N},
    "seed": {"minimum": protocol.INT64_MIN, "maximum": protocol.INT64_MAX},
    "max_tokens": {"minimum": 1},
    "max_completion_tokens": {"minimum": 1},
    "max_output_tokens": {"minimum": 1},
    "min_tokens": {"minimum": 0},
    "temperature": {"minimum": 0, "maximum": protocol.MAX_TEMPERATURE},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "min_p": {"minimum": 0, "maximum": 1},
    "top_k": {"minimum": 0},
    "repetition_penalty": {"minimum": protocol.MIN_REPETITION_PENALTY, "maximum": protocol.MAX_REPETITION_PENALTY},
    "presence_penalty": {"minimum": -protocol.MAX_PRESENCE_FREQUENCY, "maximum": protocol.MAX_PRESENCE_FREQUENCY},
    "frequency_penalty": {"minimum": -protocol.MAX_PRESENCE_FREQUENCY, "maximum": protocol.MAX_PRESENCE_FREQUENCY},
    "top_logprobs": {"minimum": 0, "maximum": protocol.MAX_TOP_LOGPROBS},
    "logit_bias": {"maxProperties": protocol.MAX_LOGIT_BIAS, "propertyNames": {"pattern": "^[0-9]{1,9}$"}},
    "messages": {"minItems": 1, "maxItems": protocol.MAX_MESSAGES},
}


class OpenApi:
    """The document is made when it is first asked for."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._document: bytes | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._document is None:
            needs_key = self._state.config.api_key is not None
            self._document = orjson.dumps(make_document(self._state.model_name, needs_key=needs_key))
        await send_bytes(send, self._document)


def make_document(model_name: str, *, needs_key: bool) -> Json:
    """The OpenAPI 3.1 document of a server of one model."""
    refs, schemas = _schemas()
    for request in {operation.request for operation in OPERATIONS if operation.request is not None}:
        _add_bounds(schemas[request.__name__], model_name)
    paths: dict[str, Json] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation, refs, model_name=model_name)
    document: Json = {
        "openapi": "3.1.0",
        "info": {"title": "lfm", "version": lfm.__version__, "description": DESCRIPTION},
        "paths": paths,
        "components": {
            "schemas": _reachable(schemas, paths),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }
    return document | {"security": [{"bearer": []}, {"x-api-key": []}]} if needs_key else document


def _schemas() -> tuple[dict[type[BaseModel], object], dict[str, Json]]:
    """The reference to each model, and all definitions by name."""
    models: dict[type[BaseModel], None] = {}
    for operation in OPERATIONS:
        models |= dict.fromkeys(m for m in (operation.request, operation.answer, operation.error) if m is not None)
    refs, definitions = models_json_schema([(model, "validation") for model in models], ref_template=REF)
    return {model: refs[model, "validation"] for model in models}, definitions["$defs"]


def _reachable(schemas: dict[str, Json], paths: Mapping[str, Json]) -> dict[str, Json]:
    """pydantic also defines the types that our own readers make of a request; nothing refers to those."""

    def names_in(value: object) -> set[bytes]:
        return set(re.findall(rb'/schemas/(\w+)"', orjson.dumps(value)))

    used: set[bytes] = set()
    found = names_in(paths)
    while found:
        used |= found
        found = {name for known in found for name in names_in(schemas[known.decode()])} - used
    return {name: schema for name, schema in schemas.items() if name.encode() in used}


def _describe(operation: Operation, refs: Mapping[type[BaseModel], object], *, model_name: str) -> Json:
    content: Json = {"text/plain": {"schema": {"type": "string"}}}
    if operation.answer is not None:
        content = {"application/json": {"schema": refs[operation.answer]}}
    if operation.is_streamed:
        content["text/event-stream"] = {"schema": EVENT}
    error = {"application/json": {"schema": refs[operation.error]}}
    described: Json = {
        "summary": operation.summary,
        "operationId": re.sub(r"[^a-z]+", "_", f"{operation.method}{operation.path}".removesuffix("}")),
        "responses": {
            "200": {"description": "Done", "content": content},
            "4XX": {"description": "The request is wrong; the message says what to do", "content": error},
            "5XX": {"description": "Overloaded, loading or our fault", "content": error},
        },
    }
    names = re.findall(r"\{(\w+)\}", operation.path)
    parameters: list[Json] = [
        {"name": name, "in": "path", "required": True, "schema": {"enum": [model_name]} if name == "model" else TEXT}
        for name in names
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]
    if parameters:
        described["parameters"] = parameters
    if operation.request is not None:
        body = {"application/json": {"schema": refs[operation.request]}}
        described["requestBody"] = {"required": True, "content": body}
    return described


def _add_bounds(schema: Json, model_name: str) -> None:
    properties = schema["properties"]
    assert isinstance(properties, dict), "a request is an object"
    for name, property_schema in properties.items():
        for branch in property_schema.get("anyOf", [property_schema]):
            if branch.get("type") != "null":
                branch.update({"enum": [model_name]} if name == "model" else BOUNDS.get(name, {}))
