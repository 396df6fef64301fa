"""POST /v1/messages and /count_tokens: Anthropic's blocks, events, counts and errors."""

import asyncio
from typing import Any

import pytest

from lfm.config import ServerConfig
from lfm.errors import OverloadedError
from lfm.protocol import ErrorInfo, TokenEvent
from tests.server.fakes import (
    EOS,
    MAX_MODEL_LEN,
    MODEL,
    TOKENIZER,
    AppClient,
    AsgiCall,
    FakeBackend,
    named_events_of,
    until,
)

PATH = "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"
USER = {"role": "user", "content": "Hi"}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "now", "input": {"zone": "UTC"}}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 100, "messages": [USER], **fields}


def error_of(response: Any, *, status: int = 400) -> dict[str, Any]:
    """The error of Anthropic's envelope."""
    assert response.status_code == status, response.text
    envelope = response.json()
    assert set(envelope) == {"type", "error", "request_id"}
    assert envelope["type"] == "error"
    assert envelope["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    error: dict[str, Any] = envelope["error"]
    assert set(error) == {"type", "message"}
    assert len(error["message"]) < 500
    return error


@pytest.fixture
def client() -> AppClient:
    return AppClient()


def prompt_of(client: AppClient, **fields: Any) -> str:
    """The prompt of a request as text, control tokens shown."""
    response = client.post(PATH, body(**fields))
    assert response.status_code == 200, response.text
    ids = client.backend.requests[-1].prompt_ids
    return b"".join(map(TOKENIZER.token_bytes, ids)).decode()


def test_whole_answer(client: AppClient) -> None:
    client.backend.num_cached_tokens = 16
    answer = client.post(PATH, body()).json()
    assert answer.pop("id").startswith("msg_")
    num_prompt_tokens = len(client.backend.requests[0].prompt_ids)
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "Hello!"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": num_prompt_tokens - 16,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 16,
            "output_tokens": 7,
        },
    }


def test_stream_is_the_whole_answer_in_pieces(client: AppClient) -> None:
    client.backend.num_cached_tokens = 16
    response = client.post(PATH, body(stream=True))
    events = named_events_of(response)
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "ping",
        *["content_block_delta"] * 6,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"], start["stop_sequence"]) == ([], None, None)
    assert start["usage"]["cache_read_input_tokens"] == 16
    assert events[1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert "".join(event["delta"]["text"] for event in events[3:9]) == "Hello!"
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"] == {**start["usage"], "output_tokens": 7}
    assert "[DONE]" not in response.text


def test_an_empty_answer_has_no_block() -> None:
    client = AppClient(FakeBackend(""))
    assert client.post(PATH, body()).json()["content"] == []
    kinds = [event["type"] for event in named_events_of(client.post(PATH, body(stream=True)))]
    assert kinds == ["message_start", "message_delta", "message_stop"]


def test_a_stop_sequence_is_named_and_not_shown(client: AppClient) -> None:
    fields = body(stop_sequences=["xyz", "lo"])
    answer = client.post(PATH, fields).json()
    assert answer["content"] == [{"type": "text", "text": "Hel"}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "lo")
    events = named_events_of(client.post(PATH, {**fields, "stream": True}))
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "lo"}
    assert len(client.backend.aborted) == 2


def test_max_tokens_ends_the_answer(client: AppClient) -> None:
    answer = client.post(PATH, body(max_tokens=3)).json()
    assert answer["stop_reason"] == "max_tokens"
    assert answer["content"][0]["text"] == "Hel"


def test_max_tokens_beyond_the_context_is_lowered_and_the_end_says_so() -> None:
    client = AppClient(FakeBackend("a" * (2 * MAX_MODEL_LEN)))
    answer = client.post(PATH, body(max_tokens=64_000)).json()
    request = client.backend.requests[0]
    assert request.sampling.max_tokens == MAX_MODEL_LEN - len(request.prompt_ids)
    assert answer["stop_reason"] == "model_context_window_exceeded"


def test_a_prompt_beyond_the_context_is_refused(client: AppClient) -> None:
    error = error_of(client.post(PATH, body(messages=[{"role": "user", "content": "a" * (MAX_MODEL_LEN + 1)}])))
    assert str(MAX_MODEL_LEN) in error["message"]
    assert client.backend.streams == []


def test_sampling_fields_reach_the_engine(client: AppClient) -> None:
    client.post(PATH, body(temperature=0.5, top_p=0.9, top_k=7, seed=3, min_p=0.1))
    sampling = client.backend.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 7, 3)
    assert sampling.min_p == 0.1


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("Be brief.", "Be brief."),
        (
            [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}],
            "a\nb",
        ),
        ([{"type": "text", "text": "x-anthropic-billing-header: cch=1f;"}, {"type": "text", "text": "a"}], "a"),
        ([{"type": "text", "text": "x-anthropic-billing-header: cch=1f;\na"}], "a"),
        ("x-anthropic-billing-header: cch=1f;\na", "a"),
        ([{"type": "text", "text": "About x-anthropic-billing-header"}], "About x-anthropic-billing-header"),
    ],
)
def test_system_text_and_blocks(client: AppClient, system: object, expected: str) -> None:
    assert prompt_of(client, system=system).startswith(f"<|startoftext|><|im_start|>system\n{expected}<|im_end|>\n")


@pytest.mark.parametrize("system", [None, "", [], [{"type": "text", "text": "x-anthropic-billing-header: cch=2;"}]])
def test_no_system_text_leaves_no_system_turn(client: AppClient, system: object) -> None:
    assert prompt_of(client, system=system).startswith("<|startoftext|><|im_start|>user\n")


def test_the_changing_billing_header_does_not_change_the_prompt(client: AppClient) -> None:
    """With it no prefix of Claude Code's 15,000 tokens would ever be found in the cache."""
    for digest in ("aa", "bb"):
        header = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2; cch={digest};"}
        client.post(PATH, body(system=[header, {"type": "text", "text": "You are helpful."}]))
    first, second = client.backend.requests
    assert first.prompt_ids == second.prompt_ids


def test_tool_calls_and_results_become_turns(client: AppClient) -> None:
    """LFM2's layout has no ids, so the results stand in the order of their calls."""
    messages = [
        {"role": "user", "content": "Time and weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "Let me see."},
                CALL,
                {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True, "content": "no network"},
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "12:00"}]},
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    prompt = prompt_of(client, messages=messages)
    assert prompt == (
        "<|startoftext|><|im_start|>user\nTime and weather?<|im_end|>\n"
        '<|im_start|>assistant\nLet me see.<|tool_call_start|>[now(zone="UTC"), weather()]<|tool_call_end|><|im_end|>\n'
        "<|im_start|>tool\n12:00<|im_end|>\n<|im_start|>tool\nError: no network<|im_end|>\n"
        "<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_last_turn_of_the_assistant_is_continued(client: AppClient) -> None:
    messages = [USER, {"role": "assistant", "content": "The answer is ("}]
    assert prompt_of(client, messages=messages).endswith("<|im_start|>assistant\nThe answer is (")
    count = client.post(COUNT_PATH, {"model": MODEL, "messages": messages}).json()["input_tokens"]
    assert count == len(client.backend.requests[-1].prompt_ids)


SPECIAL = [TOKENIZER.token_bytes(token_id).decode() for token_id in sorted(TOKENIZER.special_ids)]


@pytest.mark.parametrize("token", SPECIAL)
def test_no_text_becomes_a_control_token(client: AppClient, token: str) -> None:
    """Neither whole in any field, nor put together from two blocks."""

    def control_ids(*texts: str) -> list[int]:
        blocks = [{"type": "text", "text": text} for text in texts]
        whole = "".join(texts)
        use = {"type": "tool_use", "id": "a", "name": f"now{whole}", "input": {f"key{whole}": whole}}
        messages = [
            {"role": "user", "content": blocks},
            {"role": "assistant", "content": [*blocks, use]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": blocks}, *blocks]},
            {"role": "assistant", "content": whole},
        ]
        prompt_of(client, system=blocks, messages=messages)
        return [i for i in client.backend.requests[-1].prompt_ids if i in TOKENIZER.special_ids]

    expected = control_ids("plain", "text")
    for cut in range(len(token)):
        assert control_ids(token[:cut], token[cut:]) == expected


def test_count_tokens_counts_the_prompt_and_generates_nothing(client: AppClient) -> None:
    fields = {"model": MODEL, "messages": [USER], "system": "Be brief."}
    count = client.post(COUNT_PATH, fields)
    assert client.backend.requests == []
    client.post(PATH, {**fields, "max_tokens": 5})
    assert count.json() == {"input_tokens": len(client.backend.requests[0].prompt_ids)}
    assert error_of(client.post(COUNT_PATH, {"messages": [USER]}))["message"].startswith("model is missing")
    error_of(client.post(COUNT_PATH, {**fields, "model": "claude"}), status=404)
    with_tools = client.post(COUNT_PATH, {**fields, "tools": [{"name": "now", "input_schema": {}}]})
    assert with_tools.json()["input_tokens"] > count.json()["input_tokens"]


WRONG = [
    ("max_tokens", {"max_tokens": None}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": "5"}),
    ("messages", {"messages": []}),
    ("messages", {"messages": "Hi"}),
    ("messages", {"messages": [USER] * 4097}),
    ("messages[0]", {"messages": ["Hi"]}),
    ("messages[0].role", {"messages": [{"role": "system", "content": "a"}]}),
    ("messages[0].role", {"messages": [{"role": "tool", "content": "a"}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": ["a"]}]}),
    ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [{"text": "a"}]}]}),
    ("messages[0].content[0].text", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("messages[0].content[0].type='image'", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
    ("messages[0].content[0].type='tool_use'", {"messages": [{"role": "user", "content": [CALL]}]}),
    (
        "messages[0].content[0].type='tool_result'",
        {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]},
    ),
    ("messages ends with a tool_use", {"messages": [USER, {"role": "assistant", "content": [CALL]}]}),
    (
        "messages[0].content[0].tool_use_id='a'",
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]},
    ),
    (
        "messages[1].content[1].tool_use_id='toolu_1' has a result already",
        {
            "messages": [
                {"role": "assistant", "content": [CALL]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1"}] * 2},
            ]
        },
    ),
    ("messages[0].content[1].id='toolu_1'", {"messages": [{"role": "assistant", "content": [CALL, CALL]}, USER]}),
    (
        "messages[0].content[0].input",
        {"messages": [{"role": "assistant", "content": [{**CALL, "input": "{}"}]}, USER]},
    ),
    ("system", {"system": 5}),
    ("system[0].type='image'", {"system": [{"type": "image"}]}),
    ("stop_sequences", {"stop_sequences": "lo"}),
    ("stop_sequences", {"stop_sequences": ["a"] * 17}),
    ("stop_sequences[0]", {"stop_sequences": [""]}),
    ("temperature", {"temperature": 3}),
    ("top_k", {"top_k": -1}),
    ("stream", {"stream": "yes"}),
]


@pytest.mark.parametrize(("start", "fields"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_named(client: AppClient, start: str, fields: dict[str, Any]) -> None:
    error = error_of(client.post(PATH, body(**fields)))
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(start)
    assert client.backend.requests == []


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("mcp_servers", {"mcp_servers": [{"type": "url", "url": "https://example.com"}]}),
        ("container", {"container": "c"}),
    ],
)
def test_what_is_not_supported_is_named(client: AppClient, field: str, fields: dict[str, Any]) -> None:
    assert error_of(client.post(PATH, body(**fields)))["message"].startswith(f"{field} is not supported")


def test_what_has_no_effect_is_told(client: AppClient) -> None:
    fields = body(thinking={"type": "adaptive"}, output_config={"effort": "high"}, metadata={"user_id": "u"})
    fields["messages"] = [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {}}]}]
    answer = client.post(PATH, fields).json()
    told = [warning["message"].partition(" ")[0] for warning in answer["warnings"]]
    assert told == ["thinking", "output_config.effort"]
    start = named_events_of(client.post(PATH, {**fields, "stream": True}))[0]
    assert start["message"]["warnings"] == answer["warnings"]


def test_headers_of_anthropics_clients_are_tolerated(client: AppClient) -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "interleaved-thinking-2025-05-14,of-tomorrow"}
    assert client.post(f"{PATH}?beta=true", body(), headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/v1/messages", "/messages"])
def test_every_alias_of_the_path_answers(client: AppClient, path: str) -> None:
    assert client.post(path, body()).status_code == 200
    assert client.post(f"{path}/count_tokens", {"model": MODEL, "messages": [USER]}).status_code == 200


def test_every_error_is_in_anthropics_envelope() -> None:
    client = AppClient()
    assert error_of(client.post(PATH, body(model="claude")), status=404)["type"] == "not_found_error"
    assert error_of(client.request("POST", PATH, content=b"{"))["type"] == "invalid_request_error"
    assert error_of(client.get(PATH), status=405)["type"] == "invalid_request_error"
    client.backend.refusal = OverloadedError("The queue is full.", retry_after_s=7.2, code="queue_full")
    response = client.post(PATH, body())
    assert error_of(response, status=503)["type"] == "overloaded_error"
    assert response.headers["retry-after"] == "8"
    keyed = AppClient(config=ServerConfig(api_key="k"))
    assert error_of(keyed.post(PATH, body()), status=401)["type"] == "authentication_error"
    assert keyed.post(PATH, body(), headers={"x-api-key": "k"}).status_code == 200
    away = AppClient().post(PATH, body(), headers={"Origin": "https://evil.example"})
    assert error_of(away, status=403)["type"] == "permission_error"


def test_an_error_in_a_stream_is_an_error_event(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> AsgiCall:
        backend = FakeBackend()
        backend.is_held = True
        call = AsgiCall(AppClient(backend).app, body(stream=True), path=PATH)
        task = asyncio.create_task(call.run())
        await until(lambda: backend.num_reads > 0)
        (stream,) = backend.streams
        (request_id,) = stream.running
        stream.push(TokenEvent(request_id=request_id, token_ids=TOKENIZER.encode("a"), num_cached_tokens=0))
        error = ErrorInfo(message="The engine died.", code="engine_died")
        stream.push(TokenEvent(request_id=request_id, finish_reason="error", error=error))
        await task
        return call

    call = asyncio.run(scenario())
    last = call.body.decode().rstrip("\n").rpartition("\n\n")[2]
    assert last.startswith(
        'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"The engine died."'
    )
    assert call.is_complete


def test_a_waiting_stream_is_kept_alive_by_pings() -> None:
    """Before the first event only a comment may come, since clients expect message_start first."""

    async def scenario() -> bytes:
        backend = FakeBackend()
        backend.is_held = True
        config = ServerConfig(keepalive_seconds=0.01)
        call = AsgiCall(AppClient(backend, config).app, body(stream=True), path=PATH)
        task = asyncio.create_task(call.run())
        await until(lambda: b": keep-alive" in call.body)
        assert b"event:" not in call.body
        (stream,) = backend.streams
        (request_id,) = stream.running
        stream.push(TokenEvent(request_id=request_id, token_ids=TOKENIZER.encode("a"), num_cached_tokens=0))
        await until(lambda: call.body.count(b"event: ping") >= 3)
        stream.push(TokenEvent(request_id=request_id, token_ids=[EOS], finish_reason="stop"))
        await task
        return call.body

    data = asyncio.run(scenario())
    assert data.index(b"message_start") < data.index(b"event: ping")
    assert data.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
