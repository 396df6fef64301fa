"""Any JSON in any field: an answer or a 400 that names a field, never a server error; nothing is left running."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.server.refusals import CHAT_RULES
from lfm.server.schemas import ChatRequest, CompletionRequest
from tests.server.fakes import CHAT_PATH, MODEL, AppClient, chat_body

FIELDS = sorted(
    {
        *ChatRequest.model_fields,
        *CompletionRequest.model_fields,
        *CHAT_RULES.refused,
        *CHAT_RULES.without_effect,
        "anything",
    }
)
EDGES = [0, -1, 1, 2**31, 2**53, 2**63, 2**64 - 1, -(2**63), 1e308, -1e-308, 0.5, True, None, "", "\x00", "auto", MODEL]

json_values = st.recursive(
    st.sampled_from(EDGES) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]) | json_values},
        optional={"content": st.text(max_size=9) | json_values, "tool_calls": json_values, "name": json_values},
    )
    | json_values,
    max_size=3,
)


def check(client: AppClient, path: str, body: dict[str, Any]) -> None:
    try:
        content = json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        content = json.dumps(body).encode()
    response = client.request("POST", path, content=content)
    if response.status_code == 200:
        assert "error" not in response.text.rpartition("data: {")[2]
    else:
        assert response.status_code in (400, 404)
        assert response.json()["error"]["message"]
    assert not any(stream.running for stream in client.backend.streams)


@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/completions"])
@given(fields=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3), max_tokens=st.integers(1, 3))
def test_any_values_in_known_fields(path: str, fields: dict[str, Any], max_tokens: int) -> None:
    check(AppClient(), path, {**chat_body(prompt="a", max_tokens=max_tokens), **fields})


@given(messages=messages)
def test_any_messages(messages: object) -> None:
    check(AppClient(), CHAT_PATH, chat_body(messages=messages, max_tokens=2))


@given(body=st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_body(body: bytes) -> None:
    response = AppClient().request("POST", CHAT_PATH, content=body)
    assert response.status_code in (400, 404)
