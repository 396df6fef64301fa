"""POST /v1/responses: items in, one output item out, whole or as events; and what is stored of it."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lfm.config import ServerConfig
from lfm.protocol import ErrorInfo, TokenEvent
from lfm.service.responses_store import ResponsesStore
from tests.server.fakes import (
    DEFAULTS,
    MAX_MODEL_LEN,
    MODEL,
    TOKENIZER,
    AppClient,
    AsgiCall,
    FakeBackend,
    named_events_of,
    until,
)

PATH = "/v1/responses"
CALL = {"type": "function_call", "call_id": "call_1", "name": "now", "arguments": '{"zone": "UTC"}'}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "12:00"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ResponsesStore]:
    store = ResponsesStore(tmp_path / "responses.sqlite3")
    yield store
    store.close()


@pytest.fixture
def client(store: ResponsesStore) -> AppClient:
    return AppClient(responses=store)


def create(client: AppClient, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, {"model": MODEL, "input": "Hi", **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def error_of(response: Any, *, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 500
    return error


def refusal(client: AppClient, **fields: Any) -> dict[str, Any]:
    error = error_of(client.post(PATH, {"model": MODEL, "input": "Hi", **fields}))
    assert client.backend.requests == []
    return error


def prompt_of(client: AppClient, **fields: Any) -> str:
    """The prompt of a request as text, control tokens shown."""
    create(client, **fields)
    return b"".join(map(TOKENIZER.token_bytes, client.backend.requests[-1].prompt_ids)).decode()


def message(role: str, *texts: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "input_text", "text": text} for text in texts]}


def test_whole_answer(client: AppClient) -> None:
    client.backend.num_cached_tokens = 16
    answer = create(client, instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=50, user="u")
    assert answer["id"].startswith("resp_")
    assert (answer["object"], answer["status"], answer["model"]) == ("response", "completed", MODEL)
    assert (answer["error"], answer["incomplete_details"]) == (None, None)
    assert answer["created_at"] <= answer["completed_at"]
    (item,) = answer["output"]
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Hello!", "annotations": [], "logprobs": []}],
    }
    num_prompt_tokens = len(client.backend.requests[0].prompt_ids)
    assert answer["usage"] == {
        "input_tokens": num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": 16, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_prompt_tokens + 7,
    }
    assert (answer["instructions"], answer["metadata"], answer["max_output_tokens"]) == ("Be brief.", {"a": "b"}, 50)
    assert (answer["store"], answer["user"], answer["temperature"]) == (True, "u", DEFAULTS.temperature)
    assert "warnings" not in answer


def test_stream_builds_up_the_whole_answer(client: AppClient) -> None:
    response = client.post(PATH, {"model": MODEL, "input": "Hi", "stream": True})
    assert response.text.endswith("data: [DONE]\n\n")
    events = named_events_of(response)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 6,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert {event["output_index"] for event in events if "output_index" in event} == {0}
    created, final = events[0]["response"], events[-1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert events[2]["item"]["content"] == []
    assert events[3]["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert "".join(event["delta"] for event in events[4:10]) == "Hello!" == events[10]["text"]
    assert events[11]["part"]["text"] == "Hello!"
    assert final["output"] == [events[12]["item"]]
    assert {event["item_id"] for event in events[3:12]} == {final["output"][0]["id"]}
    assert final["id"] == created["id"]
    assert client.get(f"{PATH}/{final['id']}").json() == final


def test_an_empty_answer_still_has_its_message() -> None:
    client = AppClient(FakeBackend(""))
    assert create(client)["output"][0]["content"][0]["text"] == ""
    events = named_events_of(client.post(PATH, {"model": MODEL, "input": "Hi", "stream": True}))
    assert [event["type"].rpartition(".")[2] for event in events] == [
        *("created", "in_progress", "added", "added", "done", "done", "done", "completed"),
    ]


def test_an_answer_cut_by_max_output_tokens_is_incomplete(client: AppClient) -> None:
    answer = create(client, max_output_tokens=3)
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (answer["output"][0]["status"], answer["completed_at"]) == ("incomplete", None)
    fields = {"model": MODEL, "input": "Hi", "stream": True, "max_output_tokens": 3}
    last = named_events_of(client.post(PATH, fields))[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["output"][0]["content"][0]["text"] == "Hel"


def test_sampling_fields_reach_the_engine(client: AppClient) -> None:
    answer = create(client, temperature=0.5, top_p=0.9, seed=3, top_k=7, stop="lo", presence_penalty=1)
    sampling = client.backend.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.top_k) == (0.5, 0.9, 3, 7)
    assert (answer["temperature"], answer["top_p"], answer["presence_penalty"]) == (0.5, 0.9, 1)
    assert answer["output"][0]["content"][0]["text"] == "Hel"
    assert answer["status"] == "completed"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"include": ["reasoning.encrypted_content"]}, None),
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 2}, 2),
        ({"top_logprobs": 2}, 2),
        ({"top_logprobs": 0}, None),
    ],
)
def test_logprobs_are_given_when_included(client: AppClient, fields: dict[str, Any], expected: int | None) -> None:
    (part,) = create(client, **fields)["output"][0]["content"]
    assert client.backend.requests[0].sampling.logprobs == expected
    assert [entry["token"] for entry in part["logprobs"]] == ([*"Hello!", "<|im_end|>"] if expected is not None else [])
    assert all(len(entry["top_logprobs"]) == expected for entry in part["logprobs"])


def test_items_become_turns(client: AppClient) -> None:
    items = [
        message("developer", "Be brief."),
        {"type": "message", "role": "user", "content": "Time?"},
        {"type": "message", "role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "Hm."}]},
        CALL,
        {**CALL, "call_id": "call_2", "name": "weather", "arguments": ""},
        {**RESULT, "call_id": "call_2", "output": [{"type": "input_text", "text": "sun"}]},
        RESULT,
        message("user", "And", " now?"),
    ]
    assert prompt_of(client, instructions="Think.", input=items) == (
        "<|startoftext|><|im_start|>system\nThink.<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nTime?<|im_end|>\n"
        '<|im_start|>assistant\nHm.<|tool_call_start|>[now(zone="UTC"), weather()]<|tool_call_end|><|im_end|>\n'
        "<|im_start|>tool\n12:00<|im_end|>\n<|im_start|>tool\nsun<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_text_behind_a_call_belongs_to_the_same_turn(client: AppClient) -> None:
    items = [message("user", "Time?"), CALL, message("assistant", "Wait."), RESULT]
    assert 'Wait.<|tool_call_start|>[now(zone="UTC")]<|tool_call_end|><|im_end|>' in prompt_of(client, input=items)


def test_a_call_id_may_be_used_again_once_it_was_answered(client: AppClient) -> None:
    items = [CALL, RESULT, CALL, RESULT, message("user", "Well?")]
    assert prompt_of(client, input=items).count("12:00") == 2


def test_reasoning_of_other_models_is_left_out_with_a_warning(client: AppClient) -> None:
    items = [message("user", "a"), {"type": "reasoning", "id": "rs_1", "summary": []}, message("user", "b")]
    answer = create(client, input=items, reasoning={"effort": "high", "summary": "auto"}, truncation="auto")
    told = [warning["message"].partition(" has no effect")[0] for warning in answer["warnings"]]
    assert told == ["reasoning.effort", "reasoning.summary", "truncation", "input[] of type reasoning"]


@pytest.mark.parametrize("token_id", sorted(TOKENIZER.special_ids))
def test_no_text_becomes_a_control_token(client: AppClient, token_id: int) -> None:
    """Neither whole in any field, nor put together from two parts or items."""

    def control_ids(*texts: str) -> list[int]:
        whole = "".join(texts)
        items = [
            message("user", *texts),
            message("assistant", *texts),
            {**CALL, "name": whole, "arguments": json.dumps({whole: whole})},
            {**RESULT, "output": [{"type": "input_text", "text": text} for text in texts]},
            *(message("user", text) for text in texts),
        ]
        create(client, instructions=whole, input=items)
        return [i for i in client.backend.requests[-1].prompt_ids if i in TOKENIZER.special_ids]

    token = TOKENIZER.token_bytes(token_id).decode()
    expected = control_ids("plain", "text")
    for cut in range(len(token)):
        assert control_ids(token[:cut], token[cut:]) == expected


WRONG = [
    ("input", {"input": None}),
    ("input", {"input": []}),
    ("input", {"input": 5}),
    ("input[0]", {"input": ["Hi"]}),
    ("input[0].type", {"input": [{"type": "item_reference", "id": "msg_1"}]}),
    ("input[0].type", {"input": [{"type": 5}]}),
    ("input[0].role", {"input": [{"content": "Hi"}]}),
    ("input[0].role", {"input": [{"role": "tool", "content": "Hi"}]}),
    ("input[0].content", {"input": [{"role": "user"}]}),
    ("input[0].content[0]", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}),
    ("input[0].content[0].text", {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}),
    ("input[0].arguments", {"input": [{**CALL, "arguments": "{"}]}),
    ("input[0].arguments", {"input": [{**CALL, "arguments": "[1]"}]}),
    ("input[0].arguments", {"input": [{**CALL, "arguments": {}}]}),
    ("input[0].name", {"input": [{**CALL, "name": None}]}),
    ("input[1].call_id", {"input": [CALL, CALL]}),
    ("input[0].call_id", {"input": [RESULT]}),
    ("input[2].call_id", {"input": [CALL, RESULT, RESULT]}),
    ("input[1].output", {"input": [CALL, {**RESULT, "output": None}]}),
    ("input", {"input": [message("user", "Hi")] * 4097}),
    ("input", {"input": "a" * (MAX_MODEL_LEN * 100)}),
    ("instructions", {"instructions": ["a"]}),
    ("previous_response_id", {"previous_response_id": 5}),
    ("previous_response_id", {"previous_response_id": "resp_unknown"}),
    ("max_output_tokens", {"max_output_tokens": 0}),
    ("max_output_tokens", {"max_output_tokens": 10**7}),
    ("max_output_tokens", {"max_output_tokens": "5"}),
    ("metadata", {"metadata": [1]}),
    ("metadata.a", {"metadata": {"a": 1}}),
    ("metadata", {"metadata": {str(i): "" for i in range(17)}}),
    ("metadata", {"metadata": {"k" * 65: ""}}),
    ("metadata", {"metadata": {"k": "v" * 513}}),
    ("store", {"store": "no"}),
    ("top_logprobs", {"top_logprobs": 21}),
    ("temperature", {"temperature": 3}),
    ("include", {"include": "all"}),
    ("model", {"model": 5}),
]


@pytest.mark.parametrize(("param", "fields"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_named(client: AppClient, param: str, fields: dict[str, Any]) -> None:
    error = refusal(client, **fields)
    assert error["param"] == param
    assert param.partition("[")[0].partition(".")[0] in error["message"]


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("background", {"background": True}),
        ("conversation", {"conversation": "conv_1"}),
        ("prompt", {"prompt": {"id": "p"}}),
        ("moderation", {"moderation": {"model": "m"}}),
    ],
)
def test_what_is_not_supported_is_named(client: AppClient, param: str, fields: dict[str, Any]) -> None:
    error = refusal(client, **fields)
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")


def test_defaults_that_clients_send_are_accepted_without_warning(client: AppClient) -> None:
    answer = create(
        client,
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=False,
        text={"format": {"type": "text"}, "verbosity": "medium"},
        reasoning={"effort": None},
        background=False,
        truncation="disabled",
        service_tier="auto",
        prompt_cache_key="k",
        include=[],
        stream=False,
        a_field_of_tomorrow={"x": [1]},
    )
    assert "warnings" not in answer
    assert answer["parallel_tool_calls"] is False


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/v1/responses", "/responses"])
def test_every_alias_of_the_path_answers(client: AppClient, path: str) -> None:
    response_id = client.post(path, {"model": MODEL, "input": "Hi"}).json()["id"]
    assert client.get(f"{path}/{response_id}").status_code == 200
    assert client.get(f"{path}/{response_id}/input_items").status_code == 200
    assert client.request("DELETE", f"{path}/{response_id}").status_code == 200


# What is stored.


def test_a_stored_response_is_read_back_and_deleted(client: AppClient) -> None:
    answer = create(client)
    path = f"{PATH}/{answer['id']}"
    assert client.get(path).json() == answer
    assert client.get(f"{path}?stream=false&include=x").json() == answer
    assert error_of(client.get(f"{path}?stream=true"))["param"] == "stream"
    assert client.request("DELETE", path).json() == {"id": answer["id"], "object": "response", "deleted": True}
    assert error_of(client.get(path), status=404)["code"] == "response_not_found"
    assert error_of(client.request("DELETE", path), status=404)["code"] == "response_not_found"
    assert set(client.post(path, {}).headers["allow"].split(", ")) == {"DELETE", "GET", "HEAD"}


def test_a_conversation_goes_on_from_a_response(client: AppClient) -> None:
    first = create(client, input="One", instructions="Be brief.")
    second = create(client, input=[message("user", "Two")], previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    prompt = prompt_of(client, input="Three", previous_response_id=second["id"], instructions="Be long.")
    assert prompt == (
        "<|startoftext|><|im_start|>system\nBe long.<|im_end|>\n<|im_start|>user\nOne<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nTwo<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nThree<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_conversation_survives_the_deletion_of_its_beginning(client: AppClient) -> None:
    first = create(client, input="One")
    second = create(client, input="Two", previous_response_id=first["id"])
    client.request("DELETE", f"{PATH}/{first['id']}")
    prompt = prompt_of(client, input="Three", previous_response_id=second["id"])
    assert all(text in prompt for text in ("One", "Two", "Three"))


def test_a_result_may_answer_a_call_of_an_earlier_response(client: AppClient) -> None:
    first = create(client, input=[message("user", "Time?"), CALL], max_output_tokens=1)
    prompt = prompt_of(client, input=[RESULT], previous_response_id=first["id"])
    assert "tool\n12:00" in prompt
    again = client.post(PATH, {"model": MODEL, "input": [RESULT, RESULT], "previous_response_id": first["id"]})
    assert error_of(again)["param"] == "input[1].call_id"


def test_what_must_not_be_stored_is_not(client: AppClient, store: ResponsesStore) -> None:
    answer = create(client, input="a secret", store=False)
    assert answer["store"] is False
    error_of(client.get(f"{PATH}/{answer['id']}"), status=404)
    refused = client.post(PATH, {"model": MODEL, "input": "Hi", "previous_response_id": answer["id"]})
    assert error_of(refused)["code"] == "previous_response_not_found"
    store.close()
    assert b"a secret" not in store._path.read_bytes()


def test_input_items_are_listed_in_pages(client: AppClient) -> None:
    first = create(client, input=[message("user", "One"), CALL, RESULT])
    second = create(client, input="Two", previous_response_id=first["id"], instructions="no item")
    path = f"{PATH}/{second['id']}/input_items"
    whole = client.get(f"{path}?order=asc").json()
    assert (whole["object"], whole["has_more"]) == ("list", False)
    kinds = [item["type"] for item in whole["data"]]
    assert kinds == ["message", "function_call", "function_call_output", "message", "message"]
    assert whole["data"][0]["content"] == [{"type": "input_text", "text": "One"}]
    assert whole["data"][3] == first["output"][0]
    ids = [item["id"] for item in whole["data"]]
    assert len(set(ids)) == 5
    assert [item["id"] for item in client.get(path).json()["data"]] == ids[::-1]
    seen: list[str] = []
    page: dict[str, Any] = {"has_more": True}
    while page["has_more"]:
        after = f"&after={seen[-1]}" if seen else ""
        page = client.get(f"{path}?limit=2{after}").json()
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        seen += [item["id"] for item in page["data"]]
    assert seen == ids[::-1]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=-1", "limit=x", "limit=", "limit=%D9%A1", "order=up", "after=msg_none"]
)
def test_a_wrong_page_is_named(client: AppClient, query: str) -> None:
    path = f"{PATH}/{create(client)['id']}/input_items"
    assert error_of(client.get(f"{path}?{query}"))["param"] == query.partition("=")[0]
    error_of(client.get(f"{PATH}/resp_none/input_items"), status=404)


def test_only_the_key_that_made_a_response_finds_it(store: ResponsesStore) -> None:
    clients = [AppClient(config=ServerConfig(api_key=key), responses=store) for key in ("ann", "bob")]
    ann, bob = [{"Authorization": f"Bearer {key}"} for key in ("ann", "bob")]
    made = clients[0].post(PATH, {"model": MODEL, "input": "Hi"}, headers=ann).json()
    path = f"{PATH}/{made['id']}"
    assert clients[0].get(path, headers={"x-api-key": "ann"}).status_code == 200
    for other, headers in ((clients[1], bob), (AppClient(responses=store), {})):
        error_of(other.get(path, headers=headers), status=404)
        error_of(other.get(f"{path}/input_items", headers=headers), status=404)
        error_of(other.request("DELETE", path, headers=headers), status=404)
        body = {"model": MODEL, "input": "Hi", "previous_response_id": made["id"]}
        assert error_of(other.post(PATH, body, headers=headers))["code"] == "previous_response_not_found"
    error_of(clients[0].get(path), status=401)
    assert clients[0].get(path, headers=ann).status_code == 200


def test_no_key_is_in_the_file(store: ResponsesStore) -> None:
    client = AppClient(config=ServerConfig(api_key="sk-very-secret"), responses=store)
    assert client.post(PATH, {"model": MODEL, "input": "Hi"}, headers={"x-api-key": "sk-very-secret"}).is_success
    store.close()
    assert b"sk-very-secret" not in store._path.read_bytes()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_be_stored_says_so(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    client = AppClient()  # its store lies where no file can be
    response = client.post(PATH, {"model": MODEL, "input": "Hi", "stream": stream})
    answer = named_events_of(response)[-1]["response"] if stream else response.json()
    assert (answer["status"], answer["store"]) == ("completed", False)
    assert answer["warnings"][0]["message"].startswith("store has no effect")
    assert "is not stored" in caplog.text
    refused = client.post(PATH, {"model": MODEL, "input": "Hi", "previous_response_id": answer["id"]})
    assert error_of(refused, status=500)["code"] == "internal_error"


def test_a_request_that_leaves_early_stores_nothing(store: ResponsesStore) -> None:
    async def scenario() -> None:
        backend = FakeBackend()
        backend.is_held = True
        app = AppClient(backend, responses=store).app
        call = AsgiCall(app, {"model": MODEL, "input": "Hi", "stream": True}, path=PATH)
        task = asyncio.create_task(call.run())
        await until(lambda: backend.num_reads > 0)
        call.disconnect()
        await task
        assert backend.aborted

    asyncio.run(scenario())
    assert not store._path.exists()


def test_a_stream_that_fails_ends_in_a_failed_response(store: ResponsesStore) -> None:
    async def scenario() -> AsgiCall:
        backend = FakeBackend()
        backend.is_held = True
        app = AppClient(backend, responses=store).app
        call = AsgiCall(app, {"model": MODEL, "input": "Hi", "stream": True}, path=PATH)
        task = asyncio.create_task(call.run())
        await until(lambda: backend.num_reads > 0)
        (stream,) = backend.streams
        (request_id,) = stream.running
        stream.push(TokenEvent(request_id=request_id, token_ids=TOKENIZER.encode("a"), num_cached_tokens=0))
        await until(lambda: b"output_text.delta" in call.body)
        error = ErrorInfo(message="The engine died.", code="engine_died")
        stream.push(TokenEvent(request_id=request_id, finish_reason="error", error=error))
        await task
        return call

    call = asyncio.run(scenario())
    events = [json.loads(line[6:]) for line in call.body.decode().split("\n") if line.startswith("data: {")]
    failed = events[-1]
    assert (failed["type"], failed["sequence_number"]) == ("response.failed", len(events) - 1)
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "The engine died."}
    assert failed["response"]["output"][0]["content"][0]["text"] == "a"
    assert call.body.endswith(b"data: [DONE]\n\n")
    assert call.is_complete
