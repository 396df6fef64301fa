"""A served model with random weights that has to search: its call is whole because of the grammar, the rest noise."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from lfm.search.local_index import LocalIndex
from tests.clients.served import Served
from tests.search.indexes import document

pytestmark = pytest.mark.slow

QUOTE = {"48": 8.0}  # the byte-level tokenizer's quote: without it the query of noise would go on and on


@pytest.fixture(scope="module")
def searchable(served: Served) -> Served:
    """The index of the served user, made while the server runs."""
    alphabet = " ".join("abcdefghijklmnopqrstuvwxyz0123456789")
    with LocalIndex(served.log.parent / "lfm" / "search") as index:
        index.store.write([document("/docs/letters.md", f"Every letter. {alphabet}")])
    return served


@pytest.fixture
def client(searchable: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{searchable.url}/v1", api_key=searchable.api_key, max_retries=0) as client:
        yield client


def test_a_forced_search_runs_and_the_model_goes_on(client: openai.OpenAI, searchable: Served) -> None:
    response = client.responses.create(
        model=searchable.model,
        input="Search.",
        tools=[{"type": "web_search", "external_web_access": False}],  # type: ignore[list-item]
        tool_choice={"type": "web_search_preview"},
        max_output_tokens=500,
        store=False,
        extra_body={"logit_bias": QUOTE, "seed": 1},
    )
    types = [item.type for item in response.output]
    assert types[0] == "web_search_call"
    search: Any = response.output[0]
    assert search.status == "completed"
    assert 1 <= len(search.action.query) <= 300
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens > 0  # the second turn's prompt begins with the first one's


def test_documents_share_a_cached_prefix(client: openai.OpenAI, searchable: Served) -> None:
    def ask(question: str) -> int:
        completion = client.chat.completions.create(
            model=searchable.model,
            messages=[{"role": "user", "content": question}],
            max_tokens=4,
            extra_body={"documents": ["A pump moves water. " * 20, {"text": "A valve freezes.", "title": "Valves"}]},
        )
        assert completion.usage is not None
        assert completion.usage.prompt_tokens_details is not None
        return completion.usage.prompt_tokens_details.cached_tokens or 0

    ask("What moves water?")
    assert ask("And what freezes?") > 400


def test_results_alone_need_no_model(searchable: Served) -> None:
    import httpx2

    headers = {"Authorization": f"Bearer {searchable.api_key}"}
    answer = httpx2.post(f"{searchable.url}/v1/search", json={"query": "letter"}, headers=headers, timeout=10)
    assert [result["title"] for result in json.loads(answer.content)["results"]] == ["/docs/letters.md"]
