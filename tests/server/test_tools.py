"""Tools in all API families: what reaches prompt and engine, and what an answer that calls them looks like."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from lfm.errors import RequestError
from lfm.protocol import GrammarSpec
from lfm.server.answer_models import ChatAnswer, MessageAnswer, ResponseAnswer
from lfm.service.responses_store import ResponsesStore
from tests.server.fakes import MODEL, TOKENIZER, AppClient, AsgiCall, FakeBackend, TrialHere, events_of, until
from tests.server.toolbox import (
    ARGUMENTS,
    CALLS,
    CITY,
    END,
    FORMAT_PARAM,
    PATHS,
    START,
    USER,
    body_of,
    client_that_answers,
    error_of,
    format_of,
    post,
    schema_tool,
    streamed,
    tools_of,
    whole,
)

START_ID = TOKENIZER.special.tool_call_start
FAMILIES = list(PATHS)
FINISH = {"chat": "tool_calls", "responses": "completed", "messages": "tool_use"}
CUT = {"chat": "length", "responses": "incomplete", "messages": "max_tokens"}
LIMIT = {"chat": "max_tokens", "responses": "max_output_tokens", "messages": "max_tokens"}
REQUIRED: dict[str, object] = {"chat": "required", "responses": "required", "messages": {"type": "any"}}
NONE: dict[str, object] = {"chat": "none", "responses": "none", "messages": {"type": "none"}}
NAMED: dict[str, object] = {
    "chat": {"type": "function", "function": {"name": "now"}},
    "responses": {"type": "function", "name": "now"},
    "messages": {"type": "tool", "name": "now"},
}
ONE_CALL: dict[str, dict[str, object]] = {
    "chat": {"parallel_tool_calls": False},
    "responses": {"parallel_tool_calls": False},
    "messages": {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
}
ANSWER = {"type": "json_schema", "name": "city", "schema": CITY}

family_of = pytest.mark.parametrize("family", FAMILIES)


def prompt_of(client: AppClient) -> str:
    return b"".join(map(TOKENIZER.token_bytes, client.backend.requests[-1].prompt_ids)).decode()


def grammar_of(client: AppClient) -> GrammarSpec:
    grammar = client.backend.requests[-1].grammar
    assert grammar is not None
    return grammar


# What an answer looks like.


@family_of
def test_calls_are_no_text(family: str) -> None:
    answer = whole(client_that_answers(CALLS), family, tools=tools_of(family))
    assert answer.text == ""
    assert answer.calls == [("get_weather", ARGUMENTS[0]), ("now", {})]
    assert answer.finish == FINISH[family]
    assert len(set(answer.ids)) == 2
    assert {id_.partition("_")[0] for id_ in answer.ids} == {"toolu" if family == "messages" else "call"}


@family_of
@pytest.mark.parametrize("text", [CALLS, f"Let me see.{CALLS}", "No call.", "", f"{START}[now()]{END}"])
def test_a_stream_builds_up_the_whole_answer(family: str, text: str) -> None:
    answers = [read(client_that_answers(text), family, tools=tools_of(family)) for read in (whole, streamed)]
    assert (answers[0].text, answers[0].calls) == (answers[1].text, answers[1].calls)
    assert answers[0].finish == answers[1].finish
    assert answers[0].text == text.partition(START)[0]


@family_of
def test_the_json_form_of_calls_is_read_as_well(family: str) -> None:
    calls = json.dumps([{"name": "get_weather", "arguments": ARGUMENTS[0]}, {"name": "now", "arguments": {}}])
    for read in (whole, streamed):
        answer = read(client_that_answers(f"{START}{calls}{END}"), family, tools=tools_of(family), tool_format="json")
        assert answer.calls == [("get_weather", ARGUMENTS[0]), ("now", {})]


@family_of
@pytest.mark.parametrize("num_tokens", [1, 5, 20, 25, 35, 40])
def test_a_call_that_is_cut_says_so_in_both_ways(family: str, num_tokens: int) -> None:
    fields = {"tools": tools_of(family), LIMIT[family]: num_tokens}
    answers = [read(client_that_answers(CALLS), family, **fields) for read in (whole, streamed)]
    assert {answer.finish for answer in answers} == {CUT[family]}
    if family == "messages":  # the clients read what is whole of a stream's arguments; the body has just that
        answers = [answers[0], answers[0]]
    assert answers[0].calls == answers[1].calls
    assert answers[0].text == ""


def test_a_cut_call_of_messages_has_what_is_whole_of_its_input() -> None:
    tokens = len(f'{START}[get_weather(city="Bern", days=') - len(START) + 1
    answer = whole(client_that_answers(CALLS), "messages", tools=tools_of("messages"), max_tokens=tokens)
    assert answer.calls == [("get_weather", {"city": "Bern"})]


def test_openai_gets_id_and_name_once_and_together_the_id_in_every_delta() -> None:
    client = client_that_answers(CALLS)

    def pieces(**headers: str) -> list[dict[str, Any]]:
        body = body_of("chat", tools=tools_of("chat"), stream=True)
        chunks = events_of(client.post(PATHS["chat"], body, headers=headers))
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        return [piece for delta in deltas for piece in delta.get("tool_calls", [])]

    openai = pieces()
    assert [piece["index"] for piece in openai] == sorted(piece["index"] for piece in openai)
    for index in (0, 1):
        first, *others = [piece for piece in openai if piece["index"] == index]
        assert set(first) == {"index", "id", "type", "function"}
        assert set(first["function"]) == {"name", "arguments"}
        assert all(set(piece) == {"index", "function"} and set(piece["function"]) == {"arguments"} for piece in others)
    assert len([piece for piece in openai if piece["index"] == 0]) > 5, "arguments come as they are written"
    together = pieces(**{"user-agent": "Together/Python 3.1.1"})
    assert len({piece["id"] for piece in together}) == 2
    assert all(piece["type"] == "function" for piece in together)
    assert sum("name" in piece["function"] for piece in together) == 2


@family_of
@pytest.mark.parametrize("text", [CALLS, f"Let me see.{CALLS}"])
def test_answers_with_calls_are_as_the_openapi_document_says(family: str, text: str) -> None:
    models: dict[str, type[BaseModel]] = {"chat": ChatAnswer, "responses": ResponseAnswer, "messages": MessageAnswer}
    formats = format_of(family, ANSWER)
    body = post(client_that_answers(text), family, tools=tools_of(family), tool_choice=REQUIRED[family], **formats)
    models[family].model_validate_json(body.content, strict=True, extra="forbid")


def test_a_response_tells_its_tools_and_its_format() -> None:
    tools = tools_of("responses")
    fields = {"tools": tools, "tool_choice": {"type": "function", "name": "now"}, "text": {"format": ANSWER}}
    answer = post(AppClient(), "responses", **fields).json()
    assert answer["tools"] == [{"strict": None, **tool} for tool in tools]
    assert answer["tool_choice"] == fields["tool_choice"]
    assert answer["text"] == {"format": ANSWER}
    plain = post(AppClient(), "responses").json()
    assert (plain["tools"], plain["tool_choice"], plain["text"]) == ([], "auto", {"format": {"type": "text"}})


def test_a_response_that_called_goes_on_with_the_results(tmp_path: Path) -> None:
    store = ResponsesStore(tmp_path / "responses.sqlite3")
    client = AppClient(FakeBackend(f"Let me see.{CALLS}"), responses=store)
    first = post(client, "responses", tools=tools_of("responses")).json()
    calls = [item for item in first["output"] if item["type"] == "function_call"]
    results = [{"type": "function_call_output", "call_id": c["call_id"], "output": c["name"]} for c in calls]
    fields = {"input": results[::-1], "previous_response_id": first["id"], "tools": tools_of("responses")}
    second = post(client, "responses", **fields).json()
    before, after = (request.prompt_ids for request in client.backend.requests)
    turns = "<|im_end|>\n<|im_start|>tool\nget_weather<|im_end|>\n<|im_start|>tool\nnow<|im_end|>\n"
    written = TOKENIZER.encode_raw(f"Let me see.{CALLS}{turns}<|im_start|>assistant\n")[1:]
    assert after == before + written
    listed = client.get(f"/v1/responses/{second['id']}/input_items?order=asc").json()["data"]
    assert [item["type"] for item in listed] == [
        *("message", "message", "function_call", "function_call", "function_call_output", "function_call_output")
    ]
    store.close()


def test_a_cut_call_of_a_stored_response_is_no_part_of_what_follows(tmp_path: Path) -> None:
    store = ResponsesStore(tmp_path / "responses.sqlite3")
    client = AppClient(FakeBackend(CALLS), responses=store)
    first = post(client, "responses", tools=tools_of("responses"), max_output_tokens=20).json()
    assert [item["status"] for item in first["output"]] == ["incomplete"]
    post(client, "responses", previous_response_id=first["id"], input="Go on")
    assert START not in prompt_of(client)
    store.close()


def test_every_choice_has_calls_of_its_own() -> None:
    client = client_that_answers(CALLS)
    choices = post(client, "chat", tools=tools_of("chat"), n=3).json()["choices"]
    ids = [call["id"] for choice in choices for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 6
    assert len({id(request.grammar) for request in client.backend.requests}) == 1


def test_a_message_of_calls_alone_has_no_content() -> None:
    message = post(client_that_answers(CALLS), "chat", tools=tools_of("chat")).json()["choices"][0]["message"]
    assert message["content"] is None
    message = post(client_that_answers(f"A{CALLS}"), "chat", tools=tools_of("chat")).json()["choices"][0]["message"]
    assert message["content"] == "A"


def test_without_tools_nothing_is_a_call() -> None:
    choice = post(client_that_answers(f"{START}[f()]{END}"), "chat").json()["choices"][0]
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"


def test_logprobs_of_calls_are_in_no_text_of_a_response() -> None:
    fields = {"tools": tools_of("responses"), "include": ["message.output_text.logprobs"]}
    for text, tokens in ((f"Hm.{CALLS}", [*"Hm."]), ("Hm.", [*"Hm.", "<|im_end|>"])):
        response = post(client_that_answers(text), "responses", **fields).json()
        parts = [item["content"][0] for item in response["output"] if item["type"] == "message"]
        assert [entry["token"] for entry in parts[0]["logprobs"]] == tokens
        assert streamed(client_that_answers(text), "responses", **fields).text == "Hm."
    response = post(client_that_answers(CALLS), "responses", **fields).json()
    assert [item["type"] for item in response["output"]] == ["function_call"] * 2


# What reaches prompt and engine.


@family_of
def test_the_prompt_shows_the_tools_as_the_model_was_trained(family: str) -> None:
    client = AppClient()
    whole(client, family, tools=[schema_tool(family, "f", CITY, strict=True)])
    shown = json.dumps({"name": "f", "description": "D", "parameters": CITY})
    assert f"<|im_start|>system\nList of tools: [{shown}]<|im_end|>\n" in prompt_of(client)


@family_of
def test_auto_waits_for_the_models_own_call(family: str) -> None:
    client = AppClient()
    whole(client, family, tools=tools_of(family))
    assert grammar_of(client).trigger_id == START_ID
    assert client.backend.requests[-1].sampling.banned_ids == ()


@family_of
def test_a_required_call_begins_at_once(family: str) -> None:
    client = AppClient()
    whole(client, family, tools=tools_of(family), tool_choice=REQUIRED[family])
    assert grammar_of(client).trigger_id is None
    whole(client, family, tools=tools_of(family), tool_choice=NAMED[family])
    assert grammar_of(client).trigger_id is None
    assert "now()" in grammar_of(client).text
    assert "get_weather" not in grammar_of(client).text
    assert "get_weather" in prompt_of(client)


@family_of
def test_none_shows_the_tools_and_bans_the_token_that_opens_a_call(family: str) -> None:
    client = AppClient()
    whole(client, family, tools=tools_of(family), tool_choice=NONE[family])
    (request,) = client.backend.requests
    assert request.grammar is None
    assert request.sampling.banned_ids == (START_ID,)
    assert "get_weather" in prompt_of(client)


@family_of
def test_one_call_at_a_time_is_in_the_grammar(family: str) -> None:
    client = AppClient()
    whole(client, family, tools=tools_of(family))
    several = grammar_of(client)
    whole(client, family, tools=tools_of(family), **ONE_CALL[family])
    assert grammar_of(client) != several


def test_some_of_the_tools_may_be_allowed() -> None:
    client = AppClient()
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    whole(client, "chat", tools=tools_of("chat"), tool_choice=choice)
    assert grammar_of(client).trigger_id == START_ID
    assert "get_weather" not in grammar_of(client).text
    flat = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}
    whole(client, "responses", tools=tools_of("responses"), tool_choice=flat)
    assert grammar_of(client).trigger_id is None


def test_togethers_odd_form_of_a_choice_is_read() -> None:
    client = AppClient()
    choice = {"index": 0, "id": "x", "type": "function", "function": {"name": "now", "arguments": ""}}
    whole(client, "chat", tools=tools_of("chat"), tool_choice=choice)
    assert grammar_of(client).trigger_id is None


@family_of
def test_tools_and_an_answer_format_together_allow_either(family: str) -> None:
    client = client_that_answers('{"city": "Bern"}')
    answer = whole(client, family, tools=tools_of(family), **format_of(family, ANSWER))
    assert (answer.text, answer.calls) == ('{"city": "Bern"}', [])
    assert grammar_of(client).trigger_id is None
    answer = whole(client_that_answers(CALLS), family, tools=tools_of(family), **format_of(family, ANSWER))
    assert len(answer.calls) == 2


@family_of
def test_a_lark_grammar_beside_tools_is_tried_by_itself_as_well(family: str) -> None:
    """A walk into the grammar of calls or answer may go to the calls, and never see the client's own."""
    client = AppClient()
    lark = format_of(family, {"type": "grammar", "grammar": 'start: "yes" | "no"'})
    whole(client, family, tools=tools_of(family), **lark)
    assert grammar_of(client).trigger_id is None
    assert isinstance(client.trial, TrialHere)
    assert [spec == grammar_of(client) for spec in client.trial.tried] == [False, True]
    for text in ("nonsense [", "start: start"):
        bad = format_of(family, {"type": "grammar", "grammar": text})
        where, _ = error_of(family, client.post(PATHS[family], body_of(family, tools=tools_of(family), **bad)))
        assert where.startswith(f"{FORMAT_PARAM[family]}.grammar")
    assert len(client.backend.requests) == 1


@family_of
@pytest.mark.parametrize(
    "value",
    [
        {"type": "json_object"},
        {"type": "json_object", "schema": CITY},
        {"type": "json_schema", "schema": CITY, "strict": True},
        {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}},
        {"type": "regex", "pattern": "[a-c]{3}"},
        {"type": "grammar", "grammar": 'start: "yes" | "no"'},
    ],
    ids=lambda value: "-".join(value),
)
def test_every_answer_format_becomes_a_grammar(family: str, value: dict[str, Any]) -> None:
    client = AppClient()
    answer = whole(client, family, **format_of(family, value))
    assert grammar_of(client).trigger_id is None
    assert answer.text == "Hello!"  # the fake engine minds no grammar
    assert isinstance(client.trial, TrialHere)
    assert client.trial.tried == [grammar_of(client)]


def test_completions_take_answer_formats() -> None:
    client = AppClient()
    assert client.complete(response_format={"type": "regex", "pattern": "[a-c]+"}).status_code == 200
    assert grammar_of(client).trigger_id is None
    for field, value in (("tools", tools_of("chat")), ("tool_choice", "required"), ("tool_format", "json")):
        assert error_of("chat", client.complete(**{field: value}))[0] == field


@family_of
def test_plain_text_is_no_format(family: str) -> None:
    client = AppClient()
    whole(client, family, **format_of(family, {"type": "text"}))
    assert client.backend.requests[0].grammar is None


def test_messages_take_the_format_in_both_places() -> None:
    client = AppClient()
    whole(client, "messages", output_config={"format": ANSWER, "effort": "low"})
    assert client.backend.requests[0].grammar is not None
    both = body_of("messages", output_config={"format": ANSWER}, output_format=ANSWER)
    assert "output_format" in error_of("messages", client.post(PATHS["messages"], both))[1]
    prefilled = body_of("messages", messages=[USER, {"role": "assistant", "content": "{"}], output_format=ANSWER)
    assert "output_format" in error_of("messages", client.post(PATHS["messages"], prefilled))[1]


@family_of
def test_json_calls_are_asked_for_in_the_prompt_and_written_in_the_history(family: str) -> None:
    """A field alone says nothing to the model, so the system prompt gets the sentence that it was trained on."""
    client = AppClient()
    whole(client, family, tools=tools_of(family), tool_format="json")
    assert "<|im_start|>system\nOutput function calls as JSON.\nList of tools: [" in prompt_of(client)
    assert '"name' in grammar_of(client).text
    system = {"role": "system", "content": "Output function calls as JSON, please."}
    past = {
        "role": "assistant",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
    }
    whole(client, "chat", tools=tools_of("chat"), messages=[system, USER, past])
    assert prompt_of(client).count("Output function calls as JSON") == 1
    assert f'{START}[{{"name": "now", "arguments": {{}}}}]{END}' in prompt_of(client)
    whole(client, "chat", tools=tools_of("chat"), messages=[system, USER, past], tool_format="pythonic")
    assert f"{START}[now()]{END}" in prompt_of(client)


@family_of
def test_what_a_schema_says_without_effect_is_told(family: str) -> None:
    schema = {**CITY, "x-unit": "m"}
    body = post(AppClient(), family, tools=[schema_tool(family, "f", schema)]).json()
    assert "x-unit" in body["warnings"][0]["message"]
    body = post(AppClient(), family, **format_of(family, {"type": "json_schema", "schema": schema})).json()
    assert "x-unit" in body["warnings"][0]["message"]


def test_tools_count_and_show_in_the_other_endpoints() -> None:
    client = AppClient()
    fields = body_of("messages", tools=tools_of("messages"), tool_choice={"type": "any"})
    whole(client, "messages", tools=tools_of("messages"), tool_choice={"type": "any"})
    num_tokens = len(client.backend.requests[0].prompt_ids)
    assert client.post("/v1/messages/count_tokens", fields).json() == {"input_tokens": num_tokens}
    whole(client, "chat", tools=tools_of("chat"), tool_format="json")
    chat_ids = client.backend.requests[-1].prompt_ids
    tokenized = client.post("/tokenize", {"messages": [USER], "tools": tools_of("chat"), "tool_format": "json"})
    assert tokenized.json()["tokens"] == chat_ids
    rendered = client.post(f"{PATHS['chat']}/render", body_of("chat", tools=tools_of("chat"), tool_format="json"))
    assert rendered.json()["prompts"][0]["token_ids"] == chat_ids


# Conversations that go on.


@pytest.mark.parametrize("text", ["", "Let me see.", "<think>Hm.</think>Now:"])
def test_a_round_trip_through_chat_is_the_identity(text: str) -> None:
    """What the model wrote stands in the next prompt as it was, token by token."""
    client = client_that_answers(f"{text}{CALLS}")
    answer = post(client, "chat", tools=tools_of("chat")).json()["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "r"} for call in answer["tool_calls"]]
    post(client, "chat", tools=tools_of("chat"), messages=[USER, answer, *results])
    first, second = (request.prompt_ids for request in client.backend.requests)
    assert second[: len(first)] == first
    written = TOKENIZER.encode_raw(f"{text}{CALLS}<|im_end|>\n<|im_start|>tool\nr<|im_end|>\n")[1:]
    assert second[len(first) : len(first) + len(written)] == written


def test_a_round_trip_through_messages_is_the_identity() -> None:
    client = client_that_answers(f"Let me see.{CALLS}")
    answer = post(client, "messages", tools=tools_of("messages")).json()
    results = [{"type": "tool_result", "tool_use_id": block["id"], "content": "r"} for block in answer["content"][1:]]
    turns = [USER, {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": results}]
    post(client, "messages", tools=tools_of("messages"), messages=turns)
    first, second = (request.prompt_ids for request in client.backend.requests)
    written = TOKENIZER.encode_raw(f"Let me see.{CALLS}<|im_end|>\n<|im_start|>tool\nr<|im_end|>\n")[1:]
    assert second[: len(first) + len(written)] == first + written


def test_results_may_come_in_any_order() -> None:
    client = AppClient()
    past = {
        "role": "assistant",
        "tool_calls": [{"id": name, "function": {"name": name, "arguments": "{}"}} for name in ("a", "b")],
    }
    results = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in ("b", "a")]
    post(client, "chat", messages=[USER, past, *results])
    assert "tool\nof a<|im_end|>\n<|im_start|>tool\nof b" in prompt_of(client)


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PAST = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "r"}


@pytest.mark.parametrize(
    ("param", "messages"),
    [
        ("messages[1].tool_call_id", [USER, RESULT]),
        ("messages[2].tool_call_id", [USER, PAST, {**RESULT, "tool_call_id": "b"}]),
        ("messages[2].tool_call_id", [USER, PAST, {**RESULT, "tool_call_id": None}]),
        ("messages[2].tool_call_id", [USER, PAST, {"role": "tool", "content": "r"}]),
        ("messages[3].tool_call_id", [USER, PAST, RESULT, RESULT]),
        ("messages[1].tool_call_id", [USER, RESULT, PAST]),
        ("messages[1].tool_calls[1].id", [USER, {**PAST, "tool_calls": [CALL, CALL]}]),
        ("messages[2].tool_calls[0].id", [USER, PAST, PAST]),
        ("messages[1].tool_calls[0].id", [USER, {**PAST, "tool_calls": [{**CALL, "id": 5}]}]),
        (
            "messages[1].tool_calls[0].function.arguments",
            [USER, {**PAST, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{a: 1}"}}]}],
        ),
        (
            "messages[1].tool_calls[0].function.arguments",
            [USER, {**PAST, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"a": NaN}'}}]}],
        ),
        (
            "messages[1].tool_calls[0].function.arguments",
            [USER, {**PAST, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1]"}}]}],
        ),
        ("messages[0].tool_calls", [{**USER, "tool_calls": [CALL]}]),
    ],
)
def test_a_history_that_does_not_fit_together_is_named(param: str, messages: list[Any]) -> None:
    client = AppClient()
    assert error_of("chat", client.post(PATHS["chat"], body_of("chat", messages=messages)))[0] == param
    assert error_of("chat", client.post("/tokenize", {"messages": messages}))[0] == param
    assert client.backend.requests == []


def test_the_id_of_an_answered_call_may_come_again() -> None:
    post(AppClient(), "chat", messages=[USER, PAST, RESULT, PAST, RESULT])


# Bad input.

DEEP: dict[str, object] = {"type": "string"}
for _ in range(200):
    DEEP = {"type": "array", "items": DEEP}
LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
LONG = {"type": "object", "properties": {"a": {"type": "array", "items": {}, "minItems": 1_000_000}}, "required": ["a"]}
CATASTROPHE = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a|a)*(b{1,900}c{1,900}){900}$"}}}
LOOK = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)a"}}}
BACKREFERENCE = {"type": "object", "properties": {"a": {"type": "string", "pattern": r"(a)\1"}}}
CONTRADICTION = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 5, "maximum": 4}},
    "required": ["a"],
}
HUGE = {"type": "object", "description": "x" * 10_000_000}
SCHEMAS = {
    "deep": DEEP,
    "loop": LOOP,
    "endless": ENDLESS,
    "too-long": LONG,
    "catastrophic-regex": CATASTROPHE,
    "look-around": LOOK,
    "back-reference": BACKREFERENCE,
    "contradiction": CONTRADICTION,
    "10-mb": HUGE,
    "foreign-ref": {"$ref": "https://example.com/schema"},
    "missing-ref": {"$ref": "#/$defs/none"},
    "a-string": "{}",
    "an-array": [],
    "a-number": 5,
    "false": False,
    "wrong-type": {"type": "thing"},
    "not": {"type": "object", "not": {}},
    "if": {"type": "object", "if": {}, "then": {}},
}
SCHEMA_FIELD = {"chat": "function.parameters", "responses": "parameters", "messages": "input_schema"}


@family_of
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_a_schema_that_cannot_be_honoured_is_named(family: str, schema: object) -> None:
    client = AppClient()
    where, message = error_of(
        family, client.post(PATHS[family], body_of(family, tools=[schema_tool(family, "f", schema)]))
    )
    assert f"tools[0].{SCHEMA_FIELD[family]}" in where
    assert client.backend.requests == []
    fields = format_of(family, {"type": "json_schema", "name": "x", "schema": schema})
    where, message = error_of(family, client.post(PATHS[family], body_of(family, **fields)))
    assert where.startswith(f"{FORMAT_PARAM[family]}.schema"), message
    assert client.backend.requests == []


@family_of
@pytest.mark.parametrize("name", ["no name", "", "f(x)", "a" * 129, "caf\u00e9", "f\n", START, "../f", None, 5])
def test_a_tool_name_that_nobody_could_call_is_named(family: str, name: object) -> None:
    client = AppClient()
    body = body_of(family, tools=[*tools_of(family), schema_tool(family, name, CITY)])
    where, _ = error_of(family, client.post(PATHS[family], body))
    assert f"tools[2]{'.function' if family == 'chat' else ''}.name" in where
    assert client.backend.requests == []


@family_of
@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("tools", {"tools": {}}),
        ("tools", {"tools": "now"}),
        ("tools", {"tools": 0}),
        ("tools[0]", {"tools": ["now"]}),
        ("tools[0].type", {"tools": [{"type": "code_interpreter"}]}),
        ("tool_choice", {"tool_choice": 5}),
        ("tool_choice", {"tool_choice": "banana"}),
        ("tool_choice", {"tool_choice": []}),
        ("tool_choice", {"tool_choice": {"type": "banana"}}),
        ("tool_format", {"tool_format": "xml"}),
        ("tool_format", {"tool_format": {}}),
    ],
)
def test_a_wrong_tool_field_is_named(family: str, param: str, fields: dict[str, object]) -> None:
    client = AppClient()
    where, _ = error_of(family, client.post(PATHS[family], body_of(family, **fields)))
    assert param in where
    assert client.backend.requests == []


@family_of
def test_tools_that_do_not_fit_together_are_named(family: str) -> None:
    client = AppClient()
    tool = schema_tool(family, "f", CITY)
    for where, fields in (
        ("tools[1]", {"tools": [tool, tool]}),
        ("tool_choice", {"tool_choice": REQUIRED[family]}),
        ("tool_choice", {"tools": [tool], "tool_choice": NAMED[family]}),
        ("tools", {"tools": [tool] * 513}),
    ):
        assert where in error_of(family, client.post(PATHS[family], body_of(family, **fields)))[0]
    assert client.backend.requests == []


@family_of
@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("", "json_object"),
        ("", []),
        (".type", {}),
        (".type", {"type": "xml"}),
        (".json_schema", {"type": "json_schema", "json_schema": []}),
        (".json_schema.schema", {"type": "json_schema", "json_schema": {"name": "x"}}),
        (".name", {"type": "json_schema", "name": "x" * 65, "schema": {}}),
        (".pattern", {"type": "regex"}),
        (".pattern", {"type": "regex", "pattern": "("}),
        (".pattern", {"type": "regex", "pattern": "(?=a)"}),
        (".pattern", {"type": "regex", "pattern": "(a{1,1000}){1,1000}"}),
        (".grammar", {"type": "grammar"}),
        (".grammar", {"type": "grammar", "grammar": "start: " + "x" * 70_000}),
        (".grammar", {"type": "grammar", "grammar": "nonsense ["}),
        (".grammar", {"type": "grammar", "grammar": "start: <|im_start|>"}),
    ],
)  # fmt: skip
def test_an_answer_format_that_cannot_be_honoured_is_named(family: str, param: str, value: object) -> None:
    client = AppClient()
    where, message = error_of(family, client.post(PATHS[family], body_of(family, **format_of(family, value))))
    assert where.startswith(f"{FORMAT_PARAM[family]}{param}"), message
    assert client.backend.requests == []


# The trial.


class HeldTrial(TrialHere):
    """Knows some grammars, and holds the others until it is released."""

    def __init__(self, known: set[str]) -> None:
        super().__init__()
        self.known = known
        self.is_released = threading.Event()

    def has_passed(self, spec: GrammarSpec) -> bool:
        return spec.text in self.known

    def check(self, spec: GrammarSpec, *, param: str) -> None:
        self.tried.append(spec)
        assert self.is_released.wait(10)
        raise RequestError("it takes more than 5 s", param=param)


@family_of
def test_a_grammar_that_fails_its_trial_costs_its_request_alone(family: str) -> None:
    class Failing(TrialHere):
        def check(self, spec: GrammarSpec, *, param: str) -> None:
            raise RequestError(f"{param} makes a grammar that cannot be used.", param=param)

    client = AppClient(trial=Failing())
    for where, fields in (
        ("tools", {"tools": tools_of(family)}),
        (FORMAT_PARAM[family], format_of(family, ANSWER)),
    ):
        for suffix in ("", "/render"):
            response = client.post(f"{PATHS[family]}{suffix}", body_of(family, **fields))
            assert error_of(family, response)[0].startswith(where)
    assert client.backend.requests == []
    assert whole(client, family).text == "Hello!"


def test_a_slow_trial_holds_up_nobody_else() -> None:
    first = AppClient()
    post(first, "chat", tools=tools_of("chat"))
    trial = HeldTrial({grammar_of(first).text})
    client = AppClient(trial=trial)

    async def scenario() -> None:
        slow = AsgiCall(client.app, body_of("chat", response_format={"type": "regex", "pattern": "x+"}))
        task = asyncio.create_task(slow.run())
        await until(lambda: bool(trial.tried))
        for body in (body_of("chat"), body_of("chat", tools=tools_of("chat"))):
            call = AsgiCall(client.app, body)
            await call.run()
            assert call.status == 200
        assert not task.done()
        trial.is_released.set()
        await task
        assert slow.status == 400

    asyncio.run(scenario())


def test_who_leaves_while_a_grammar_is_tried_is_forgotten() -> None:
    trial = HeldTrial(set())
    client = AppClient(FakeBackend(), trial=trial)

    async def scenario() -> None:
        calls = [AsgiCall(client.app, body_of("chat", tools=tools_of("chat"))) for _ in range(2)]
        tasks = [asyncio.create_task(call.run()) for call in calls]
        await until(lambda: bool(trial.tried))
        for call in calls:
            call.disconnect()
        await asyncio.gather(*tasks)
        trial.is_released.set()

    asyncio.run(scenario())
    assert client.backend.requests == []
    assert len(trial.tried) == 1, "the second one was never tried"


# No text of a client becomes a control token.

SPECIAL = [TOKENIZER.token_bytes(token_id).decode() for token_id in sorted(TOKENIZER.special_ids)]


def hostile_bodies(head: str, tail: str) -> dict[str, dict[str, Any]]:
    """The text in every field that a client controls and that reaches a prompt, whole and from two sides."""
    text = head + tail
    schema = {
        "type": "object",
        "title": text,
        "description": text,
        "properties": {
            text: {"type": "string", "description": text},
            "a": {"enum": [text, head, tail], "default": text, "examples": [text]},
            "b": {"const": text},
        },
    }
    chat_parts = [{"type": "text", "text": head}, {"type": "text", "text": tail}]
    input_parts = [{"type": "input_text", "text": head}, {"type": "input_text", "text": tail}]
    arguments = json.dumps({text: text, "list": [text, {text: head}], "a": head, "b": tail})
    return {
        "chat": body_of(
            "chat",
            messages=[
                {"role": "system", "content": text, "name": text},
                {"role": "user", "content": chat_parts, "name": text},
                {
                    "role": "assistant",
                    "content": text,
                    "tool_calls": [{"id": text, "function": {"name": text, "arguments": arguments}}],
                },
                {"role": "tool", "tool_call_id": text, "content": text, "name": text},
                {"role": "user", "content": tail},
            ],
            tools=[schema_tool("chat", "f", schema, description=text, strict=True)],
            documents=[{"text": text, "title": text, "url": f"https://example.com/{text}"}],
            user=text,
            stop=[text],
        ),
        "responses": body_of(
            "responses",
            instructions=text,
            input=[
                {"role": "user", "content": input_parts},
                {"type": "function_call", "call_id": text, "name": text, "arguments": arguments},
                {"type": "function_call_output", "call_id": text, "output": input_parts},
                {"role": "assistant", "content": text},
                {"role": "user", "content": text},
            ],
            tools=[schema_tool("responses", "f", schema, description=text)],
            metadata={"a": text},
            user=text,
        ),
        "messages": body_of(
            "messages",
            system=chat_parts,
            messages=[
                {"role": "user", "content": chat_parts},
                {
                    "role": "assistant",
                    "content": [*chat_parts, {"type": "tool_use", "id": text, "name": text, "input": {text: [text]}}],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": text, "content": chat_parts}, *chat_parts],
                },
            ],
            tools=[schema_tool("messages", "f", schema, description=text)],
            stop_sequences=[text],
        ),
    }


def controls_of(client: AppClient, family: str, head: str, tail: str) -> list[int]:
    """The control tokens of the prompt, as the render endpoint shows it."""
    response = client.post(f"{PATHS[family]}/render", hostile_bodies(head, tail)[family])
    assert response.status_code == 200, response.text
    (prompt,) = response.json()["prompts"]
    return [token_id for token_id in prompt["token_ids"] if token_id in TOKENIZER.added_ids]


@family_of
@pytest.mark.parametrize("token", SPECIAL)
def test_no_text_becomes_a_control_token(family: str, token: str) -> None:
    """Each special token, and each split of it, in every field that a client controls: the ids stay those of a text."""
    client = AppClient()
    expected = controls_of(client, family, "plain", "text")
    for cut in range(len(token)):
        assert controls_of(client, family, token[:cut], token[cut:]) == expected


@pytest.mark.parametrize("token", SPECIAL)
def test_formats_stop_strings_and_names_of_schemas_are_no_prompt(token: str) -> None:
    client = AppClient()
    fields = {
        "stop": token,
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": token,
                "description": token,
                "schema": {"type": "object", "description": token, "properties": {token: {"enum": [token]}}},
            },
        },
    }
    with_fields = client.post(f"{PATHS['chat']}/render", body_of("chat", **fields)).json()
    without = client.post(f"{PATHS['chat']}/render", body_of("chat")).json()
    assert with_fields["prompts"] == without["prompts"]
    assert with_fields["model"] == MODEL
