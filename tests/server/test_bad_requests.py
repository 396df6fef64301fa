"""What bad input gets: a status that says whose fault it is, the field's name, and nothing submitted."""

import asyncio
import json
from typing import Any

import pytest

from lfm.errors import OverloadedError, RequestError
from lfm.protocol import MAX_BODY_BYTES, MAX_N, MAX_PROMPTS
from tests.server.fakes import (
    CHAT_PATH,
    MAX_MODEL_LEN,
    MODEL,
    AppClient,
    FakeBackend,
    chat_body,
    engine_info,
    http_scope,
    make_app,
)


@pytest.fixture
def client() -> AppClient:
    return AppClient()


def error_of(response: Any, *, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]
    assert len(error["message"]) < 500
    return error


USER = {"role": "user", "content": "Hi"}

WRONG_FIELDS = [
    # param of the error, fields
    ("messages", {"messages": []}),
    ("messages", {"messages": None}),
    ("messages", {"messages": "Hi"}),
    ("messages", {"messages": [USER] * 4097}),
    ("messages[0]", {"messages": ["Hi"]}),
    ("messages[0].role", {"messages": [{"content": "Hi"}]}),
    ("messages[0].role", {"messages": [{"role": "wizard", "content": "Hi"}]}),
    ("messages[1].content", {"messages": [USER, {"role": "user", "content": None}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 3}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
    ("messages[0].content[0].text", {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}),
    ("messages[0].tool_calls", {"messages": [{"role": "assistant", "tool_calls": 5}]}),
    ("model", {"model": 5}),
    ("model", {"model": None}),
    ("n", {"n": 0}),
    ("n", {"n": -1}),
    ("n", {"n": MAX_N + 1}),
    ("n", {"n": 10**18}),
    ("n", {"n": 1.5}),
    ("n", {"n": True}),
    ("seed", {"seed": 2**63}),
    ("seed", {"seed": 10**30}),
    ("seed", {"seed": "1"}),
    ("max_tokens", {"max_tokens": "5"}),
    ("max_tokens", {"max_tokens": 5.5}),
    ("max_completion_tokens", {"max_completion_tokens": []}),
    ("max_completion_tokens", {"max_completion_tokens": 5, "max_tokens": 6}),
    ("min_tokens", {"min_tokens": {}}),
    ("temperature", {"temperature": "hot"}),
    ("temperature", {"temperature": True}),
    ("top_p", {"top_p": [1]}),
    ("top_k", {"top_k": 1.5}),
    ("min_p", {"min_p": "0"}),
    ("repetition_penalty", {"repetition_penalty": {}}),
    ("presence_penalty", {"presence_penalty": "x"}),
    ("frequency_penalty", {"frequency_penalty": False}),
    ("logit_bias", {"logit_bias": [1]}),
    ("logit_bias", {"logit_bias": {"hello": 1}}),
    ("logit_bias", {"logit_bias": {"-1": 1}}),
    ("logit_bias", {"logit_bias": {"9" * 5000: 1}}),
    ("logit_bias", {"logit_bias": {"\u0661": 1}}),
    ("logit_bias.5", {"logit_bias": {"5": "much"}}),
    ("logit_bias." + "5" * 80, {"logit_bias": {"5" * 100_000: "much"}}),
    ("logprobs", {"logprobs": 21}),
    ("logprobs", {"logprobs": -1}),
    ("logprobs", {"logprobs": "yes"}),
    ("logprobs", {"logprobs": 1.0}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("top_logprobs", {"logprobs": False, "top_logprobs": 2}),
    ("stop", {"stop": 5}),
    ("stop", {"stop": [5]}),
    ("stop", {"stop": [str(i) for i in range(10_000)]}),
    ("stop[1]", {"stop": ["a", ""]}),
    ("stop[0]", {"stop": "x" * 257}),
    ("echo", {"echo": "yes"}),
    ("stream", {"stream": 1}),
    ("stream_options", {"stream_options": True}),
    ("stream_options.include_usage", {"stream_options": {"include_usage": "yes"}}),
    ("context_length_exceeded_behavior", {"context_length_exceeded_behavior": "shrug"}),
    ("user", {"user": 5}),
    ("documents", {"documents": "text"}),
    ("documents[1].text", {"documents": ["a", {"title": "t"}]}),
    ("documents[0].url", {"documents": [{"text": "a", "url": 5}]}),
    ("max_document_tokens", {"documents": ["a"], "max_document_tokens": 0}),
]


@pytest.mark.parametrize(("param", "fields"), WRONG_FIELDS, ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_named(client: AppClient, param: str, fields: dict[str, Any]) -> None:
    error = error_of(client.chat(**fields))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.partition("[")[0].partition(".")[0] in error["message"]
    assert client.backend.streams == []


UNSUPPORTED = [
    ("functions", [{"name": "now"}]),
    ("function_call", {"name": "now"}),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("moderation", {"model": "m"}),
    ("safety_model", "meta-llama/Llama-Guard-4-12B"),
    ("compliance", "hipaa"),
    ("best_of", 2),
    ("suffix", "tail"),
    ("guided_json", {}),
    ("structured_outputs", {"regex": "a"}),
    ("chat_template", "{{ messages }}"),
    ("prompt_logprobs", 1),
    ("stop_token_ids", [7]),
    ("include_stop_str_in_output", True),
    ("messages[0].function_call", [{"role": "assistant", "function_call": {"name": "now", "arguments": "{}"}}]),
    ("messages[1].audio", [USER, {"role": "assistant", "content": "", "audio": {"id": "a"}}]),
]


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED, ids=lambda value: str(value)[:40])
def test_an_unsupported_field_is_named(client: AppClient, field: str, value: object) -> None:
    error = error_of(client.chat(**{field.partition("[")[0]: value}))
    assert error["param"] == field
    assert error["code"] == "unsupported_parameter"
    assert field in error["message"]
    assert client.backend.streams == []


@pytest.mark.parametrize(
    "prompt",
    [None, 5, [], [[]], [True], ["a", []], ["a", 5], [1, "a"], [1.5], {}, [[["a"]]], [[1], [2, "b"]]],
    ids=str,
)
def test_a_wrong_prompt_is_named(client: AppClient, prompt: object) -> None:
    assert error_of(client.complete(prompt=prompt))["param"] == "prompt"


@pytest.mark.parametrize("token_id", [-1, 512, 270, 2**40, 2**63])
def test_a_token_id_outside_the_vocabulary_is_named(client: AppClient, token_id: int) -> None:
    error = error_of(client.complete(prompt=[40, token_id]))
    assert error["param"] == "prompt"
    assert str(token_id) in error["message"]


def test_too_many_prompts_or_sequences_are_refused() -> None:
    client = AppClient(FakeBackend(info=engine_info(max_queue=4, max_running=8)))
    assert error_of(client.complete(prompt=["a"] * (MAX_PROMPTS + 1)))["param"] == "prompt"
    assert error_of(client.complete(prompt=["a"] * 3, n=5))["param"] == "n"
    assert client.complete(prompt=["a"] * 3, n=4).status_code == 200


def test_missing_fields_are_named(client: AppClient) -> None:
    assert error_of(client.post(CHAT_PATH, {"messages": [USER]}))["param"] == "model"
    assert error_of(client.post(CHAT_PATH, {"model": MODEL}))["param"] == "messages"
    assert error_of(client.post("/v1/completions", {"model": MODEL}))["param"] == "prompt"


def test_an_unknown_model_is_404_and_the_served_one_is_told(client: AppClient) -> None:
    error = error_of(client.chat(model="gpt-4o"), status=404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert MODEL in error["message"]
    error_of(client.chat(model="a" * 10**6), status=404)
    error_of(client.chat(model="\x00"), status=404)


BODIES = [
    pytest.param(b"", id="empty"),
    pytest.param(b"not json", id="no-json"),
    pytest.param(b'{"model": "a"', id="cut-off"),
    pytest.param(b'{"temperature": NaN}', id="nan"),
    pytest.param(b'{"temperature": -Infinity}', id="infinity"),
    pytest.param(b'{"temperature": 1e999}', id="overflow"),
    pytest.param(b'{"a": "\\ud800"}', id="lone-surrogate"),
    pytest.param(b'{"a": "\xed\xa0\x80"}', id="encoded-surrogate"),
    pytest.param(b'\xff\xfe{"a": 1}', id="not-utf-8"),
    pytest.param(b"[" * 100_000 + b"]" * 100_000, id="deep-arrays"),
    pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="deep-objects"),
    pytest.param(b"[]", id="array"),
    pytest.param(b"null", id="null"),
    pytest.param(b'"text"', id="string"),
    pytest.param(b"5", id="number"),
    pytest.param(b'{"a":[' + b"[]," * 1_000_000 + b"0]}", id="a-million-arrays"),
]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/completions"])
def test_a_body_that_is_no_json_object_is_refused(client: AppClient, path: str, body: bytes) -> None:
    assert error_of(client.request("POST", path, content=body))["code"] == "invalid_json"


CALL = '{"function": {"name": "f", "arguments": {"a": %s}}}'


@pytest.mark.parametrize(
    ("field", "outer", "statuses"),
    [
        ("unknown", "%s", {200}),
        ("messages", '[{"role": "user", "content": "Hi", "extra": %s}]', {200}),
        ("messages", f'[{{"role": "assistant", "tool_calls": [{CALL}]}}]', {400}),
        ("messages", "%s", {400}),
        ("stop", "%s", {400}),
        ("tools", "%s", {400}),
        ("logit_bias", '{"5": %s}', {400}),
    ],
)
def test_depth_that_json_allows_is_no_server_error(
    client: AppClient, field: str, outer: str, statuses: set[int]
) -> None:
    """orjson takes a depth of 1,024, which code of ours that recurses could not walk."""
    body = json.dumps(chat_body(**{field: "PLACE"})).replace('"PLACE"', outer % ("[" * 1000 + "]" * 1000))
    assert client.request("POST", CHAT_PATH, content=body.encode()).status_code in statuses


def test_duplicate_keys_and_odd_content_types_do_no_harm(client: AppClient) -> None:
    body = json.dumps(chat_body())[:-1].encode() + b', "n": 9, "n": 1}'
    for content_type in ("application/json; charset=utf-8", "text/plain", "application/x-www-form-urlencoded", "\xff"):
        response = client.request(
            "POST", CHAT_PATH, content=body, headers={"content-type": content_type.encode("latin-1")}
        )
        assert response.status_code == 200
        assert len(response.json()["choices"]) == 1


def test_nul_is_a_character_like_others(client: AppClient) -> None:
    assert client.chat(messages=[{"role": "user", "content": "a\x00b"}], stop="\x00").status_code == 200


def test_a_prompt_that_cannot_fit_is_refused_before_tokenizing(client: AppClient) -> None:
    content = "a" * (MAX_MODEL_LEN * 100)
    for response, param in (
        (client.chat(messages=[USER, {"role": "user", "content": content}]), "messages"),
        (client.complete(prompt=content), "prompt"),
        (client.complete(prompt=[40] * (MAX_MODEL_LEN + 1)), "prompt"),
        (client.complete(prompt=["a", content]), "prompt"),
    ):
        error = error_of(response)
        assert error["param"] == param
        assert error["code"] == "context_length_exceeded"
        assert str(MAX_MODEL_LEN) in error["message"]


def test_a_refusal_of_the_engine_names_the_clients_field(client: AppClient) -> None:
    def refusal() -> RequestError:
        return RequestError("max_tokens=9000 is too much.", param="max_tokens", code="context_length_exceeded")

    client.backend.refusal = refusal()
    assert error_of(client.chat(max_tokens=9000))["param"] == "max_tokens"
    client.backend.refusal = refusal()
    error = error_of(client.chat(max_completion_tokens=9000, stream=True))
    assert error["param"] == "max_completion_tokens"
    assert error["message"].startswith("max_completion_tokens=9000")
    assert error["code"] == "context_length_exceeded"
    client.backend.refusal = RequestError("The prompt is too long.", param="prompt")
    assert error_of(client.chat())["param"] == "messages"


def test_a_full_queue_is_503_with_the_engines_estimate(client: AppClient) -> None:
    client.backend.refusal = OverloadedError("The queue is full.", retry_after_s=7.2, code="queue_full")
    for response in (client.chat(), client.chat(stream=True), client.complete()):
        assert error_of(response, status=503)["code"] == "queue_full"
        assert response.headers["retry-after"] == "8"


def test_unknown_path_is_404_and_wrong_method_405(client: AppClient) -> None:
    error = error_of(client.get("/v1/nothing%0A%00%E2%82%AC"), status=404)
    assert error["code"] == "path_not_found"
    assert "/v1/models" in error["message"]
    response = client.get(CHAT_PATH)
    assert error_of(response, status=405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    error_of(client.post("/v1/models", {}), status=405)
    error_of(client.post("/v1/models/", {}), status=405)


MIB = 1024 * 1024


def upload(*, num_mib: int, headers: list[tuple[bytes, bytes]]) -> tuple[list[Any], int]:
    """Send a body in pieces of 1 MiB; returns what the app sent and how many pieces it read."""
    sent: list[Any] = []
    num_read = 0

    async def receive() -> dict[str, Any]:
        nonlocal num_read
        num_read += 1
        return {"type": "http.request", "body": b" " * MIB, "more_body": num_read < num_mib}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(make_app(FakeBackend())(http_scope(CHAT_PATH, headers=headers), receive, send))
    return sent, num_read


@pytest.mark.parametrize(
    ("header", "max_read"),
    [
        ((b"content-length", b"%d" % (100 * MIB)), 0),
        ((b"transfer-encoding", b"chunked"), MAX_BODY_BYTES // MIB + 1),
        ((b"content-length", b"9" * 5000), 0),
        ((b"content-length", b"lots"), MAX_BODY_BYTES // MIB + 1),
        ((b"content-length", b"5"), MAX_BODY_BYTES // MIB + 1),
    ],
)
def test_a_body_of_100_mb_is_413_and_not_read(header: tuple[bytes, bytes], max_read: int) -> None:
    """With a length nothing is read at all; without one, reading stops at the limit."""
    sent, num_read = upload(num_mib=100, headers=[header])
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_too_large"
    assert num_read <= max_read
