"""The official Python clients of OpenAI and Together on a real socket, with an engine of a few lines behind it."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import together

from lfm.errors import OverloadedError
from lfm.protocol import ErrorInfo, TokenEvent
from tests.server.fakes import MODEL, FakeBackend, RunningServer, serving
from tests.waiting import wait_until

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]

pytestmark = pytest.mark.slow


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with serving(FakeBackend()) as server:
        yield server


@pytest.fixture
def openai_client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(params=["", "/v1"], ids=["plain-base-url", "base-url-with-v1"])
def together_client(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[together.Together]:
    with together.Together(base_url=server.url + request.param, api_key="any", max_retries=0, project_id="p") as client:
        yield client


def test_openai_stream_helper_puts_one_message_together(openai_client: openai.OpenAI) -> None:
    """It adds the strings of all deltas up, the role's included."""
    with openai_client.chat.completions.stream(model=MODEL, messages=MESSAGES, n=3) as stream:
        completion = stream.get_final_completion()
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    for choice in completion.choices:
        assert choice.message.role == "assistant"
        assert choice.message.content == "Hello!"
        assert choice.finish_reason == "stop"


def test_openai_stream_helper_collects_logprobs(openai_client: openai.OpenAI) -> None:
    with openai_client.chat.completions.stream(model=MODEL, messages=MESSAGES, logprobs=True) as stream:
        logprobs = stream.get_final_completion().choices[0].logprobs
    assert logprobs is not None
    assert [token.token for token in logprobs.content or []] == [*"Hello!", "<|im_end|>"]


def test_openai_answers_are_of_the_documented_types(openai_client: openai.OpenAI) -> None:
    """The client builds its objects without checking them; a strict validation shows what it would otherwise hide."""
    chat = openai_client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2)
    type(chat).model_validate(chat.model_dump(), strict=True)
    text = openai_client.completions.create(model=MODEL, prompt="a", logprobs=2)
    type(text).model_validate(text.model_dump(), strict=True)
    for chunk in openai_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, stream=True, stream_options={"include_usage": True}
    ):
        type(chunk).model_validate(chunk.model_dump(), strict=True)
    for model in openai_client.models.list():
        type(model).model_validate(model.model_dump(), strict=True)
    assert openai_client.models.retrieve(MODEL).id == MODEL


def test_together_answers_are_of_the_documented_types(together_client: together.Together) -> None:
    """Without logprobs: Together types those of a chunk as one number, which several tokens cannot be."""
    chat = together_client.chat.completions.create(model=MODEL, messages=MESSAGES, echo=True)
    type(chat).model_validate(chat.model_dump(), strict=True)
    text = together_client.completions.create(model=MODEL, prompt="a", echo=True)
    type(text).model_validate(text.model_dump(), strict=True)
    for chunk in together_client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True):
        type(chunk).model_validate(chunk.model_dump(), strict=True)
    for part in together_client.completions.create(model=MODEL, prompt="a", stream=True, logprobs=1):
        type(part).model_validate(part.model_dump(), strict=True)


def test_together_reads_logprobs_and_tokens(together_client: together.Together) -> None:
    answer = together_client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == [*"Hello!", "<|im_end|>"]
    assert logprobs.token_logprobs == [-0.5] * 7
    stream = together_client.completions.create(model=MODEL, prompt="a", stream=True, logprobs=1)
    assert "".join(chunk.token.text for chunk in stream) == "Hello!"


def test_together_lists_models_of_both_its_apis(together_client: together.Together) -> None:
    assert list(together_client.models.list()) == []
    (supported,) = list(together_client.models.list_supported())
    assert supported.id == MODEL
    type(supported).model_validate(supported.model_dump(by_alias=True))


def test_an_error_in_a_stream_is_raised_by_both(
    server: RunningServer, openai_client: openai.OpenAI, together_client: together.Together
) -> None:
    server.backend.is_held = True

    def fail() -> None:
        for stream in server.backend.streams:
            for request_id in list(stream.running):
                error = ErrorInfo(message="The engine died.", code="engine_died")
                stream.push(TokenEvent(request_id=request_id, finish_reason="error", error=error))

    for client, kind in ((openai_client, openai.APIError), (together_client, together.APIError)):
        stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        server.call(fail)
        with pytest.raises(kind, match="The engine died"):
            list(stream)


def test_a_full_queue_is_tried_again(server: RunningServer) -> None:
    """Both clients retry a 503; the wait is the one that the server names."""
    server.backend.refusal = OverloadedError("The queue is full.", retry_after_s=0.5, code="queue_full")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=1) as client:
        with pytest.raises(openai.InternalServerError) as refused:
            client.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"] == "1"
        assert refused.value.request.headers["x-stainless-retry-count"] == "1"


@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_call_frees_the_server(server: RunningServer, stream: bool) -> None:
    server.backend.is_held = True

    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:

            async def call() -> None:
                answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
                if stream:
                    async for _ in answer:  # type: ignore[union-attr]
                        pass

            task = asyncio.create_task(call())
            while server.backend.num_reads == 0:  # noqa: ASYNC110 - another thread counts
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())
    wait_until(lambda: len(server.backend.aborted) == 1, what="the abort")


def test_async_together_gets_its_own_shapes(server: RunningServer) -> None:
    """Its User-Agent begins with AsyncTogether, unlike that of the synchronous client."""

    async def scenario() -> None:
        async with together.AsyncTogether(base_url=server.url, api_key="any", max_retries=0) as client:
            answer = await client.completions.create(model=MODEL, prompt="a")
            assert answer.object == "text.completion"
            chunks = [chunk async for chunk in await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True
            )]  # fmt: skip
            assert {choice.delta.role for chunk in chunks for choice in chunk.choices} == {"assistant"}
            assert chunks[-1].usage is not None

    asyncio.run(scenario())
