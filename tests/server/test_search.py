"""POST /v1/search: results alone, from one's own documents and from providers on loopback, and its failures."""

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lfm.config import ServerConfig
from lfm.search.config import SearchConfig
from lfm.server.search_service import SearchService
from tests.search.indexes import search_service
from tests.search.web import Answer, Web, serve
from tests.server.fakes import CHAT_PATH, AppClient, AsgiCall, FakeBackend, make_app, state_of, until

KEY = "searxng-has-none"
PATH = "/v1/search"
DOCUMENTS = {
    "/home/me/pump.md": "# Pumps\n\nA pump moves water from a low place to a high place.",
    "/home/me/valve.md": "# Valves\n\nA valve freezes in winter.",
}
FOUND = {"results": [{"url": "https://example.org/pump", "title": "The pump", "content": "A pump moves water."}]}


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as web:
        web.answers["/search"] = Answer(body=json.dumps(FOUND).encode(), content_type="application/json")
        yield web


def with_searxng(web: Web, **fields: Any) -> SearchConfig:
    return SearchConfig(**{"providers": ("searxng",), "searxng_url": web.root, **fields})


def test_own_documents_are_found_without_any_provider(tmp_path: Path) -> None:
    with search_service(tmp_path, DOCUMENTS) as search:
        answer = AppClient(search=search).post(PATH, {"query": "WATER pump?"}).json()
    assert answer["object"] == "search"
    assert answer["provider"] == "local"
    assert [result["title"] for result in answer["results"]] == ["/home/me/pump.md"]
    (result,) = answer["results"]
    assert result["url"] == "file:///home/me/pump.md"
    assert "moves water" in result["snippet"]
    assert answer["is_cached"] is False
    assert "failures" not in answer


def test_a_server_for_others_does_not_tell_where_its_documents_are(tmp_path: Path) -> None:
    with search_service(tmp_path, DOCUMENTS, SearchConfig(shows_paths=False)) as search:
        response = AppClient(search=search).post(PATH, {"query": "pump"})
    assert response.json()["results"][0]["url"].startswith("document:")
    assert response.json()["results"][0]["url"].endswith("/pump.md")


def test_a_provider_is_asked_and_its_answer_kept(web: Web) -> None:
    client = AppClient(search=SearchService(with_searxng(web)))
    first = client.post(PATH, {"query": "pumps", "max_results": 3}).json()
    second = client.post(PATH, {"query": " PUMPS ", "max_results": 3}).json()
    assert [result["url"] for result in first["results"]] == ["https://example.org/pump"]
    assert first["provider"] == "searxng"
    assert (first["is_cached"], second["is_cached"]) == (False, True)
    assert first["results"] == second["results"]
    assert len(web.seen) == 1


def test_without_the_web_only_the_own_documents_are_searched(tmp_path: Path, web: Web) -> None:
    with search_service(tmp_path, DOCUMENTS, with_searxng(web)) as search:
        answer = AppClient(search=search).post(PATH, {"query": "valve", "external_web_access": False}).json()
    assert answer["provider"] == "local"
    assert web.seen == []


def test_domains_are_filtered_here_too(web: Web) -> None:
    client = AppClient(search=SearchService(with_searxng(web)))
    wanted = client.post(PATH, {"query": "a", "search_domain_filter": ["example.org"]}).json()
    unwanted = client.post(PATH, {"query": "b", "search_domain_filter": ["-example.org"]}).json()
    others = client.post(PATH, {"query": "c", "allowed_domains": ["example.com"]}).json()
    assert [len(answer["results"]) for answer in (wanted, unwanted, others)] == [1, 0, 0]


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("query", {}),
        ("query", {"query": "  "}),
        ("query", {"query": "a" * 2_001}),
        ("query", {"query": ["a"]}),
        ("max_results", {"query": "a", "max_results": 0}),
        ("max_results", {"query": "a", "max_results": "5"}),
        ("search_domain_filter", {"query": "a", "search_domain_filter": ["not a domain"]}),
        ("allowed_domains", {"query": "a", "allowed_domains": ["not a domain"]}),
        ("search_domain_filter", {"query": "a", "search_domain_filter": ["-"]}),
        ("country", {"query": "a", "country": "Germany"}),
        ("search_recency_filter", {"query": "a", "search_recency_filter": "week"}),
        ("search_mode", {"query": "a", "search_mode": "academic"}),
    ],
)
def test_a_wrong_field_is_named(param: str, body: dict[str, Any]) -> None:
    response = AppClient().post(PATH, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_domains_and_countries_may_be_written_as_people_do(web: Web) -> None:
    client = AppClient(search=SearchService(with_searxng(web)))
    body = {"query": "pump", "search_domain_filter": ["https://example.org/", "-https://a.org"], "country": "de"}
    assert client.post(PATH, body).json()["results"]
    assert client.post(PATH, {"query": "pump", "blocked_domains": ["http://example.org"]}).json()["results"] == []


def failed(client: AppClient, **fields: Any) -> str:
    response = client.post(PATH, {"query": "pump", **fields})
    assert response.status_code == 502, response.text
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("search_error", "search_failed")
    return str(error["message"])


@pytest.mark.parametrize("shows_paths", [True, False])
def test_without_an_index_the_error_says_how_to_make_one(shows_paths: bool) -> None:
    """It is no server error: clients try those again, and the operator has to act first."""
    client = AppClient(search=SearchService(SearchConfig(shows_paths=shows_paths)))
    response = client.post(PATH, {"query": "pump"})
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "search_not_configured"
    assert "Its operator can make one with `lfm index add PATH...`, or choose a provider" in error["message"]


def test_a_failed_provider_beside_no_index_is_a_failure(web: Web) -> None:
    web.answers["/search"] = Answer(status=500)
    message = failed(AppClient(search=SearchService(with_searxng(web, providers=("local", "searxng")))))
    assert "There is no index" in message
    assert "searxng answers with status 500." in message


def test_searches_are_counted_by_provider_and_outcome(tmp_path: Path, web: Web) -> None:
    config = with_searxng(web, providers=("local", "searxng"))
    with search_service(tmp_path, DOCUMENTS, config) as search:
        client = AppClient(search=search)
        for query in ("valve", "nothing", "Nothing"):
            client.post(PATH, {"query": query})
        web.answers["/search"] = Answer(status=429)
        client.post(PATH, {"query": "other"})
    counted = {
        (sample.labels["provider"], sample.labels["outcome"]): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == "lfm_searches_total"
    }
    assert counted == {
        ("local", "found"): 1,
        ("local", "empty"): 2,
        ("searxng", "found"): 1,
        ("searxng", "cached"): 1,
        ("searxng", "rate_limited"): 1,
    }


def test_an_empty_index_finds_nothing(tmp_path: Path) -> None:
    with search_service(tmp_path, {}) as search:
        response = AppClient(search=search).post(PATH, {"query": "pump"})
    assert response.status_code == 200
    assert response.json()["results"] == []


def test_an_index_that_is_made_later_is_found(tmp_path: Path) -> None:
    service = SearchService(SearchConfig(index_folder=str(tmp_path)))
    client = AppClient(search=service)
    assert client.post(PATH, {"query": "pump"}).status_code == 404
    with search_service(tmp_path, DOCUMENTS):
        pass
    assert client.post(PATH, {"query": "pump"}).json()["results"]
    asyncio.run(service.aclose())


@pytest.mark.parametrize("content", [b"not a database", b""], ids=["garbage", "cut"])
def test_a_corrupt_index_fails_the_search_and_nothing_else(tmp_path: Path, content: bytes) -> None:
    with search_service(tmp_path, DOCUMENTS):
        pass
    (tmp_path / "documents.sqlite").write_bytes(content + b"\x00" * 4096 if content else b"SQLite format 3\x00cut")
    client = AppClient(search=SearchService(SearchConfig(index_folder=str(tmp_path), shows_paths=False)))
    message = failed(client)
    assert "The local index cannot be searched. The log of the server says why." in message
    assert str(tmp_path) not in message
    assert client.chat().status_code == 200


def test_an_index_of_a_newer_version_fails_the_search_and_says_so(tmp_path: Path) -> None:
    import sqlite3

    with search_service(tmp_path, DOCUMENTS):
        pass
    database = sqlite3.connect(tmp_path / "documents.sqlite")
    database.execute("PRAGMA user_version = 999")
    database.commit()
    database.close()
    message = failed(AppClient(search=SearchService(SearchConfig(index_folder=str(tmp_path)))))
    assert "newer" in message


def test_a_query_in_mixed_scripts_is_words_and_never_syntax(tmp_path: Path) -> None:
    documents = {
        "/a.md": "\u6771\u4eac\u90fd\u306e\u5929\u6c17 and the pump",
        "/b.md": "\u0645\u064e\u0636\u062e\u064e\u0651\u0629 \u0627\u0644\u0645\u0627\u0621",
    }
    query = '\u6771\u4eac pump: "AND (\u0645\u0636\u062e\u0629" OR * NEAR/2 ^title:x \U0001f600'
    with search_service(tmp_path, documents) as search:
        answer = AppClient(search=search).post(PATH, {"query": query}).json()
    assert {result["url"] for result in answer["results"]} == {"file:///a.md", "file:///b.md"}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer(holds=True, raw=b""), "searxng did not answer in time."),
        (Answer(holds=True, raw=b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"), "did not answer in time."),
        (Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n{"), "is larger than 4,194,304 bytes."),
        (Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{}"), "searxng"),
        (Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}garbage"), "searxng"),
        (Answer(status=403), "Add json to search.formats"),
        (Answer(status=429), "searxng answers with status 429."),
        (Answer(body=b"<html>"), "is not what it publishes."),
        (Answer(body=b"[" * 100_000), "is not what it publishes."),
        (Answer(status=302, headers={"Location": "http://127.0.0.1/"}), "searxng answers with status 302."),
    ],
    ids=[
        "hangs",
        "promises-more",
        "promises-too-much",
        "breaks-off",
        "too-much",
        "403",
        "429",
        "html",
        "deep",
        "redirects",
    ],
)
def test_what_a_bad_provider_does_is_told_and_nothing_else_is_disturbed(web: Web, answer: Answer, says: str) -> None:
    web.answers["/search"] = answer
    client = AppClient(search=SearchService(with_searxng(web, provider_seconds=0.3)))
    assert says in failed(client)
    assert client.chat().status_code == 200


def test_the_next_provider_answers_for_one_that_fails(tmp_path: Path, web: Web) -> None:
    web.answers["/search"] = Answer(status=500)
    with search_service(tmp_path, DOCUMENTS, with_searxng(web, providers=("searxng", "local"))) as search:
        answer = AppClient(search=search).post(PATH, {"query": "pump"}).json()
    assert answer["provider"] == "local"
    assert answer["failures"] == [
        {"provider": "searxng", "reason": "failed", "message": "searxng answers with status 500."}
    ]


def test_callers_with_keys_share_no_cache_and_no_credentials(web: Web) -> None:
    """The guard's key reaches no provider, and what it found for one caller is found again only by the same one."""
    config = ServerConfig(api_key="secret-of-the-server")
    client = AppClient(search=SearchService(with_searxng(web)), config=config)
    assert client.post(PATH, {"query": "pump"}).status_code == 401
    headers = {"Authorization": "Bearer secret-of-the-server", "Cookie": "session=1"}
    assert client.post(PATH, {"query": "pump"}, headers=headers).status_code == 200
    (seen,) = web.seen
    assert "secret" not in str(seen)
    assert "session" not in str(seen)


def test_no_key_is_ever_logged(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    config = SearchConfig(
        providers=("brave", "searxng"), brave_api_key="secret", searxng_url=web.root, provider_seconds=0.2
    )
    web.answers["/search"] = Answer(status=500)
    service = SearchService(config)
    from lfm.search.providers.brave import Brave

    chain = service._web_chain()
    chain._links[0].provider = Brave(api_key="secret", base_url=web.root)
    with caplog.at_level(logging.DEBUG):
        assert "secret" not in failed(AppClient(search=service))
    assert any(seen.headers.get("X-Subscription-Token") == "secret" for seen in web.seen)
    assert "secret" not in caplog.text


def test_a_caller_that_leaves_ends_its_search(web: Web) -> None:
    web.answers["/search"] = Answer(holds=True, raw=b"")
    app = make_app(FakeBackend(), search=SearchService(with_searxng(web)))

    async def run() -> None:
        call = AsgiCall(app, {"query": "pump"}, path=PATH)
        task = asyncio.create_task(call.run())
        await until(lambda: bool(state_of(app).works) and bool(web.seen))
        call.disconnect()
        await task
        assert call.sent == []
        assert not state_of(app).works

    asyncio.run(run())


def test_search_works_while_the_model_loads_and_not_while_draining(tmp_path: Path) -> None:
    backend = FakeBackend()
    backend.reason = "loading weights"
    with search_service(tmp_path, DOCUMENTS) as search:
        client = AppClient(backend, search=search)
        assert client.post(CHAT_PATH, {}).status_code == 503
        assert client.post(PATH, {"query": "pump"}).status_code == 200
        state_of(client.app).is_draining = True
        assert client.post(PATH, {"query": "pump"}).status_code == 503
