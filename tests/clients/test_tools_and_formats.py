"""Tool calls and structured outputs of a served model with random weights, as the official clients use them.

Such a model writes nonsense, so whatever is well formed here is so because of the grammar.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
import together
from pydantic import BaseModel, Field

from tests.clients.served import Served

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6, "pattern": "^[a-z ]*$"},
        "days": {"type": "integer", "minimum": -9, "maximum": 9},
        "unit": {"enum": ["celsius", 'quo"ted', "it's", None]},
        "where": {
            "type": "object",
            "properties": {"tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
            "required": ["tags"],
            "additionalProperties": False,
        },
    },
    "required": ["where", "unit"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
FLAT_TOOLS: list[Any] = [{"type": "function", "strict": True, **tool["function"]} for tool in TOOLS]
MESSAGES: list[Any] = [{"role": "user", "content": "How is the weather in Bern?"}]
SEEDS = (1, 2)

pytestmark = pytest.mark.slow


class City(BaseModel):
    name: str = Field(max_length=6)
    size: Literal["small", "large"]
    twins: list[int] = Field(max_length=2)


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.api_key, max_retries=0) as client:
        yield client


def check_call(name: str, arguments: str) -> None:
    decoded = json.loads(arguments)
    if name == "get_weather":
        jsonschema.validate(decoded, PARAMETERS)
    else:
        assert (name, decoded) == ("now", {})


def create(client: openai.OpenAI, served: Served, **fields: Any) -> Any:
    fields = {"messages": MESSAGES, "max_tokens": 1500, **fields}
    return client.chat.completions.create(model=served.model, **fields)


@pytest.mark.parametrize("form", ["pythonic", "json"])
def test_required_calls_are_valid_for_every_choice(client: openai.OpenAI, served: Served, form: str) -> None:
    extra = {"tool_format": form}
    answer = create(client, served, tools=TOOLS, tool_choice="required", n=3, seed=1, extra_body=extra)
    ids = []
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        for call in choice.message.tool_calls:
            check_call(call.function.name, call.function.arguments)
            ids.append(call.id)
    assert len(ids) == len(set(ids)) >= 3


def test_a_named_tool_alone_is_called_and_once_if_asked(client: openai.OpenAI, served: Served) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    answer = create(client, served, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, n=3, seed=1)
    for made in answer.choices:
        (call,) = made.message.tool_calls
        assert call.function.name == "get_weather"
        check_call("get_weather", call.function.arguments)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_stream_helper_puts_the_same_calls_together(client: openai.OpenAI, served: Served, seed: int) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "seed": seed}
    whole = create(client, served, **fields).choices[0]
    with client.chat.completions.stream(model=served.model, messages=MESSAGES, max_tokens=1500, **fields) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == whole.finish_reason == "tool_calls"
    calls = [[(c.function.name, c.function.arguments) for c in one.message.tool_calls] for one in (whole, streamed)]
    assert calls[0] == calls[1]
    assert [(event.name, event.arguments) for event in done] == calls[0]
    assert all(call.id.count("call_") == 1 for call in streamed.message.tool_calls or [])


def test_a_result_goes_back_to_the_model(client: openai.OpenAI, served: Served) -> None:
    message = create(client, served, tools=TOOLS, tool_choice="required", seed=2).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sun"} for call in message.tool_calls]
    messages = [*MESSAGES, message.model_dump(exclude_none=True), *results]
    answer = create(client, served, tools=TOOLS, tool_choice="none", messages=messages, max_tokens=5)
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage.prompt_tokens_details.cached_tokens > 0
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, served, tools=TOOLS, messages=[*MESSAGES, results[0]])
    assert refused.value.param == "messages[1].tool_call_id"


def test_parse_gives_an_object_of_the_users_own_type(client: openai.OpenAI, served: Served) -> None:
    chat = client.chat.completions.parse(
        model=served.model, messages=MESSAGES, response_format=City, max_tokens=500, n=2, seed=1
    )
    assert all(isinstance(choice.message.parsed, City) for choice in chat.choices)
    response = client.responses.parse(model=served.model, input="Bern?", text_format=City, max_output_tokens=500)
    assert isinstance(response.output_parsed, City)
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_schema"


@pytest.mark.parametrize(
    "value",
    [
        {"type": "json_schema", "json_schema": {"name": "city", "schema": City.model_json_schema()}},
        {"type": "grammar", "grammar": 'start: "{" NAME "}"\nNAME: /"name": "[a-z]{1,5}"/'},
    ],
    ids=["json_schema", "grammar"],
)
def test_tools_with_an_answer_format_give_one_or_the_other(
    client: openai.OpenAI, served: Served, value: dict[str, object]
) -> None:
    answer = create(client, served, tools=TOOLS, n=6, seed=3, extra_body={"response_format": value})
    num_answers = 0
    for choice in answer.choices:
        for call in choice.message.tool_calls or []:
            check_call(call.function.name, call.function.arguments)
        if choice.message.content is not None:
            assert choice.message.tool_calls is None
            assert choice.finish_reason == "stop"
            num_answers += 1
            if value["type"] == "json_schema":
                City.model_validate_json(choice.message.content)
            else:
                assert re.fullmatch(r'\{"name": "[a-z]{1,5}"\}', choice.message.content)
    assert num_answers in range(1, 6), "random weights do both"


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        ({"type": "regex", "pattern": "[ab]-[01]"}, {f"{a}-{b}" for a in "ab" for b in "01"}),
        ({"type": "grammar", "grammar": 'start: "yes" | "no, " ("a" | "b")'}, {"yes", "no, a", "no, b"}),
        (
            {"type": "json_object", "schema": {"type": "object", "properties": {}, "additionalProperties": False}},
            {"{}"},
        ),
    ],
    ids=["regex", "grammar", "json_object"],
)
def test_formats_beyond_openais_hold(
    client: openai.OpenAI, served: Served, value: dict[str, object], answers: set[str]
) -> None:
    made = create(client, served, n=4, extra_body={"response_format": value, "min_tokens": 0})
    assert {choice.message.content for choice in made.choices} <= answers
    assert {choice.finish_reason for choice in made.choices} == {"stop"}


def test_responses_call_functions_and_take_their_results(client: openai.OpenAI, served: Served) -> None:
    fields: dict[str, Any] = {
        "tools": FLAT_TOOLS,
        "tool_choice": "required",
        "max_output_tokens": 1500,
        "extra_body": {"seed": 1},
    }
    with client.responses.stream(model=served.model, input="Weather?", **fields) as stream:
        for _ in stream:
            pass
        first = stream.get_final_response()
    assert first.status == "completed"
    results: list[Any] = []
    for item in first.output:
        assert item.type == "function_call"
        check_call(item.name, item.arguments)
        results.append({"type": "function_call_output", "call_id": item.call_id, "output": "sun"})
    assert type(first).model_validate(first.model_dump(warnings=False))
    second = client.responses.create(
        model=served.model, previous_response_id=first.id, input=results, tools=FLAT_TOOLS, max_output_tokens=4
    )
    assert second.status == "incomplete"
    stored = client.responses.retrieve(first.id)
    assert [item.id for item in stored.output] == [item.id for item in first.output]
    again: Any = [results[0], results[0]]
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=served.model, previous_response_id=first.id, input=again)
    assert refused.value.param == "input[1].call_id"


def test_a_cancelled_call_frees_the_server(
    client: openai.OpenAI, served: Served, wait_until_idle: Callable[[], None]
) -> None:
    stream = create(client, served, tools=TOOLS, tool_choice="required", n=4, stream=True)
    next(iter(stream))
    stream.close()
    wait_until_idle()


def test_a_grammar_that_crashes_the_library_costs_its_request_alone(client: openai.OpenAI, served: Served) -> None:
    rules = "\n".join(["start: x0", *[f'x{i}: "a" x{i + 1}' for i in range(3500)], 'x3500: "b"'])
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, served, extra_body={"response_format": {"type": "grammar", "grammar": rules}})
    assert refused.value.param == "response_format.grammar"
    good = create(client, served, extra_body={"response_format": {"type": "regex", "pattern": "[xy]"}})
    assert good.choices[0].message.content in ("x", "y")


@pytest.mark.parametrize("suffix", ["", "/v1"], ids=["plain-base-url", "base-url-with-v1"])
def test_togethers_client_calls_tools_whole_and_streamed(served: Served, suffix: str) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 1500, "seed": 2}
    with together.Together(base_url=served.url + suffix, api_key=served.api_key, max_retries=0) as client:
        whole = client.chat.completions.create(model=served.model, messages=MESSAGES, **fields)
        type(whole).model_validate(whole.model_dump(), strict=True)
        calls: dict[int, list[str]] = {}
        for chunk in client.chat.completions.create(model=served.model, messages=MESSAGES, stream=True, **fields):
            for piece in chunk.choices[0].delta.tool_calls or []:
                assert piece.id
                assert piece.type == "function"
                calls.setdefault(int(piece.index), []).append(piece.function.arguments)
    message: Any = whole.choices[0].message
    assert ["".join(pieces) for pieces in calls.values()] == [call.function.arguments for call in message.tool_calls]
    for call in message.tool_calls:
        check_call(call.function.name, call.function.arguments)


def test_anthropics_client_calls_a_tool(served: Served) -> None:
    anthropic = pytest.importorskip("anthropic")
    tools = [{"name": "get_weather", "description": "Weather", "input_schema": PARAMETERS}]
    with (
        anthropic.Anthropic(base_url=served.url, api_key=served.api_key, max_retries=0) as client,
        client.messages.stream(
            model=served.model,
            max_tokens=1500,
            messages=MESSAGES,
            tools=tools,
            tool_choice={"type": "any"},
            extra_body={"seed": 1},
        ) as stream,
    ):
        for _ in stream:
            pass
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    for block in message.content:
        assert (block.type, block.name) == ("tool_use", "get_weather")
        jsonschema.validate(block.input, PARAMETERS)
