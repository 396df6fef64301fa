"""POST /tokenize and /detokenize."""

from typing import Any

import pytest

from tests.server.fakes import EOS, MAX_MODEL_LEN, MODEL, TOKENIZER, AppClient

BOS = TOKENIZER.special.bos
IM_END = "<|im_end|>"


@pytest.fixture
def client() -> AppClient:
    return AppClient()


def tokenize(client: AppClient, **fields: Any) -> list[int]:
    answer = client.post("/tokenize", fields).json()
    assert answer["count"] == len(answer["tokens"])
    tokens: list[int] = answer["tokens"]
    return tokens


def refusal(client: AppClient, path: str, **fields: Any) -> dict[str, Any]:
    response = client.post(path, fields)
    assert response.status_code in (400, 404), response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_a_prompt_is_read_as_by_completions(client: AppClient) -> None:
    ids = tokenize(client, prompt=f"a\u20ac{IM_END}", model=MODEL)
    client.complete(prompt=f"a\u20ac{IM_END}")
    assert ids == client.backend.requests[0].prompt_ids == [BOS, *TOKENIZER.encode("a\u20ac"), EOS]
    assert tokenize(client, prompt="a", add_special_tokens=False) == TOKENIZER.encode("a")
    assert tokenize(client, prompt="") == [BOS]


def test_control_tokens_can_be_read_as_the_text_they_are(client: AppClient) -> None:
    ids = tokenize(client, prompt=IM_END, parse_special=False, add_special_tokens=False)
    assert ids == TOKENIZER.encode(IM_END)
    assert EOS not in ids
    assert tokenize(client, prompt=IM_END, parse_special=False)[0] == BOS


def test_messages_are_read_as_by_chat(client: AppClient) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    client.chat(messages=messages)
    whole = client.backend.requests[0].prompt_ids
    assert tokenize(client, messages=messages) == whole
    without = tokenize(client, messages=messages, add_generation_prompt=False)
    assert without == whole[: len(without)]
    assert without[-2:] == [EOS, *TOKENIZER.encode("\n")]


def test_the_answer_tells_the_context_and_the_texts(client: AppClient) -> None:
    answer = client.post("/v1/tokenize", {"prompt": "a\u20ac", "return_token_strs": True}).json()
    assert answer["max_model_len"] == MAX_MODEL_LEN
    assert answer["token_strs"] == ["<|startoftext|>", "a", "\ufffd", "\ufffd", "\ufffd"]
    assert client.post("/tokenize", {"prompt": "a"}).json()["token_strs"] is None


@pytest.mark.parametrize("text", ["", "a\u20ac\U0001f600", f"x{IM_END}y\x00", "<|im_start|>user\nHi"])
def test_detokenize_is_the_way_back(client: AppClient, text: str) -> None:
    ids = tokenize(client, prompt=text, add_special_tokens=False)
    assert client.post("/detokenize", {"tokens": ids}).json() == {"prompt": text}
    assert client.post("/v1/detokenize", {"tokens": [BOS]}).json() == {"prompt": "<|startoftext|>"}


@pytest.mark.parametrize(
    ("path", "param", "fields"),
    [
        ("/tokenize", "prompt", {}),
        ("/tokenize", "prompt", {"prompt": "a", "messages": [{"role": "user", "content": "Hi"}]}),
        ("/tokenize", "prompt", {"prompt": 5}),
        ("/tokenize", "prompt", {"prompt": ["a"]}),
        ("/tokenize", "prompt", {"prompt": "a" * (MAX_MODEL_LEN * 100)}),
        ("/tokenize", "messages", {"messages": []}),
        ("/tokenize", "messages", {"messages": 0}),
        ("/tokenize", "messages[0].role", {"messages": [{"role": "wizard", "content": ""}]}),
        ("/tokenize", "add_special_tokens", {"prompt": "a", "add_special_tokens": "no"}),
        ("/tokenize", "model", {"prompt": "a", "model": "gpt-4o"}),
        ("/detokenize", "tokens", {}),
        ("/detokenize", "tokens", {"tokens": "a"}),
        ("/detokenize", "tokens[1]", {"tokens": [1, "a"]}),
        ("/detokenize", "tokens[0]", {"tokens": [True]}),
        ("/detokenize", "tokens", {"tokens": [-1]}),
        ("/detokenize", "tokens[0]", {"tokens": [2**70]}),
        ("/detokenize", "tokens", {"tokens": [TOKENIZER.num_ids]}),
        ("/detokenize", "tokens", {"tokens": [1] * (MAX_MODEL_LEN + 1)}),
        ("/detokenize", "model", {"tokens": [1], "model": "gpt-4o"}),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_wrong_field_is_named(client: AppClient, path: str, param: str, fields: dict[str, Any]) -> None:
    assert refusal(client, path, **fields)["param"] == param
    assert client.backend.requests == []
