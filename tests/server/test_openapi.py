"""GET /openapi.json: every route is in it, and every answer is what it says."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from lfm.config import ServerConfig
from lfm.server.app import V1_PREFIXES, V2_PREFIXES
from lfm.server.openapi import BOUNDS, OPERATIONS, Operation, make_document
from lfm.service.responses_store import ResponsesStore
from tests.search.indexes import search_service
from tests.server.fakes import MODEL, AppClient, chat_body

USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function_call", "call_id": "a", "name": "now", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "12:00"}]}
LOGPROBS = ["message.output_text.logprobs"]
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        chat_body(reasoning_effort="low"),
        chat_body(logprobs=True, top_logprobs=2, echo=True, n=2, max_tokens=3),
        chat_body(documents=["Hello!"]),
    ],
    "/v1/completions": [{"prompt": ["a", [1, 40]]}, {"prompt": "a", "logprobs": 2, "echo": True, "max_tokens": 3}],
    "/v1/responses": [
        {"input": [USER, CALL, RESULT], "metadata": {"a": "b"}, "reasoning": {"effort": "low"}},
        {"input": "Hi", "top_logprobs": 2, "include": LOGPROBS, "max_output_tokens": 3, "instructions": "Be brief."},
    ],
    "/v1/messages": [
        {"messages": [USER], "max_tokens": 100, "stop_sequences": ["lo"], "speed": "fast"},
        {"messages": [USER], "max_tokens": 2},
    ],
    "/v1/messages/count_tokens": [{"messages": [USER]}],
    "/v1/search": [{"query": "pump"}, {"query": "nothing like it", "external_web_access": False}],
    "/v1/tokenize": [{"prompt": "a", "return_token_strs": True}, {"messages": [USER]}],
    "/v1/detokenize": [{"tokens": [1, 40]}],
}
BODIES |= {
    f"{path}/render": bodies for path, bodies in BODIES.items() if f"{path}/render" in {o.path for o in OPERATIONS}
}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[AppClient]:
    store = ResponsesStore(tmp_path / "responses.sqlite3")
    with search_service(tmp_path / "index", {"/a.md": "A pump moves water."}) as search:
        yield AppClient(responses=store, search=search)
    store.close()


def named(operation: Operation) -> str:
    return f"{operation.method} {operation.path}"


def test_every_route_is_described_and_nothing_else(client: AppClient) -> None:
    prefixes = [*(p for p in V1_PREFIXES if p != "/v1"), *V2_PREFIXES]
    served = set()
    for route in client.app.routes:
        assert isinstance(route, Route)
        path = re.sub(r":path\}", "}", route.path)
        is_alias = any(path.startswith(f"{prefix}/") for prefix in prefixes if prefix)
        if is_alias or f"/v1{path}" in {operation.path for operation in OPERATIONS} or path == "/openapi.json":
            continue
        served |= {(method.lower(), path) for method in route.methods or () if method != "HEAD"}
    assert served == {(operation.method, operation.path) for operation in OPERATIONS}


def test_the_document_is_whole(client: AppClient) -> None:
    document = client.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    assert document == json.loads(json.dumps(make_document(MODEL, needs_key=False)))
    schemas = document["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))) == set(schemas)
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == [MODEL]
    assert schemas["ChatRequest"]["required"] == ["model", "messages"]
    operation_ids = [op["operationId"] for path in document["paths"].values() for op in path.values()]
    assert len(set(operation_ids)) == len(operation_ids)
    assert "security" not in document


def test_a_server_with_a_key_says_so() -> None:
    client = AppClient(config=ServerConfig(api_key="k"))
    assert client.get("/openapi.json").status_code == 401
    assert client.get("/openapi.json", headers={"x-api-key": "k"}).json()["security"]


def test_every_bound_belongs_to_a_field() -> None:
    fields = {name for operation in OPERATIONS if operation.request for name in operation.request.model_fields}
    assert set(BOUNDS) <= fields


def check(operation: Operation, response: Any) -> None:
    assert response.status_code == 200, response.text
    if operation.answer is not None:
        operation.answer.model_validate_json(response.content, strict=True, extra="forbid")


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o.method == "post"], ids=named)
def test_answers_are_as_described(client: AppClient, operation: Operation) -> None:
    for body in BODIES[operation.path]:
        check(operation, client.post(operation.path, {"model": MODEL, **body}))
    refused = client.post(operation.path, {"model": 5})
    assert refused.status_code == 400
    operation.error.model_validate_json(refused.content, strict=True, extra="forbid")


def test_answers_without_a_body_are_as_described(client: AppClient) -> None:
    response_id = client.post("/v1/responses", {"model": MODEL, **BODIES["/v1/responses"][0]}).json()["id"]
    without_body = [operation for operation in OPERATIONS if operation.method != "post"]
    for operation in sorted(without_body, key=lambda operation: operation.method == "delete"):
        path = operation.path.replace("{model}", MODEL).replace("{response_id}", response_id)
        check(operation, client.request(operation.method.upper(), path))
