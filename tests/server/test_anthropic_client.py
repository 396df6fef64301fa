"""The official Python client of Anthropic on a real socket, with an engine of a few lines behind it."""

from collections.abc import Iterator
from typing import Any

import pytest

from lfm.config import ServerConfig
from lfm.errors import OverloadedError
from lfm.protocol import ErrorInfo, TokenEvent
from tests.server.fakes import MODEL, FakeBackend, RunningServer, serving, wait_until

anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]

pytestmark = pytest.mark.slow


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with serving(FakeBackend()) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        yield client


def test_answers_are_of_the_documented_types(client: Any, server: RunningServer) -> None:
    server.backend.num_cached_tokens = 3
    message = client.messages.create(model=MODEL, max_tokens=64, messages=MESSAGES, system="Be brief.")
    type(message).model_validate(message.model_dump(), strict=True)
    assert message.content[0].text == "Hello!"
    assert (message.stop_reason, message.usage.cache_read_input_tokens) == ("end_turn", 3)
    count = client.messages.count_tokens(model=MODEL, messages=MESSAGES, system="Be brief.")
    assert count.input_tokens == message.usage.input_tokens + 3
    for event in client.messages.create(model=MODEL, max_tokens=64, messages=MESSAGES, stream=True):
        type(event).model_validate(event.model_dump(), strict=True)


def test_stream_helper_puts_one_message_together(client: Any, server: RunningServer) -> None:
    server.backend.num_cached_tokens = 3
    with client.messages.stream(model=MODEL, max_tokens=64, messages=MESSAGES, stop_sequences=["!"]) as stream:
        assert "".join(stream.text_stream) == "Hello"
        message = stream.get_final_message()
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "!")
    assert message.content[0].text == "Hello"
    num_prompt_tokens = len(server.backend.requests[0].prompt_ids)
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (num_prompt_tokens - 3, 3)
    assert usage.output_tokens == 6


def test_calls_and_results_of_past_turns_are_read(client: Any, server: RunningServer) -> None:
    """As the SDK's own types write them."""
    use = anthropic.types.ToolUseBlock(id="toolu_1", name="now", input={"zone": "UTC"}, type="tool_use")
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "12:00"}]},
    ]
    client.messages.create(model=MODEL, max_tokens=5, messages=messages)
    assert len(server.backend.requests) == 1


def test_errors_are_raised_by_their_types(client: Any, server: RunningServer) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(model="claude", max_tokens=5, messages=MESSAGES)
    assert unknown.value.type == "not_found_error"
    assert unknown.value.request_id
    with pytest.raises(anthropic.BadRequestError, match=r"tools\[0\].type") as refused:
        client.messages.create(
            model=MODEL, max_tokens=5, messages=MESSAGES, tools=[{"type": "bash_20250124", "name": "bash"}]
        )
    assert refused.value.type == "invalid_request_error"
    server.backend.refusal = OverloadedError("The queue is full.", retry_after_s=1, code="queue_full")
    with pytest.raises(anthropic.InternalServerError) as overloaded:
        client.messages.create(model=MODEL, max_tokens=5, messages=MESSAGES)
    assert (overloaded.value.status_code, overloaded.value.type) == (503, "overloaded_error")


def test_an_error_in_a_stream_is_raised(client: Any, server: RunningServer) -> None:
    server.backend.is_held = True

    def fail() -> None:
        (stream,) = server.backend.streams
        for request_id in list(stream.running):
            error = ErrorInfo(message="The engine died.", code="engine_died")
            stream.push(TokenEvent(request_id=request_id, finish_reason="error", error=error))

    stream = client.messages.create(model=MODEL, max_tokens=5, messages=MESSAGES, stream=True)
    server.call(fail)
    with pytest.raises(anthropic.APIStatusError, match="The engine died"):
        list(stream)


def test_leaving_a_stream_frees_the_server(client: Any, server: RunningServer) -> None:
    server.backend.is_held = True
    stream = client.messages.create(model=MODEL, max_tokens=5, messages=MESSAGES, stream=True)
    wait_until(lambda: server.backend.num_reads > 0, what="the start")
    stream.close()
    wait_until(lambda: len(server.backend.aborted) == 1, what="the abort")


@pytest.mark.parametrize("credential", ["api_key", "auth_token"])
def test_the_key_is_sent_and_checked(credential: str) -> None:
    with serving(FakeBackend(), ServerConfig(port=0, api_key="right")) as server:
        with anthropic.Anthropic(base_url=server.url, **{credential: "right"}, max_retries=0) as client:
            assert client.messages.create(model=MODEL, max_tokens=5, messages=MESSAGES).stop_reason == "max_tokens"
        with (
            anthropic.Anthropic(base_url=server.url, **{credential: "wrong"}, max_retries=0) as client,
            pytest.raises(anthropic.AuthenticationError),
        ):
            client.messages.create(model=MODEL, max_tokens=5, messages=MESSAGES)
