"""POST /v1/search: results alone, without a model. The form of the answer is Perplexity's, as gateways expect it."""

import uuid
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from lfm.errors import NotFoundError, RequestError
from lfm.search.chain import SearchAnswer
from lfm.search.errors import ProviderError
from lfm.search.results import SearchQuery, SearchResult, bare_domain, check_domains
from lfm.server.asgi import read_json_object, send_json
from lfm.server.disconnect import run_while_connected
from lfm.server.refusals import SEARCH_RULES
from lfm.server.schemas import parse_request
from lfm.server.state import AppState, record_of

DEFAULT_RESULTS = 10


class SearchFailedError(RequestError):
    """HTTP 502: no provider answered. The message says what each of them said."""

    status = 502
    type = "search_error"


class SearchRequest(BaseModel):
    """POST /v1/search. An entry of `search_domain_filter` with a minus in front is a domain that is not wanted.

    `external_web_access` false: only the operator's own documents are searched.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    query: str
    max_results: int | None = None
    search_domain_filter: list[str] | None = None
    allowed_domains: list[str] | None = None
    blocked_domains: list[str] | None = None
    country: str | None = None
    external_web_access: bool | None = None

    def to_query(self) -> SearchQuery:
        """Raises RequestError for what no provider could be asked."""
        wanted = [bare_domain(entry) for entry in self.search_domain_filter or () if not entry.startswith("-")]
        unwanted = [bare_domain(entry[1:]) for entry in self.search_domain_filter or () if entry.startswith("-")]
        check_domains([*wanted, *unwanted], "search_domain_filter")
        return SearchQuery(
            text=self.query,
            max_results=DEFAULT_RESULTS if self.max_results is None else self.max_results,
            allowed_domains=(*map(bare_domain, self.allowed_domains or ()), *wanted),
            blocked_domains=(*map(bare_domain, self.blocked_domains or ()), *unwanted),
            country=None if self.country is None else self.country.upper(),
        )


class SearchHit(BaseModel):
    """`location` is where in a document of the operator's own it stands; `provider` says who found it."""

    title: str
    url: str
    snippet: str
    date: str | None
    last_updated: None
    location: str
    provider: str


class ProviderFailure(BaseModel):
    """A provider that was asked before and did not help."""

    provider: str
    reason: str
    message: str


class SearchResults(BaseModel):
    id: str
    object: Literal["search"]
    results: list[SearchHit]
    provider: str
    is_cached: bool
    failures: list[ProviderFailure] = Field(default_factory=list)


class Search:
    """An ASGI app. The model need not be loaded."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._state.is_draining:
            raise self._state.draining_error()
        body = await read_json_object(scope, receive, stalled_s=self._state.config.stalled_reader_seconds)
        SEARCH_RULES.refuse(body.value)
        request = parse_request(SearchRequest, body.value)
        work = self._answer(request, send, tenant=record_of(scope).owner)
        await run_while_connected(work, scope=scope, receive=receive, state=self._state)

    async def _answer(self, request: SearchRequest, send: Send, *, tenant: str) -> None:
        query, is_local = request.to_query(), request.external_web_access is False
        try:
            answer = await self._state.search.search(query, tenant=tenant, is_local=is_local)
        except ProviderError as error:
            if error.reason == "not_configured":  # no server error: to try again helps nobody
                raise NotFoundError(str(error), code="search_not_configured") from error
            raise SearchFailedError(str(error), code="search_failed") from error
        await send_json(send, _body(answer))


def _body(answer: SearchAnswer) -> dict[str, object]:
    body: dict[str, object] = {
        "id": f"search-{uuid.uuid4().hex}",
        "object": "search",
        "results": [result_json(result) for result in answer.results],
        "provider": answer.provider,
        "is_cached": answer.is_cached,
    }
    failures = [{"provider": f.provider, "reason": f.reason, "message": f.message} for f in answer.failures]
    return body | {"failures": failures} if failures else body


def result_json(result: SearchResult) -> dict[str, object]:
    return {
        "title": result.title,
        "url": result.url,
        "snippet": result.snippet,
        "date": result.date,
        "last_updated": None,
        "location": result.location,
        "provider": result.provider,
    }
