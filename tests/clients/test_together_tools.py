"""Together's Python client with tools and answer formats, and what the SDKs do when a server refuses once."""

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
import together

from tests.clients.served import Served
from tests.waiting import wait_until

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Thun"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
MESSAGES: list[Any] = [{"role": "user", "content": "How warm is it in Bern and in Thun?"}]
CHOICES = 8  # that many, of a seed, so that one of them makes two calls

pytestmark = pytest.mark.slow


@pytest.fixture(params=["", "/v1"], ids=["plain-base-url", "base-url-with-v1"])
def base_url(served: Served, request: pytest.FixtureRequest) -> str:
    return f"{served.url}{request.param}"


def checked(arguments: str) -> dict[str, Any]:
    given: dict[str, Any] = json.loads(arguments)
    assert set(given) == {"city", "days"}
    assert given["city"] in ("Bern", "Thun")
    assert given["days"] in range(10)
    return given


def test_together_calls_tools_and_returns_their_results(base_url: str, served: Served) -> None:
    with together.Together(base_url=base_url, api_key=served.api_key, max_retries=0) as client:
        fields: dict[str, Any] = {"model": served.model, "tools": TOOLS, "max_tokens": 600}
        answer = client.chat.completions.create(messages=MESSAGES, tool_choice="required", n=CHOICES, seed=1, **fields)
        assert {choice.finish_reason for choice in answer.choices} == {"tool_calls"}
        made = [choice.message.tool_calls or [] for choice in answer.choices if choice.message]
        wanted = [[checked(call.function.arguments) for call in calls] for calls in made]
        assert max(len(calls) for calls in made) > 1

        streamed: list[dict[int, str]] = [{} for _ in range(CHOICES)]
        for chunk in client.chat.completions.create(
            messages=MESSAGES, tool_choice="required", n=CHOICES, seed=1, stream=True, **fields
        ):
            for choice in chunk.choices:
                for call in choice.delta.tool_calls or []:
                    pieces = streamed[choice.index]
                    pieces[call.index] = pieces.get(call.index, "") + (call.function.arguments or "")
        assert [[checked(text) for text in calls.values()] for calls in streamed] == wanted

        calls = max(made, key=len)
        spoken = {"role": "assistant", "content": None, "tool_calls": [call.model_dump() for call in calls]}
        heard = [{"role": "tool", "tool_call_id": call.id, "content": "21 degrees"} for call in calls]
        history: Any = [*MESSAGES, spoken, *heard]
        last = client.chat.completions.create(messages=history, tool_choice="none", **{**fields, "max_tokens": 8})
        assert last.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_schema", "json_schema": {"name": "weather", "schema": PARAMETERS}},
        {"type": "json_object", "schema": PARAMETERS},
        {"type": "regex", "pattern": r'\{"city": "(Bern|Thun)", "days": [0-9]\}'},
    ],
    ids=["json_schema", "json_object-with-schema", "regex"],
)
def test_together_gets_answers_of_the_wanted_form(wanted: Any, served: Served) -> None:
    with together.Together(base_url=served.url, api_key=served.api_key, max_retries=0) as client:
        answer = client.chat.completions.create(
            model=served.model, messages=MESSAGES, response_format=wanted, max_tokens=600, seed=1
        )
    message = answer.choices[0].message
    assert message is not None
    checked(message.content or "")


def test_a_server_that_refuses_once_is_asked_again(flaky_url: str, served: Served) -> None:
    fields: dict[str, Any] = {"model": served.model, "messages": MESSAGES, "max_tokens": 1}
    with openai.OpenAI(base_url=f"{flaky_url}/openai/v1", api_key=served.api_key, max_retries=1) as one:
        assert one.chat.completions.create(**fields).usage is not None
    with together.Together(base_url=f"{flaky_url}/together", api_key=served.api_key, max_retries=1) as other:
        assert other.chat.completions.create(**fields).usage is not None
    hasty = openai.OpenAI(base_url=f"{flaky_url}/never/v1", api_key=served.api_key, max_retries=0)
    with hasty, pytest.raises(openai.InternalServerError, match="queue is full"):
        hasty.chat.completions.create(**fields)


def test_leaving_a_stream_of_calls_frees_the_server(served: Served, wait_until_idle: Callable[[], None]) -> None:
    """The arguments are long, so that the stream is left in their middle."""
    wait_until_idle()
    long = {"type": "object", "properties": {"text": {"type": "string", "minLength": 1200}}, "required": ["text"]}
    tools: list[Any] = [{"type": "function", "function": {"name": "write", "parameters": long}}]
    with together.Together(base_url=served.url, api_key=served.api_key, max_retries=0) as client:
        stream = client.chat.completions.create(
            model=served.model, messages=MESSAGES, tools=tools, tool_choice="required", max_tokens=1500, stream=True
        )
        next(iter(stream))
        wait_until(lambda: served.metric("vllm:num_requests_running") == 1, seconds=10, what="the start of the call")
        stream.close()
        wait_until_idle()
