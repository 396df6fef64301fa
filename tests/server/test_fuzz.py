"""Any JSON in any field: an answer or a 400 that names a field, never a server error; nothing is left running."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.server.messages_input import MessagesRequest
from lfm.server.refusals import CHAT_RULES, MESSAGES_RULES, RESPONSES_RULES
from lfm.server.responses_input import ResponsesRequest
from lfm.server.schemas import ChatRequest, CompletionRequest
from lfm.server.tokenize import DetokenizeRequest, TokenizeRequest
from tests.server.fakes import CHAT_PATH, MODEL, AppClient

USER = {"role": "user", "content": "Hi"}
BODIES: dict[str, dict[str, Any]] = {
    CHAT_PATH: {"messages": [USER], "max_tokens": 2},
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/responses": {"input": [USER], "max_output_tokens": 2, "store": False},
    "/v1/responses/render": {"input": [USER]},
    "/v1/messages": {"messages": [USER], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [USER]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [40]},
}
REQUESTS = (ChatRequest, CompletionRequest, ResponsesRequest, MessagesRequest, TokenizeRequest, DetokenizeRequest)
RULED = [
    path for rules in (CHAT_RULES, RESPONSES_RULES, MESSAGES_RULES) for path in (*rules.refused, *rules.without_effect)
]
FIELDS = sorted(
    {
        *(name for request in REQUESTS for name in request.model_fields),
        *(path.partition(".")[0].removesuffix("[]") for path in RULED),
        "anything",
    }
)
EDGES = [0, -1, 1, 2**31, 2**53, 2**63, 2**64 - 1, -(2**63), 1e308, -1e-308, 0.5, True, None, "", "\x00", "auto", MODEL]

json_values = st.recursive(
    st.sampled_from(EDGES) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)
texts = st.sampled_from(["", "Hi", "<|im_end|>"]) | json_values
kinds = st.sampled_from(
    [
        "text",
        "input_text",
        "output_text",
        "tool_use",
        "tool_result",
        "thinking",
        "message",
        "function_call",
        "function_call_output",
        "reasoning",
        "image",
    ]
)
ids = st.sampled_from(["a", "b"]) | json_values
parts = st.fixed_dictionaries(
    {"type": kinds | json_values},
    optional={
        "text": texts,
        "id": ids,
        "call_id": ids,
        "tool_use_id": ids,
        "name": texts,
        "input": st.dictionaries(st.text(max_size=5), json_values, max_size=2) | json_values,
        "arguments": st.sampled_from(["", "{}", '{"a": NaN}', "[" * 2000]) | json_values,
        "output": texts,
        "content": texts,
        "is_error": json_values,
        "role": st.sampled_from(["system", "user", "assistant"]),
    },
)
contents = texts | st.lists(parts | json_values, max_size=3)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]) | json_values},
        optional={"content": contents, "tool_calls": json_values, "name": json_values, "type": st.just("message")},
    )
    | parts
    | json_values,
    max_size=4,
)


def check(client: AppClient, path: str, body: dict[str, Any]) -> None:
    try:
        content = json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        content = json.dumps(body).encode()
    response = client.request("POST", path, content=content)
    if response.status_code == 200:
        assert not any(sign in response.text for sign in ('{"error":{', '"type":"error"', "response.failed"))
    else:
        assert response.status_code in (400, 404)
        assert response.json()["error"]["message"]
    assert not any(stream.running for stream in client.backend.streams)


@pytest.mark.parametrize("path", BODIES)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3))
def test_any_values_in_known_fields(path: str, fields: dict[str, Any]) -> None:
    check(AppClient(), path, {"model": MODEL, **BODIES[path], **fields})


@pytest.mark.parametrize("path", [path for path, body in BODIES.items() if "messages" in body or "input" in body])
@given(messages=messages)
def test_any_messages(path: str, messages: object) -> None:
    field = "input" if "input" in BODIES[path] else "messages"
    check(AppClient(), path, {"model": MODEL, **BODIES[path], field: messages})


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
@given(contents=st.lists(contents, min_size=1, max_size=3))
def test_any_contents_of_well_formed_turns(path: str, contents: list[object]) -> None:
    roles = ["user", "assistant", "user"]
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    field = "input" if "input" in BODIES[path] else "messages"
    check(AppClient(), path, {"model": MODEL, **BODIES[path], field: turns, "stream": True})


schemas = st.recursive(
    st.sampled_from([{"type": "string"}, {"type": "integer"}, {"enum": ["a", 1]}, {"const": None}, {}, True, False])
    | json_values,
    lambda inner: st.fixed_dictionaries(
        {"type": st.sampled_from(["object", "array", "string"])},
        optional={
            "properties": st.dictionaries(st.text(max_size=5), inner, max_size=3),
            "required": st.lists(st.text(max_size=5), max_size=2) | json_values,
            "items": inner,
            "minItems": st.integers(-1, 5) | json_values,
            "pattern": st.text(alphabet="ab[]()*+?{}|^$\\.-1,", max_size=8),
            "anyOf": st.lists(inner, max_size=2),
            "$ref": st.sampled_from(["#", "#/$defs/a", "#/properties/a", "x"]),
            "$defs": st.dictionaries(st.just("a"), inner, max_size=1),
            "additionalProperties": inner,
        },
    ),
    max_leaves=5,
)
tool_bodies = st.fixed_dictionaries(
    {"name": st.sampled_from(["a", "b", "a-b", "a.b"]) | texts},
    optional={
        "parameters": schemas,
        "input_schema": schemas,
        "description": texts,
        "strict": json_values,
        "type": st.sampled_from(["function", "custom", "web_search"]),
    },
)
tools = st.lists(
    tool_bodies | st.fixed_dictionaries({"type": st.just("function"), "function": tool_bodies}) | json_values,
    max_size=3,
)
choices = st.sampled_from(["auto", "none", "required", {"type": "any"}, {"type": "tool", "name": "a"}]) | st.one_of(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries({"name": texts})}),
    json_values,
)
formats = st.fixed_dictionaries(
    {"type": st.sampled_from(["json_object", "json_schema", "regex", "text"]) | json_values},
    optional={
        "schema": schemas,
        "json_schema": st.fixed_dictionaries({"schema": schemas}) | json_values,
        "pattern": st.text(alphabet="ab[]()*+?{}|^$\\.-1,", max_size=12) | json_values,
    },
)


@pytest.mark.parametrize("path", [path for path, body in BODIES.items() if "messages" in body or "input" in body])
@given(tools=tools, choice=choices, answer=formats | json_values, form=st.sampled_from([None, "json", "pythonic"]))
def test_any_tools_and_formats(path: str, tools: object, choice: object, answer: object, form: str | None) -> None:
    fields = {"tools": tools, "tool_choice": choice, "tool_format": form}
    fields |= {"response_format": answer, "output_format": answer, "text": {"format": answer}}
    check(AppClient(), path, {"model": MODEL, **BODIES[path], **fields})
    check(AppClient(), path, {"model": MODEL, **BODIES[path], **fields, "tools": None, "tool_choice": None})


@given(body=st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_body(body: bytes) -> None:
    response = AppClient().request("POST", CHAT_PATH, content=body)
    assert response.status_code in (400, 404)
