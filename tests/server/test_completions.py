"""POST /v1/completions: prompts as text and ids, echo, and the two vendors' shapes."""

from typing import Any

import httpx2
import pytest

from tests.server.fakes import EOS, MODEL, TOKENIZER, AppClient, events_of

TOGETHER = {"User-Agent": "AsyncTogether/Python 3.1.1"}
BOS = TOKENIZER.special.bos


@pytest.fixture
def client() -> AppClient:
    return AppClient()


def for_together(client: AppClient, **fields: Any) -> httpx2.Response:
    return client.post("/v1/completions", {"model": MODEL, "prompt": "abc", **fields}, headers=TOGETHER)


def test_whole_answer_is_openais_text_completion(client: AppClient) -> None:
    answer = client.complete(seed=2).json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["prompt"] == []
    assert answer["choices"] == [
        {"index": 0, "text": "Hello!", "logprobs": None, "finish_reason": "stop", "seed": 2},
    ]
    assert answer["usage"]["prompt_tokens"] == 4


def test_together_gets_its_own_object_names(client: AppClient) -> None:
    assert for_together(client).json()["object"] == "text.completion"
    events = events_of(for_together(client, stream=True, logprobs=1))
    assert {event["object"] for event in events} == {"completion.chunk"}
    assert events[0]["token"] == {"id": TOKENIZER.encode("H")[0], "text": "H", "logprob": -0.5, "special": False}
    assert events[-1]["token"]["special"]
    assert events[-1]["finish_reason"] == "stop"
    assert events[-1]["usage"]["completion_tokens"] == 7
    assert "".join(event["choices"][0]["text"] for event in events) == "Hello!"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[BOS, *TOKENIZER.encode("ab")]]),
        ("<|startoftext|>ab", [[BOS, *TOKENIZER.encode("ab")]]),
        ("a<|im_end|>", [[BOS, *TOKENIZER.encode("a"), EOS]]),
        ("", [[BOS]]),
        (["a", "b"], [[BOS, *TOKENIZER.encode("a")], [BOS, *TOKENIZER.encode("b")]]),
        ([40, 41], [[40, 41]]),
        ([[40], [41, 42]], [[40], [41, 42]]),
        (["a", [40]], [[BOS, *TOKENIZER.encode("a")], [40]]),
        ("\x00", [[BOS, *TOKENIZER.encode("\x00")]]),
    ],
)
def test_a_prompt_may_be_text_or_ids_or_several(client: AppClient, prompt: object, expected: list[list[int]]) -> None:
    assert client.complete(prompt=prompt).status_code == 200
    assert [request.prompt_ids for request in client.backend.requests] == expected


def test_choices_are_numbered_prompt_by_prompt(client: AppClient) -> None:
    answer = client.complete(prompt=["a", "bcd"], n=2, echo=True, seed=1).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["aHello!", "aHello!", "bcdHello!", "bcdHello!"]
    assert [choice["seed"] for choice in answer["choices"]] == [1, 2, 1, 2]
    assert answer["prompt"] == [{"text": "a", "logprobs": None}, {"text": "bcd", "logprobs": None}]
    assert answer["usage"]["prompt_tokens"] == 2 + 4


def test_echo_puts_the_prompt_in_front_but_not_for_together(client: AppClient) -> None:
    assert client.complete(echo=True).json()["choices"][0]["text"] == "abcHello!"
    answer = for_together(client, echo=True).json()
    assert answer["choices"][0]["text"] == "Hello!"
    assert answer["prompt"] == [{"text": "abc", "logprobs": None}]
    streamed = events_of(client.complete(echo=True, stream=True))
    assert "".join(event["choices"][0]["text"] for event in streamed) == "abcHello!"


def test_echo_of_ids_shows_their_text(client: AppClient) -> None:
    answer = client.complete(prompt=[BOS, 111, EOS], echo=True).json()
    assert answer["choices"][0]["text"] == "<|startoftext|>a<|im_end|>Hello!"


def test_echoed_logprobs_cover_prompt_and_output(client: AppClient) -> None:
    choice = client.complete(echo=True, logprobs=2, max_tokens=2).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "abcHe"
    assert logprobs["tokens"] == ["<|startoftext|>", "a", "b", "c", "H", "e"]
    assert logprobs["token_logprobs"] == [None, *[-0.5] * 5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {"a": -0.5, "V": -1.0}
    # The BOS is the server's, so it takes no room in the text that the client sees.
    assert [choice["text"][offset] for offset in logprobs["text_offset"][1:]] == [*"abcHe"]


def test_text_offsets_go_on_through_a_stream(client: AppClient) -> None:
    events = events_of(client.complete(stream=True, logprobs=0, echo=True))
    offsets = [offset for event in events for offset in event["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_usage_chunk_of_a_stream(client: AppClient) -> None:
    events = events_of(client.complete(stream=True, stream_options={"include_usage": True}))
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["total_tokens"] == 4 + 7


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/v1/completions", "/completions"])
def test_every_alias_of_the_path_answers(client: AppClient, path: str) -> None:
    assert client.post(path, {"model": MODEL, "prompt": "a"}).status_code == 200


def test_suffix_and_best_of_pass_where_they_ask_for_nothing(client: AppClient) -> None:
    assert client.complete(suffix="", best_of=2, n=2).status_code == 200
    assert client.complete(suffix=None, best_of=None).status_code == 200
