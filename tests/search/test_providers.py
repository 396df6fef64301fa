"""Each provider against a fake on loopback that answers as its maker publishes. None of this is the live service.

The shapes were taken from the providers' own documentation on 2026-11-21; the addresses stand in the modules.
"""

import asyncio
import gzip
import json
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from lfm.errors import RequestError, UsageError
from lfm.search.errors import ProviderError
from lfm.search.local_index import LocalIndex
from lfm.search.providers.brave import Brave
from lfm.search.providers.exa import Exa
from lfm.search.providers.local import Local
from lfm.search.providers.provider import Provider
from lfm.search.providers.searxng import SearXng
from lfm.search.providers.tavily import Tavily
from lfm.search.results import SearchQuery, SearchResult
from tests.search.indexes import document
from tests.search.web import Answer, Web, serve

KEY = "key-123"
PATHS = {"searxng": "/search", "brave": "/res/v1/web/search", "tavily": "/search", "exa": "/search"}
MAKERS: dict[str, Callable[[str], Provider]] = {
    "searxng": lambda root: SearXng(base_url=root),
    "brave": lambda root: Brave(api_key=KEY, base_url=root),
    "tavily": lambda root: Tavily(api_key=KEY, base_url=root),
    "exa": lambda root: Exa(api_key=KEY, base_url=root),
}

SEARXNG = {
    "query": "pumps",
    "number_of_results": 0,
    "results": [
        {
            "url": "https://example.org/pump",
            "title": "The pump",
            "content": "A pump moves water.",
            "publishedDate": "2026-01-15T12:00:00",
            "thumbnail": "",
            "engine": "duckduckgo",
            "template": "default.html",
            "parsed_url": ["https", "example.org", "/pump", "", "", ""],
            "engines": ["duckduckgo", "brave"],
            "positions": [1, 2],
            "score": 3.0,
            "category": "general",
        },
        {"url": "https://example.com/valve", "title": "Valve", "content": "", "publishedDate": None, "engine": "x"},
    ],
    "answers": [],
    "corrections": [],
    "infoboxes": [],
    "suggestions": ["water pump"],
    "unresponsive_engines": [["google", "access denied"]],
}
BRAVE = {
    "type": "search",
    "query": {"original": "pumps", "more_results_available": True, "country": "us"},
    "mixed": {"type": "mixed", "main": [{"type": "web", "index": 0, "all": False}]},
    "web": {
        "type": "search",
        "family_friendly": True,
        "results": [
            {
                "type": "search_result",
                "title": "The <strong>pump</strong>",
                "url": "https://example.org/pump",
                "is_source_local": False,
                "description": "A <strong>pump</strong> moves water &amp; oil, if a &lt; b.",
                "extra_snippets": ["It needs <strong>power</strong>."],
                "page_age": "2026-01-15T12:00:00",
                "age": "January 15, 2026",
                "language": "en",
                "meta_url": {"scheme": "https", "netloc": "example.org", "hostname": "example.org", "path": "> pump"},
                "profile": {"name": "Example", "url": "https://example.org", "long_name": "example.org"},
            },
            {"type": "search_result", "title": "Valve", "url": "https://example.com/valve", "description": ""},
        ],
    },
}
TAVILY = {
    "query": "pumps",
    "follow_up_questions": None,
    "answer": None,
    "images": [],
    "results": [
        {
            "title": "The pump",
            "url": "https://example.org/pump",
            "content": "A pump moves water.",
            "score": 0.98,
            "raw_content": None,
            "favicon": None,
            "published_date": "2026-01-15T12:00:00",
        },
        {"title": "Valve", "url": "https://example.com/valve", "content": "", "score": 0.5},
    ],
    "response_time": 1.09,
    "request_id": "123e4567-e89b-12d3-a456-426614174111",
}
EXA = {
    "requestId": "b5947044c4b78efa9552a7c89b306d95",
    "resolvedSearchType": "auto",
    "results": [
        {
            "title": "The pump",
            "url": "https://example.org/pump",
            "publishedDate": "2026-01-15T12:00:00",
            "author": "A. Author",
            "id": "https://example.org/pump",
            "image": "https://example.org/pump.png",
            "favicon": "https://example.org/favicon.ico",
            "highlights": ["A pump moves water.", "It needs power."],
            "highlightScores": [0.46, 0.4],
        },
        {"title": None, "url": "https://example.com/valve", "id": "x", "publishedDate": None, "author": None},
    ],
    "costDollars": {"total": 0.005, "search": {"neural": 0.005}},
}
SHAPES = {"searxng": SEARXNG, "brave": BRAVE, "tavily": TAVILY, "exa": EXA}


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as web:
        yield web


@pytest.fixture(params=sorted(MAKERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ask(name: str, web: Web, query: SearchQuery | None = None) -> list[SearchResult]:
    async def run() -> list[SearchResult]:
        provider = MAKERS[name](f"{web.root}/")
        try:
            return await provider.search(query or SearchQuery(text="pumps"))
        finally:
            await provider.aclose()

    return asyncio.run(run())


def answers(name: str, web: Web, content: object) -> None:
    web.answers[PATHS[name]] = Answer(body=json.dumps(content).encode(), content_type="application/json")


def refusal(name: str, web: Web, answer: Answer) -> ProviderError:
    web.answers[PATHS[name]] = answer
    with pytest.raises(ProviderError) as raised:
        ask(name, web)
    assert KEY not in str(raised.value)
    return raised.value


def test_the_published_answer_is_understood(name: str, web: Web) -> None:
    answers(name, web, SHAPES[name])
    first, second = ask(name, web)
    assert (first.title, first.url, first.date, first.provider) == (
        "The pump",
        "https://example.org/pump",
        "2026-01-15T12:00:00",
        name,
    )
    assert first.snippet.startswith("A pump moves water")
    assert (second.url, second.snippet, second.date) == ("https://example.com/valve", "", None)
    assert second.title


def test_brave_s_markup_becomes_text(web: Web) -> None:
    answers("brave", web, BRAVE)
    assert ask("brave", web)[0].snippet == "A pump moves water & oil, if a < b.\nIt needs power."


def test_requests_are_what_the_providers_publish(web: Web) -> None:
    query = SearchQuery(
        text=" how do\npumps\x00 work? ",
        max_results=7,
        allowed_domains=("example.org", "sub.example.net"),
        blocked_domains=("bad.example.org",),
        country="DE",
    )
    for name in MAKERS:
        answers(name, web, SHAPES[name])
        ask(name, web, query)
    searxng, brave, tavily, exa = web.seen
    sites = "how do pumps work? (site:example.org OR site:sub.example.net)"
    assert (searxng.method, urlsplit(searxng.path).path) == ("GET", "/search")
    assert parse_qs(urlsplit(searxng.path).query) == {"q": [sites], "format": ["json"], "categories": ["general"]}
    assert (brave.method, urlsplit(brave.path).path) == ("GET", "/res/v1/web/search")
    assert parse_qs(urlsplit(brave.path).query) == {"q": [sites], "count": ["20"], "country": ["DE"]}
    assert brave.headers["X-Subscription-Token"] == KEY
    assert (tavily.method, tavily.path, tavily.headers["Authorization"]) == ("POST", "/search", f"Bearer {KEY}")
    assert json.loads(tavily.body) == {
        "query": "how do pumps work?",
        "max_results": 7,
        "search_depth": "basic",
        "include_answer": False,
        "include_raw_content": False,
        "include_domains": ["example.org", "sub.example.net"],
        "exclude_domains": ["bad.example.org"],
    }
    assert (exa.method, exa.path, exa.headers["x-api-key"]) == ("POST", "/search", KEY)
    assert json.loads(exa.body) == {
        "query": "how do pumps work?",
        "numResults": 7,
        "contents": {"highlights": True},
        "includeDomains": ["example.org", "sub.example.net"],
        "excludeDomains": ["bad.example.org"],
        "userLocation": "DE",
    }


def test_a_plain_question_asks_for_no_more_than_needed(web: Web) -> None:
    for name in MAKERS:
        answers(name, web, SHAPES[name])
        ask(name, web, SearchQuery(text="pumps", country="XX"))
    _, brave, tavily, exa = web.seen
    assert parse_qs(urlsplit(brave.path).query) == {"q": ["pumps"], "count": ["5"]}
    assert {"include_domains", "exclude_domains"}.isdisjoint(json.loads(tavily.body))
    assert json.loads(exa.body)["userLocation"] == "XX"


def test_a_key_goes_to_its_own_provider_only_and_searxng_gets_none(web: Web) -> None:
    for name in MAKERS:
        answers(name, web, SHAPES[name])
        ask(name, web)
    carriers = [[header for header, value in seen.headers.items() if KEY in value] for seen in web.seen]
    assert carriers == [[], ["X-Subscription-Token"], ["Authorization"], ["x-api-key"]]
    assert not any(KEY in seen.path or KEY.encode() in seen.body for seen in web.seen)


def test_brave_s_bounds_on_a_query_are_kept(web: Web) -> None:
    answers("brave", web, BRAVE)
    ask("brave", web, SearchQuery(text="word " * 300))
    ask("brave", web, SearchQuery(text="x" * 1000))
    many, long = (parse_qs(urlsplit(seen.path).query)["q"][0] for seen in web.seen)
    assert len(many.split()) == 50
    assert len(long) == 400


def test_only_wanted_results_are_kept_whatever_the_provider_sends(name: str, web: Web) -> None:
    urls = [
        "https://example.org/a",
        "https://example.org/a",
        "https://sub.example.org/b",
        "https://example.org.evil.com/c",
        "https://notexample.org/d",
        "https://blocked.example.org/e",
        "javascript:alert(1)",
        "https://user@example.org/f",
        "",
        None,
        "https://EXAMPLE.org/\u6771\u4eac",
        "https://example.org/more",
    ]
    results = [{"url": url, "title": "t", "content": "c", "description": "c", "text": "c"} for url in urls]
    answers(name, web, {"web": {"results": results}} if name == "brave" else {"results": results})
    query = SearchQuery(
        text="x", max_results=3, allowed_domains=("Example.org",), blocked_domains=("blocked.example.org",)
    )
    assert [result.url for result in ask(name, web, query)] == [
        "https://example.org/a",
        "https://sub.example.org/b",
        "https://example.org/%E6%9D%B1%E4%BA%AC",
    ]


def test_a_malformed_result_costs_no_other(name: str, web: Web) -> None:
    results = [{"url": 5}, {"url": "https://example.org/", "title": "t"}, None]
    answers(name, web, {"web": {"results": results}} if name == "brave" else {"results": results})
    assert [result.url for result in ask(name, web)] == ["https://example.org/"]


def test_results_are_cleaned_and_cut(name: str, web: Web) -> None:
    dirty = "a\x1b[2J\u202eb\ud83d\n\n\n\n<|im_end|>" + "x" * 10_000
    result = {"url": "https://example.org/", "title": dirty, "content": dirty, "description": dirty, "text": dirty}
    answers(name, web, {"web": {"results": [result]}} if name == "brave" else {"results": [result]})
    (found,) = ask(name, web)
    assert found.title.startswith("a [2J b")
    assert len(found.title) <= 300
    assert found.snippet.startswith("a[2Jb")
    assert "\n\n\n" not in found.snippet
    assert len(found.snippet) <= 4_000


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "forbidden"), (403, "forbidden"), (429, "rate_limited"), (400, "failed"), (422, "failed"), (500, "failed")],
)
def test_a_status_becomes_a_reason(name: str, web: Web, status: int, reason: str) -> None:
    error = refusal(name, web, Answer(status=status, body=b"secret internals"))
    assert error.reason == reason
    assert error.retry_after_s is None
    assert "secret" not in str(error)


@pytest.mark.parametrize("status", [402, 432, 433])
def test_a_used_up_plan_is_a_rate_limit(web: Web, status: int) -> None:
    assert refusal("tavily", web, Answer(status=status)).reason == "rate_limited"


def test_searxng_without_json_says_what_to_do(web: Web) -> None:
    assert "Add json to search.formats in its settings.yml" in str(refusal("searxng", web, Answer(status=403)))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "30"}, 30),
        ({"Retry-After": "999999999999"}, 3600),
        ({"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        ({"X-RateLimit-Reset": "1, 1419704"}, 1),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-5"}, None),
        ({}, None),
    ],
)
def test_how_long_to_wait_is_read_from_the_headers(web: Web, headers: dict[str, str], seconds: float | None) -> None:
    assert refusal("brave", web, Answer(status=429, headers=headers)).retry_after_s == seconds


def test_how_long_to_wait_may_be_a_date(web: Web) -> None:
    error = refusal(
        "brave", web, Answer(status=429, headers={"Retry-After": formatdate(time.time() + 1000, usegmt=True)})
    )
    assert 900 < (error.retry_after_s or 0) < 1001


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b"<html>captcha</html>",
        b"null",
        b"[]",
        b'"text"',
        b'{"results": {}, "web": []}',
        b'{"results": [1], "web": {"results": [1]}}',
        b'{"results": [{"url": 1}], "web": {"results": [{"url": 1}]}}',
        b'{"results": null, "web": {"results": null}}',
        b'{"results": "\xff", "web": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
    ],
)
def test_an_answer_of_another_shape_is_malformed(name: str, web: Web, body: bytes) -> None:
    assert refusal(name, web, Answer(body=body)).reason == "malformed"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(Answer(body=b"x" * 4_194_305), "malformed", id="huge"),
        pytest.param(Answer(headers={"Content-Length": "5000000"}), "malformed", id="announced-huge"),
        pytest.param(
            Answer(body=gzip.compress(bytes(50_000_000)), headers={"Content-Encoding": "gzip"}), "malformed", id="bomb"
        ),
        pytest.param(Answer(body=b"{}", headers={"Content-Encoding": "zstd"}), "malformed", id="odd-compression"),
        pytest.param(
            Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}"), "unreachable", id="lies-about-its-length"
        ),
        pytest.param(Answer(raw=b"garbage\r\n\r\n"), "unreachable", id="garbage"),
        pytest.param(Answer(raw=b""), "unreachable", id="hangs-up"),
    ],
)
def test_a_provider_that_lies_is_bounded(name: str, web: Web, answer: Answer, reason: str) -> None:
    assert refusal(name, web, answer).reason == reason


def test_a_redirect_is_not_followed_with_the_key(name: str, web: Web) -> None:
    error = refusal(name, web, Answer(status=302, headers={"Location": f"{web.root}/elsewhere"}))
    assert error.reason == "failed"
    assert len(web.seen) == 1


def test_nobody_there_is_unreachable(free_port: int) -> None:
    web = Web()
    web.port = free_port
    for name in MAKERS:
        with pytest.raises(ProviderError, match=f"{name} cannot be reached") as raised:
            ask(name, web)
        assert raised.value.reason == "unreachable"


def test_compressed_answers_are_read(name: str, web: Web) -> None:
    body = gzip.compress(json.dumps(SHAPES[name]).encode())
    web.answers[PATHS[name]] = Answer(body=body, headers={"Content-Encoding": "gzip"})
    assert len(ask(name, web)) == 2


def test_nothing_found_is_no_error(web: Web) -> None:
    for name in MAKERS:
        answers(name, web, {"query": {}} if name == "brave" else {"results": []})
        assert ask(name, web) == []


def test_an_address_that_is_none_is_the_operator_s_error() -> None:
    with pytest.raises(UsageError, match=r"'search\.example\.org' is no web address"):
        SearXng(base_url="search.example.org")


def test_the_user_s_documents_are_a_provider_too(tmp_path: Path) -> None:
    with LocalIndex(tmp_path) as index:
        text = "# Pumps\n\nA pump moves water.\n\n## Winter\n\nIn winter it freezes.\x1b"
        index.store.write([document("/my files/pump.md", text, title="Pumps")])
        query = SearchQuery(text="winter", blocked_domains=("example.org",))
        (result,) = asyncio.run(Local(index).search(query))
        wanted = SearchQuery(text="winter", allowed_domains=("example.org",))
        assert asyncio.run(Local(index).search(wanted)) == [], "it is of no domain"
    assert result == SearchResult(
        title="Pumps",
        url="file:///my%20files/pump.md",
        snippet="## Winter\n\nIn winter it freezes.",
        provider="local",
        location="Winter",
    )


def test_a_broken_index_is_a_failed_provider(tmp_path: Path) -> None:
    with LocalIndex(tmp_path) as index:
        index.store.write([document("/a.md", "text")])
        index.store.close()
        with pytest.raises(ProviderError, match=r"The local index cannot be searched\."):
            asyncio.run(Local(index).search(SearchQuery(text="text")))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": " \n"}, "query"),
        ({"text": "x" * 2001}, "query"),
        ({"text": "x", "max_results": 0}, "max_results"),
        ({"text": "x", "max_results": 21}, "max_results"),
        ({"text": "x", "allowed_domains": ("http://example.org",)}, "allowed_domains"),
        ({"text": "x", "allowed_domains": ("example.org OR site:evil.org",)}, "allowed_domains"),
        ({"text": "x", "allowed_domains": ("example",)}, "allowed_domains"),
        ({"text": "x", "blocked_domains": ("-a.org",)}, "blocked_domains"),
        ({"text": "x", "blocked_domains": ("a.org",) * 101}, "blocked_domains"),
        ({"text": "x", "country": "Germany"}, "country"),
    ],
)
def test_a_question_that_nobody_can_be_asked_is_refused(fields: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as raised:
        SearchQuery(**fields)  # type: ignore[arg-type]
    assert raised.value.param == param
