"""Tools, answers that call them, and what every API family makes of both, for the tests of tool calls."""

import json
from dataclasses import dataclass
from typing import Any

from tests.server.fakes import MODEL, AppClient, FakeBackend, events_of, named_events_of

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
START, END = "<|tool_call_start|>", "<|tool_call_end|>"
CALLS = f'{START}[get_weather(city="Bern", days=3), now()]{END}'
ARGUMENTS = [{"city": "Bern", "days": 3}, {}]
USER = {"role": "user", "content": "Hi"}
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}


def schema_tool(family: str, name: object, schema: object, **fields: object) -> dict[str, object]:
    """A tool as a family writes it."""
    described = {"description": "D", **fields}
    if family == "chat":
        return {"type": "function", "function": {"name": name, "parameters": schema, **described}}
    if family == "responses":
        return {"type": "function", "name": name, "parameters": schema, **described}
    return {"name": name, "input_schema": schema, **described}


def tools_of(family: str) -> list[dict[str, object]]:
    return [schema_tool(family, "get_weather", CITY), schema_tool(family, "now", {"type": "object", "properties": {}})]


def body_of(family: str, **fields: Any) -> dict[str, Any]:
    if family == "messages":
        return {"model": MODEL, "messages": [USER], "max_tokens": 500, **fields}
    return {"model": MODEL, **({"input": "Hi"} if family == "responses" else {"messages": [USER]}), **fields}


def format_of(family: str, value: object) -> dict[str, object]:
    """The field of an answer format with this value."""
    if family == "responses":
        return {"text": {"format": value}}
    return {"response_format" if family == "chat" else "output_format": value}


FORMAT_PARAM = {"chat": "response_format", "responses": "text.format", "messages": "output_format"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What all families say in their own ways."""

    text: str
    calls: list[tuple[str, Any]]
    ids: list[str]
    finish: str


def post(client: AppClient, family: str, **fields: Any) -> Any:
    response = client.post(PATHS[family], body_of(family, **fields))
    assert response.status_code == 200, response.text
    return response


def whole(client: AppClient, family: str, **fields: Any) -> Answer:
    return read(family, post(client, family, **fields).json())


def streamed(client: AppClient, family: str, **fields: Any) -> Answer:
    response = post(client, family, stream=True, **fields)
    if family == "chat":
        return _join_chunks([event for event in events_of(response) if event["choices"]])
    events = named_events_of(response)
    if family == "responses":
        return read(family, _build_response(events))
    return read(family, _build_message(events))


def read(family: str, body: dict[str, Any]) -> Answer:
    if family == "chat":
        choice = body["choices"][0]
        return _of_message(choice["message"], choice["finish_reason"])
    if family == "responses":
        calls = [item for item in body["output"] if item["type"] == "function_call"]
        texts = [item["content"][0]["text"] for item in body["output"] if item["type"] == "message"]
        named = [(call["name"], _arguments(call["arguments"])) for call in calls]
        return Answer(text="".join(texts), calls=named, ids=[call["call_id"] for call in calls], finish=body["status"])
    calls = [block for block in body["content"] if block["type"] == "tool_use"]
    texts = [block["text"] for block in body["content"] if block["type"] == "text"]
    return Answer(
        text="".join(texts),
        calls=[(call["name"], call["input"]) for call in calls],
        ids=[call["id"] for call in calls],
        finish=body["stop_reason"],
    )


def _of_message(message: dict[str, Any], finish: str) -> Answer:
    calls = message.get("tool_calls", [])
    assert all(call["type"] == "function" for call in calls)
    named = [(call["function"]["name"], _arguments(call["function"]["arguments"])) for call in calls]
    return Answer(text=message["content"] or "", calls=named, ids=[call["id"] for call in calls], finish=finish)


def _arguments(text: str) -> Any:
    """The arguments, or the text of ones that were cut."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _join_chunks(chunks: list[dict[str, Any]]) -> Answer:
    """As OpenAI's clients do: by the index of the call."""
    text, finish = "", None
    calls: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        text += choice["delta"].get("content") or ""
        finish = choice["finish_reason"] or finish
        for piece in choice["delta"].get("tool_calls", []):
            function = piece["function"]
            if piece["index"] not in calls:
                assert piece["index"] == len(calls)
                calls[piece["index"]] = {"id": piece["id"], "type": piece["type"], "function": {**function}}
            else:
                assert "name" not in function
                calls[piece["index"]]["function"]["arguments"] += function["arguments"]
    assert finish is not None
    return _of_message({"content": text, "tool_calls": list(calls.values())}, finish)


def _build_response(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The final response, after a check that its items are those that the events built up."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    items: dict[int, dict[str, Any]] = {}
    closed = 0
    for event in events:
        kind = event["type"].removeprefix("response.")
        index = event.get("output_index")
        if kind == "output_item.added":
            assert index == len(items) == closed, "one item at a time"
            assert event["item"]["status"] == "in_progress"
            items[index] = event["item"]
        elif kind == "content_part.added":
            items[index]["content"].append(event["part"])
        elif kind == "output_text.delta":
            items[index]["content"][0]["text"] += event["delta"]
            items[index]["content"][0]["logprobs"] += event["logprobs"]
        elif kind == "function_call_arguments.delta":
            items[index]["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert (event["arguments"], event["name"]) == (items[index]["arguments"], items[index]["name"])
        elif kind == "output_item.done":
            closed += 1
            assert event["item"] == {**items[index], "status": event["item"]["status"]}
            items[index] = event["item"]
        if "item_id" in event:
            assert event["item_id"] == items[index]["id"]
    final: dict[str, Any] = events[-1]["response"]
    assert final["output"] == list(items.values())
    return final


def _build_message(events: list[dict[str, Any]]) -> dict[str, Any]:
    """As Anthropic's clients do: block by block."""
    message: dict[str, Any] = events[0]["message"]
    texts: dict[int, str] = {}
    is_open = False
    for event in events[1:]:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            texts[event["index"]] = ""
            is_open = True
        elif event["type"] == "content_block_delta":
            assert is_open
            assert event["index"] == len(message["content"]) - 1
            delta = event["delta"]
            texts[event["index"]] += delta["text"] if delta["type"] == "text_delta" else delta["partial_json"]
        elif event["type"] == "content_block_stop":
            assert event["index"] == len(message["content"]) - 1
            is_open = False
        elif event["type"] == "message_delta":
            message |= event["delta"]
    assert not is_open
    for index, block in enumerate(message["content"]):
        if block["type"] == "text":
            block["text"] = texts[index]
        else:
            assert block["input"] == {}
            block["input"] = _arguments(texts[index] or "{}")
    return message


def client_that_answers(text: str) -> AppClient:
    return AppClient(FakeBackend(text))


def error_of(family: str, response: Any) -> tuple[str, str]:
    """The field that a 400 names, and its message."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert len(error["message"]) < 600
    assert "\n" not in error["message"]
    if family == "messages":  # Anthropic's errors have no field for it
        return error["message"], error["message"]
    assert error["param"] is not None
    return error["param"], error["message"]
