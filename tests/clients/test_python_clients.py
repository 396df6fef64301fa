"""The official Python clients of OpenAI and Together against a served model, and the product page's calls."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import together

from tests.clients.served import Served
from tests.waiting import wait_until

HERE = Path(__file__).resolve().parent
STOP_TOKEN_IDS = (2, 7)  # <|endoftext|> and <|im_end|>: banned where a test needs a certain length
NO_EOS: dict[str, int] = {str(token_id): -100 for token_id in STOP_TOKEN_IDS}
MESSAGES: list[Any] = [{"role": "user", "content": "Count to three."}]

pytestmark = pytest.mark.slow


@pytest.fixture
def openai_client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.api_key, max_retries=0) as client:
        yield client


@pytest.fixture(params=["", "/v1"], ids=["plain-base-url", "base-url-with-v1"])
def together_client(served: Served, request: pytest.FixtureRequest) -> Iterator[together.Together]:
    """Its base URL has no /v1, but people give it one: it then calls /v1/v1/chat/completions, which must work too."""
    url = f"{served.url}{request.param}"
    with together.Together(base_url=url, api_key=served.api_key, max_retries=0) as client:
        yield client


def joined(chunks: list[Any], *, index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_openai_chat_answers(openai_client: openai.OpenAI, served: Served) -> None:
    answer = openai_client.chat.completions.create(
        model=served.model, messages=MESSAGES, max_tokens=8, logit_bias=NO_EOS
    )
    assert answer.object == "chat.completion"
    assert answer.model == served.model
    assert [choice.index for choice in answer.choices] == [0]
    assert answer.choices[0].message.role == "assistant"
    assert isinstance(answer.choices[0].message.content, str)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_openai_stream_is_the_answer_in_pieces(openai_client: openai.OpenAI, served: Served) -> None:
    whole = openai_client.chat.completions.create(
        model=served.model, messages=MESSAGES, max_tokens=24, seed=3, logit_bias=NO_EOS
    )
    stream = openai_client.chat.completions.create(
        model=served.model,
        messages=MESSAGES,
        max_tokens=24,
        seed=3,
        logit_bias=NO_EOS,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert joined(chunks) == whole.choices[0].message.content
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_openai_completions_answer_each_prompt(openai_client: openai.OpenAI, served: Served) -> None:
    answer = openai_client.completions.create(
        model=served.model, prompt=["One, two,", "Red, green,"], max_tokens=6, seed=1, logit_bias=NO_EOS
    )
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    stream = openai_client.completions.create(
        model=served.model, prompt="One, two,", max_tokens=6, seed=1, logit_bias=NO_EOS, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == answer.choices[0].text


def test_openai_completions_take_token_ids_and_echo_them(openai_client: openai.OpenAI, served: Served) -> None:
    text = openai_client.completions.create(
        model=served.model, prompt="abc", max_tokens=4, seed=1, echo=True, logit_bias=NO_EOS
    )
    assert text.choices[0].text.startswith("abc")
    ids = openai_client.completions.create(model=served.model, prompt=[1, 40, 41], max_tokens=4, logit_bias=NO_EOS)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3


def test_openai_lists_the_served_model(openai_client: openai.OpenAI, served: Served) -> None:
    models = openai_client.models.list()
    assert models.object == "list"
    assert [model.id for model in models.data] == [served.model]
    assert models.data[0].object == "model"
    assert openai_client.models.retrieve(served.model).id == served.model


def test_openai_n_gives_seeded_choices(openai_client: openai.OpenAI, served: Served) -> None:
    several = openai_client.chat.completions.create(
        model=served.model, messages=MESSAGES, max_tokens=16, seed=5, n=3, logit_bias=NO_EOS
    )
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert several.usage is not None
    assert several.usage.completion_tokens == 3 * 16
    stream = openai_client.chat.completions.create(
        model=served.model, messages=MESSAGES, max_tokens=16, seed=5, n=3, logit_bias=NO_EOS, stream=True
    )
    chunks = list(stream)
    assert [joined(chunks, index=index) for index in range(3)] == texts
    # Choice i of seed s is the only choice of seed s + i.
    single = openai_client.chat.completions.create(
        model=served.model, messages=MESSAGES, max_tokens=16, seed=7, logit_bias=NO_EOS
    )
    assert single.choices[0].message.content == texts[2]
    assert single.usage is not None
    assert several.usage.prompt_tokens == single.usage.prompt_tokens


def test_openai_stop_string_ends_the_answer(openai_client: openai.OpenAI, served: Served) -> None:
    whole = openai_client.completions.create(
        model=served.model, prompt="Say", max_tokens=48, seed=11, logit_bias=NO_EOS
    )
    text = whole.choices[0].text
    stop = next(character for character in text[8:] if character.isascii() and character.isprintable())
    cut = openai_client.completions.create(
        model=served.model, prompt="Say", max_tokens=48, seed=11, logit_bias=NO_EOS, stop=[stop]
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_logprobs_come_in_the_shape_of_openai(openai_client: openai.OpenAI, served: Served) -> None:
    answer = openai_client.chat.completions.create(
        model=served.model,
        messages=MESSAGES,
        max_tokens=6,
        seed=2,
        logprobs=True,
        top_logprobs=3,
        logit_bias=NO_EOS,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 6
    for token in logprobs.content:
        assert token.logprob <= 0
        top = [alternative.logprob for alternative in token.top_logprobs]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert top[0] >= token.logprob
    ordinary = [bytes(token.bytes or []) for token in logprobs.content if not token.token.startswith("<|")]
    assert b"".join(ordinary).decode("utf-8", errors="replace") == answer.choices[0].message.content


def test_logprobs_come_in_the_shape_of_together(together_client: together.Together, served: Served) -> None:
    answer = together_client.chat.completions.create(
        model=served.model, messages=MESSAGES, max_tokens=6, seed=2, logprobs=3, logit_bias=NO_EOS
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or []) == 6
    assert len(logprobs.token_ids or []) == 6
    assert len(logprobs.token_logprobs or []) == 6
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs or [])


def test_usage_counts_cached_prompt_tokens(openai_client: openai.OpenAI, served: Served) -> None:
    messages: list[Any] = [{"role": "user", "content": "A prefix of several blocks. " * 20}]
    first, second = (
        openai_client.chat.completions.create(model=served.model, messages=messages, max_tokens=2) for _ in range(2)
    )
    assert first.usage is not None
    assert first.usage.prompt_tokens_details is not None
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert second.usage.prompt_tokens // 2 < cached < second.usage.prompt_tokens
    assert second.usage.model_dump()["cached_tokens"] == cached  # Together's clients look for the flat one


def test_openai_unknown_model_and_wrong_key_are_told_apart(openai_client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match=served.model):
        openai_client.chat.completions.create(model="no/such-model", messages=MESSAGES)
    with pytest.raises(openai.AuthenticationError):
        openai_client.with_options(api_key="wrong").chat.completions.create(model=served.model, messages=MESSAGES)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("temperature", 2.5),
        ("max_tokens", 10_000_000),
        ("n", 129),
        ("tool_choice", "sometimes"),
        ("top_logprobs", 99),
        ("response_format", "json"),
    ],
)
def test_openai_bad_request_names_the_field(
    field: str, value: object, openai_client: openai.OpenAI, served: Served
) -> None:
    request: dict[str, Any] = {"model": served.model, "messages": MESSAGES, "max_tokens": 1, field: value}
    with pytest.raises(openai.BadRequestError) as refused:
        openai_client.chat.completions.create(**request)
    assert refused.value.param == field
    assert refused.value.type == "invalid_request_error"
    assert field in refused.value.message


def test_defaults_that_clients_send_are_no_error(openai_client: openai.OpenAI, served: Served) -> None:
    answer = openai_client.chat.completions.create(
        model=served.model,
        messages=MESSAGES,
        max_tokens=2,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        user="someone",
        extra_body={"a_field_of_tomorrow": 1},
    )
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_a_client_that_leaves_a_stream_frees_the_server(
    openai_client: openai.OpenAI, served: Served, wait_until_idle: Callable[[], None]
) -> None:
    wait_until_idle()
    stream = openai_client.chat.completions.create(
        model=served.model, messages=MESSAGES, max_tokens=1500, logit_bias=NO_EOS, stream=True
    )
    next(iter(stream))
    wait_until(lambda: served.metric("vllm:num_requests_running") == 1, seconds=10, what="the start of the stream")
    stream.close()
    wait_until_idle()


def test_a_client_that_gives_up_waiting_frees_the_server(
    openai_client: openai.OpenAI, served: Served, wait_until_idle: Callable[[], None]
) -> None:
    wait_until_idle()
    before = served.metric("vllm:generation_tokens_total")
    with pytest.raises(openai.APITimeoutError):
        openai_client.with_options(timeout=0.3).chat.completions.create(
            model=served.model, messages=MESSAGES, max_tokens=1500, logit_bias=NO_EOS
        )
    wait_until_idle()
    assert served.metric("vllm:generation_tokens_total") - before < 1500


def test_together_chat_answers_and_streams(together_client: together.Together, served: Served) -> None:
    answer = together_client.chat.completions.create(
        model=served.model, messages=MESSAGES, max_tokens=16, seed=3, logit_bias=NO_EOS
    )
    assert answer.object == "chat.completion"
    assert answer.prompt == []
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].seed == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].message is not None
    stream = together_client.chat.completions.create(
        model=served.model, messages=MESSAGES, max_tokens=16, seed=3, logit_bias=NO_EOS, stream=True
    )
    chunks = list(stream)
    assert joined(chunks) == answer.choices[0].message.content
    assert {choice.delta.role for chunk in chunks for choice in chunk.choices} == {"assistant"}
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage][-1] == 16


def test_together_completions_answer(together_client: together.Together, served: Served) -> None:
    answer = together_client.completions.create(
        model=served.model, prompt="One, two,", max_tokens=6, seed=1, logit_bias=NO_EOS
    )
    assert answer.object == "text.completion"
    assert answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6


def test_together_gets_a_bare_array_of_models(together_client: together.Together, served: Served) -> None:
    models = together_client.get("/v1/models", cast_to=list[dict[str, Any]])
    assert isinstance(models, list)
    assert [model["id"] for model in models] == [served.model]
    assert models[0]["type"] == "chat"
    assert list(together_client.models.list(project_id="default")) == []  # nothing was uploaded to any project


def test_together_errors_become_the_right_exceptions(together_client: together.Together, served: Served) -> None:
    create = together_client.chat.completions.create
    with pytest.raises(together.NotFoundError, match=served.model):
        create(model="no/such-model", messages=MESSAGES)
    with pytest.raises(together.BadRequestError):
        create(model=served.model, messages=[])
    with pytest.raises(together.AuthenticationError):
        together_client.with_options(api_key="wrong").chat.completions.create(model=served.model, messages=MESSAGES)
    clamped = create(
        model=served.model,
        messages=MESSAGES,
        max_tokens=10_000_000,
        stop=["e", " ", "a"],
        context_length_exceeded_behavior="truncate",
    )
    assert clamped.choices[0].finish_reason in ("stop", "length")


def test_product_page_python_prints_the_answer(served: Served) -> None:
    command = [sys.executable, str(HERE / "product_page" / "chat.py")]
    done = subprocess.run(command, env=served.environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert done.stdout != "None\n"


def test_product_page_curl_answers(served: Served) -> None:
    if not shutil.which("curl"):
        pytest.skip("needs curl, which is not installed")
    command = ["sh", str(HERE / "product_page" / "chat.sh")]
    done = subprocess.run(command, env=served.environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["model"] == served.model
    assert isinstance(answer["choices"][0]["message"]["content"], str)
