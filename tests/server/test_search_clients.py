"""Searches and documents through the official clients, which must find their own types in every answer and event."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lfm.search.config import SearchConfig
from lfm.search.local_index import LocalIndex
from lfm.server.search_service import SearchService
from tests.search.indexes import document
from tests.server.fakes import MODEL, RunningServer, serving
from tests.server.test_server_tools import ANSWER, DOCUMENTS, PUMP, Script, call, search

pytestmark = pytest.mark.slow

USER: list[Any] = [{"role": "user", "content": "What moves water?"}]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with LocalIndex(tmp_path) as index:
        index.store.write([document(path, text) for path, text in DOCUMENTS.items()])
    service = SearchService(SearchConfig(index_folder=str(tmp_path)))
    with serving(Script("Well. " + call(search()), ANSWER), search=service) as server:
        yield server
    asyncio.run(service.aclose())


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def again(server: RunningServer) -> None:
    """Let the script begin anew."""
    server.backend.requests.clear()


def checked(value: Any) -> Any:
    type(value).model_validate(value.model_dump(warnings=False))
    return value


def test_chat_completions_cite_what_they_searched(client: openai.OpenAI, server: RunningServer) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": USER, "web_search_options": {"search_context_size": "low"}}
    message = checked(client.chat.completions.create(**fields)).choices[0].message
    citation = message.annotations[0].url_citation
    assert message.content[citation.start_index : citation.end_index] == "A pump moves water"
    again(server)
    with client.chat.completions.stream(**fields) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.content == message.content
    assert [a.url_citation.url for a in streamed.annotations] == [citation.url]


def test_documents_of_a_chat_are_cited(client: openai.OpenAI, server: RunningServer) -> None:
    server.backend.texts = (ANSWER,)  # type: ignore[attr-defined]  # a Script
    completion = client.chat.completions.create(model=MODEL, messages=USER, extra_body={"documents": [PUMP]})
    annotations = checked(completion).choices[0].message.annotations
    assert [a.url_citation.url for a in annotations] == ["document:0"]


def test_responses_show_searches_and_citations(client: openai.OpenAI, server: RunningServer) -> None:
    tools: list[Any] = [{"type": "web_search", "external_web_access": False}]
    fields: dict[str, Any] = {"model": MODEL, "input": "What moves water?", "tools": tools, "store": False}
    response = checked(client.responses.create(**fields, include=["web_search_call.action.sources"]))
    assert [item.type for item in response.output] == ["message", "web_search_call", "message"]
    assert response.output[1].action.sources[0].url == "file:///docs/pump.md"
    assert response.output[2].content[0].annotations[0].type == "url_citation"
    again(server)
    with client.responses.stream(**fields) as stream:
        types = [checked(event).type for event in stream]
        final = stream.get_final_response()
    assert types.index("response.web_search_call.searching") < types.index("response.web_search_call.completed")
    assert "response.output_text.annotation.added" in types
    assert final.output_text == response.output_text
    items = [item.model_dump(warnings=False) for item in response.output]
    again(server)
    followed = client.responses.create(model=MODEL, input=[*items, *USER], tools=tools, store=False)
    assert checked(followed).status == "completed"


def test_files_are_searched_and_cited(client: openai.OpenAI, server: RunningServer) -> None:
    server.backend.texts = (call(search(tool="file_search")), ANSWER)  # type: ignore[attr-defined]
    tools: list[Any] = [{"type": "file_search", "vector_store_ids": ["any"]}]
    response = client.responses.create(
        model=MODEL, input="What moves water?", tools=tools, store=False, include=["file_search_call.results"]
    )
    item, message = checked(response).output
    assert item.results[0].filename == "pump.md"
    assert message.content[0].annotations[0].filename == "pump.md"


def test_messages_show_searches_and_citations(server: RunningServer) -> None:
    anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")
    tools: list[Any] = [{"type": "web_search_20250305", "name": "web_search", "max_uses": 2}]
    fields: dict[str, Any] = {"model": MODEL, "max_tokens": 500, "messages": USER, "tools": tools}
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        message = checked(client.messages.create(**fields))
        assert [block.type for block in message.content] == [
            "text",
            "server_tool_use",
            "web_search_tool_result",
            "text",
        ]
        assert message.content[3].citations[0].cited_text == PUMP
        assert message.usage.server_tool_use.web_search_requests == 1
        again(server)
        with client.messages.stream(**fields) as stream:
            final = stream.get_final_message()
        assert [block.type for block in final.content] == [block.type for block in message.content]
        assert final.content[1].input == {"query": "pump"}
        assert final.content[3].citations[0].cited_text == PUMP
        again(server)
        turns = [*USER, {"role": "assistant", "content": final.content}, {"role": "user", "content": "Really?"}]
        assert checked(client.messages.create(**{**fields, "messages": turns})).stop_reason == "end_turn"
