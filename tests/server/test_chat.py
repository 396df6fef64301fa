"""POST /v1/chat/completions: the shapes of whole and streamed answers, and what reaches the engine."""

from typing import Any

import pytest

from lfm.server.admission import LONG_BODY_BYTES
from tests.server.fakes import (
    CHAT_PATH,
    DEFAULTS,
    EOS,
    MAX_MODEL_LEN,
    MODEL,
    TOKENIZER,
    AppClient,
    FakeBackend,
    chat_body,
    engine_info,
    events_of,
)

TOGETHER = {"User-Agent": "Together/Python 3.1.1"}


@pytest.fixture
def client() -> AppClient:
    return AppClient()


def texts_of(events: list[dict[str, Any]], *, index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"]["content"] for choice in choices)


def test_whole_answer_has_the_fields_of_both_vendors(client: AppClient) -> None:
    client.backend.num_cached_tokens = 16
    answer = client.chat(seed=11).json()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == MODEL
    assert isinstance(answer["created"], int)
    assert answer["prompt"] == []
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "seed": 11,
        }
    ]
    num_prompt_tokens = len(client.backend.requests[0].prompt_ids)
    assert answer["usage"] == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": 7,  # six bytes and the end of the turn
        "total_tokens": num_prompt_tokens + 7,
        "cached_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 16},
    }
    assert "warnings" not in answer


def test_stream_is_the_whole_answer_in_pieces(client: AppClient) -> None:
    events = events_of(client.chat(stream=True, seed=3))
    assert texts_of(events) == "Hello!"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 7 + ["stop"]
    assert {event["choices"][0]["seed"] for event in events} == {3}
    assert not any("usage" in event for event in events)


def test_role_comes_once_for_openai_and_in_every_chunk_for_together(client: AppClient) -> None:
    """openai's stream helper joins the strings of all deltas: a second role would make "assistantassistant"."""
    for_openai = events_of(client.chat(stream=True))
    assert [event["choices"][0]["delta"].get("role") for event in for_openai] == ["assistant"] + [None] * 7
    for_together = events_of(client.post(CHAT_PATH, chat_body(stream=True), headers=TOGETHER))
    assert {event["choices"][0]["delta"]["role"] for event in for_together} == {"assistant"}
    token_ids = [event["choices"][0]["delta"]["token_id"] for event in for_together]
    assert token_ids == [*TOKENIZER.encode("Hello!"), EOS]


def test_usage_of_a_stream_comes_in_its_own_chunk_when_asked_for(client: AppClient) -> None:
    events = events_of(client.chat(stream=True, stream_options={"include_usage": True}))
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 7
    assert {str(event["usage"]) for event in events[:-1]} == {"None"}


def test_every_chunk_says_what_was_used_so_far_when_asked_for(client: AppClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = events_of(client.chat(stream=True, stream_options=options))
    assert events[0]["usage"] is None, "the first chunk opens the choice and has no token"
    counts = [event["usage"]["completion_tokens"] for event in events[1:]]
    assert counts == sorted(counts)
    assert counts[-2:] == [7, 7], "the last chunk and the usage's own"
    assert len(set(counts)) > 2


def test_together_gets_the_usage_with_the_last_chunk_too(client: AppClient) -> None:
    body = chat_body(stream=True, stream_options={"include_usage": True})
    events = events_of(client.post(CHAT_PATH, body, headers=TOGETHER))
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-2]["usage"] == events[-1]["usage"]
    assert events[-1]["usage"]["cached_tokens"] == 0


def test_n_choices_share_a_prompt_and_have_successive_seeds(client: AppClient) -> None:
    answer = client.chat(n=3, seed=5).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["seed"] for choice in answer["choices"]] == [5, 6, 7]
    requests = client.backend.requests
    assert [request.request_id for request in requests] == [f"{answer['id']}-{index}" for index in range(3)]
    assert requests[0].prompt_ids is requests[2].prompt_ids
    assert answer["usage"]["prompt_tokens"] == len(requests[0].prompt_ids)
    assert answer["usage"]["completion_tokens"] == 21


def test_streamed_choices_begin_in_their_order_and_each_ends(client: AppClient) -> None:
    """openai's stream helper appends a choice that it has not seen, whatever its index says."""
    events = events_of(client.chat(stream=True, n=3))
    assert [event["choices"][0]["index"] for event in events[:3]] == [0, 1, 2]
    assert {event["choices"][0]["delta"]["role"] for event in events[:3]} == {"assistant"}
    for index in range(3):
        assert texts_of(events, index=index) == "Hello!"
        ends = [event["choices"][0]["finish_reason"] for event in events if event["choices"][0]["index"] == index]
        assert ends == [None] * 7 + ["stop"]


def test_stop_string_ends_the_answer_and_aborts_the_sequence(client: AppClient) -> None:
    answer = client.chat(stop="lo").json()
    assert answer["choices"][0]["message"]["content"] == "Hel"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 5
    assert client.backend.aborted == [f"{answer['id']}-0"]


def test_stop_string_is_held_back_from_a_stream(client: AppClient) -> None:
    events = events_of(client.chat(stream=True, stop=["lo!", "??"]))
    assert texts_of(events) == "Hel"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_length_is_the_finish_reason_at_max_tokens(client: AppClient) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        choice = client.chat(**{field: 3}).json()["choices"][0]
        assert choice["message"]["content"] == "Hel"
        assert choice["finish_reason"] == "length"


def test_default_of_max_tokens_is_what_is_left_of_the_context(client: AppClient) -> None:
    client.chat()
    request = client.backend.requests[0]
    assert request.sampling.max_tokens == MAX_MODEL_LEN - len(request.prompt_ids)


def test_default_of_max_tokens_fits_the_cache_too() -> None:
    client = AppClient(FakeBackend(info=engine_info(num_blocks=4)))
    client.chat()
    request = client.backend.requests[0]
    assert len(request.prompt_ids) + request.sampling.max_tokens - 1 == 4 * 16


def test_truncate_clamps_max_tokens_to_the_context(client: AppClient) -> None:
    for fields in ({}, {"context_length_exceeded_behavior": "error"}):
        assert client.chat(max_tokens=10**7, **fields).json()["error"]["code"] == "context_length_exceeded"
    assert client.chat(max_tokens=10**7, context_length_exceeded_behavior="truncate").status_code == 200
    (request,) = client.backend.requests
    assert request.sampling.max_tokens == MAX_MODEL_LEN - len(request.prompt_ids)


def test_omitted_fields_take_the_models_defaults(client: AppClient) -> None:
    client.chat(temperature=None)
    sampling = client.backend.requests[0].sampling
    assert sampling.temperature == DEFAULTS.temperature
    assert sampling.top_k == DEFAULTS.top_k
    assert sampling.repetition_penalty == DEFAULTS.repetition_penalty
    assert sampling.stop_token_ids == TOKENIZER.stop_token_ids
    assert sampling.seed is not None


def test_given_fields_are_taken_literally(client: AppClient) -> None:
    fields = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "min_tokens": 2,
        "seed": -4,
    }
    client.chat(**fields, logit_bias={"20": -1.5, "0": 3})
    sampling = client.backend.requests[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.logit_bias == {20: -1.5, 0: 3}


def test_ignore_eos_leaves_no_stop_token(client: AppClient) -> None:
    answer = client.chat(ignore_eos=True, max_tokens=9).json()
    assert client.backend.requests[0].sampling.stop_token_ids == ()
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"logprobs": None}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 4}, 4),
        ({"logprobs": 3}, 3),
        ({"logprobs": 0}, 0),
    ],
)
def test_logprobs_are_read_as_either_vendor_means_them(
    client: AppClient, fields: dict[str, Any], expected: int | None
) -> None:
    client.chat(**fields)
    assert client.backend.requests[0].sampling.logprobs == expected


def test_logprobs_have_both_shapes_in_one_object(client: AppClient) -> None:
    logprobs = client.chat(logprobs=True, top_logprobs=2, max_tokens=1).json()["choices"][0]["logprobs"]
    token_id = TOKENIZER.encode("H")[0]
    assert logprobs["content"] == [
        {
            "token": "H",
            "logprob": -0.5,
            "bytes": [72],
            "top_logprobs": [
                {"token": "H", "logprob": -0.5, "bytes": [72]},
                {"token": "V", "logprob": -1.0, "bytes": [86]},
            ],
        }
    ]
    assert logprobs["tokens"] == ["H"]
    assert logprobs["token_ids"] == [token_id]
    assert logprobs["token_logprobs"] == [-0.5]
    assert logprobs["top_logprobs"] == [{"H": -0.5, "V": -1.0}]


def test_streamed_logprobs_are_those_of_the_chunk(client: AppClient) -> None:
    events = events_of(client.chat(stream=True, logprobs=1))
    tokens = [token for event in events[1:] for token in event["choices"][0]["logprobs"]["tokens"]]
    assert tokens == [*"Hello!", "<|im_end|>"]


def test_echo_tells_the_prompt_and_its_logprobs(client: AppClient) -> None:
    answer = client.chat(echo=True).json()
    text = "<|startoftext|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert answer["prompt"] == [{"text": text, "logprobs": None}]
    assert answer["choices"][0]["message"]["content"] == "Hello!"
    (prompt,) = client.chat(echo=True, logprobs=1).json()["prompt"]
    assert "".join(prompt["logprobs"]["tokens"]) == text
    assert prompt["logprobs"]["token_logprobs"][:2] == [None, -0.5]
    assert client.backend.requests[-1].sampling.prompt_logprobs == 1
    _, first, *others = events_of(client.chat(echo=True, logprobs=1, stream=True))
    assert first["prompt"] == [prompt]
    assert not any("prompt" in event for event in others)


def test_half_a_character_is_never_sent() -> None:
    client = AppClient(FakeBackend("a\u20ac\U0001f600"))
    events = events_of(client.chat(stream=True))
    assert [event["choices"][0]["delta"]["content"] for event in events] == ["", "a", "\u20ac", "\U0001f600", ""]


def test_past_turns_and_parts_reach_the_prompt(client: AppClient) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "time?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "12:00"},
    ]
    (prompt,) = client.post(CHAT_PATH, chat_body(messages=messages, echo=True)).json()["prompt"]
    for part in ("system\nBe brief.", "user\nWhat time?", '[now(zone="UTC")]', "tool\n12:00"):
        assert part in prompt["text"]


def test_fields_without_effect_get_a_warning(client: AppClient) -> None:
    answer = client.chat(reasoning_effort="high", store=True, service_tier="auto").json()
    assert [warning["message"].partition(" ")[0] for warning in answer["warnings"]] == ["reasoning_effort", "store"]
    events = events_of(client.chat(reasoning_effort="high", stream=True))
    assert ["warnings" in event for event in events] == [False, True] + [False] * (len(events) - 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reasoning_effort", "low"),
        ("reasoning", {"enabled": True}),
        ("chat_template_kwargs", {"enable_thinking": True}),
        ("verbosity", "low"),
        ("prediction", {"type": "content", "content": "a"}),
        ("service_tier", "flex"),
        ("service_tier", "priority"),
        ("store", True),
        ("prompt_cache_retention", "24h"),
        ("prompt_cache_options", {"mode": "explicit"}),
    ],
)
def test_every_field_without_effect_is_told(client: AppClient, field: str, value: object) -> None:
    (warning,) = client.chat(**{field: value}).json()["warnings"]
    assert warning["message"].startswith(f"{field} has no effect: ")


def test_fields_of_messages_without_effect_are_told_once(client: AppClient) -> None:
    past = {"role": "assistant", "content": "a", "reasoning": "r", "reasoning_content": "r", "name": "Bob"}
    answer = client.chat(messages=[past, past, {"role": "user", "content": "Hi", "name": "Ann"}]).json()
    told = [warning["message"].partition(" ")[0] for warning in answer["warnings"]]
    assert told == ["messages[].reasoning", "messages[].reasoning_content", "messages[].name"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/v1/chat/completions", "/chat/completions"])
def test_every_alias_of_the_path_answers(client: AppClient, path: str) -> None:
    assert client.post(path, chat_body()).status_code == 200


def test_defaults_that_clients_send_are_accepted_without_warning(client: AppClient) -> None:
    response = client.chat(
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        functions=[],
        function_call="none",
        parallel_tool_calls=True,
        metadata={"a": "b"},
        store=False,
        service_tier="default",
        user="someone",
        safety_identifier="someone",
        prompt_cache_key="key",
        verbosity="medium",
        best_of=1,
        n=None,
        stop=None,
        stream=None,
        stream_options=None,
        logit_bias=None,
        a_field_of_tomorrow={"x": [1]},
    )
    assert response.status_code == 200
    assert "warnings" not in response.json()


def test_long_text_is_tokenized_like_short_text() -> None:
    client = AppClient(FakeBackend(info=engine_info(num_blocks=10_000, max_model_len=100_000)))
    content = "<|im_end|>" * (LONG_BODY_BYTES // 10 + 1)
    assert client.chat(messages=[{"role": "user", "content": content}]).status_code == 200
    prompt_ids = client.backend.requests[0].prompt_ids
    assert len(prompt_ids) > LONG_BODY_BYTES
    assert prompt_ids.count(EOS) == 1  # the end of the turn; the text itself makes none
