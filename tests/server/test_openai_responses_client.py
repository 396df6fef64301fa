"""The Responses API through the official Python client of OpenAI on a real socket."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lfm.protocol import ErrorInfo, TokenEvent
from lfm.service.responses_store import ResponsesStore
from tests.server.fakes import MODEL, FakeBackend, RunningServer, serving

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with serving(FakeBackend(), responses=ResponsesStore(tmp_path / "responses.sqlite3")) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def check_types(value: Any) -> None:
    """The client builds its objects without checking them; a strict validation shows what it would otherwise hide."""
    type(value).model_validate(value.model_dump(by_alias=True), strict=True)


def test_answers_are_of_the_documented_types(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL, input="Hi", include=["message.output_text.logprobs"], top_logprobs=2, metadata={"a": "b"}
    )
    check_types(response)
    assert response.output_text == "Hello!"
    assert response.status == "completed"
    stream = client.responses.create(model=MODEL, input="Hi", stream=True, max_output_tokens=3)
    events = list(stream)
    for event in events:
        check_types(event)
    assert events[-1].type == "response.incomplete"


def test_stream_helper_puts_one_response_together(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="Hi", instructions="Be brief.") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        response = stream.get_final_response()
    assert text == response.output_text == "Hello!"
    assert response.usage is not None
    assert response.usage.output_tokens == 7


def test_a_conversation_goes_on_and_is_read_back(client: openai.OpenAI, server: RunningServer) -> None:
    first = client.responses.create(model=MODEL, input="One")
    second = client.responses.create(model=MODEL, input="Two", previous_response_id=first.id)
    assert client.responses.retrieve(second.id) == second
    items = list(client.responses.input_items.list(second.id, limit=2, order="asc"))
    assert [item.type for item in items] == ["message"] * 3
    for item in items:
        check_types(item)
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=MODEL, input="Three", previous_response_id=first.id)
    assert refused.value.code == "previous_response_not_found"


def test_a_conversation_may_be_sent_whole_with_the_clients_own_items(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="One", store=False)
    items: list[Any] = [{"role": "user", "content": "One"}, *first.output, {"role": "user", "content": "Two"}]
    assert client.responses.create(model=MODEL, input=items, store=False).output_text == "Hello!"


def test_a_stream_that_fails_tells_the_error(client: openai.OpenAI, server: RunningServer) -> None:
    server.backend.is_held = True

    def fail() -> None:
        (stream,) = server.backend.streams
        for request_id in list(stream.running):
            error = ErrorInfo(message="The engine died.", code="engine_died")
            stream.push(TokenEvent(request_id=request_id, finish_reason="error", error=error))

    stream = client.responses.create(model=MODEL, input="Hi", stream=True)
    server.call(fail)
    last = list(stream)[-1]
    check_types(last)
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.message == "The engine died."


def test_the_store_is_closed_with_the_server(tmp_path: Path) -> None:
    store = ResponsesStore(tmp_path / "responses.sqlite3")
    with serving(FakeBackend(), responses=store) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            client.responses.create(model=MODEL, input="Hi")
        assert store._thread is not None
    assert store._thread is None
