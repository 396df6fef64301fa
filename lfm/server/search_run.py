"""One search that a model asked for: what it is told, what it may cite, and a trace of everything that was fetched.

Whatever goes wrong becomes a sentence that the model reads in place of results: the answer goes on without them.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lfm.errors import RequestError
from lfm.search.errors import FetchError, ProviderError
from lfm.search.packing import CONTEXT_TOKENS, SourceDocument, pack
from lfm.search.results import SearchQuery, SearchResult
from lfm.search.sources import CITE_INSTRUCTION, Source, grounded
from lfm.server.search_service import SearchService
from lfm.server.server_tools import ContextSize, SearchTool

logger = logging.getLogger(__name__)

MAX_RESULTS: dict[ContextSize, int] = {"low": 4, "medium": 6, "high": 10}
NUM_PAGES: dict[ContextSize, int] = {"low": 0, "medium": 3, "high": 5}  # of the best results, read as a whole
_MAX_PAGE_CHARS = 60_000
_MIN_TOKENS = 200  # with less room no source is worth reading
_NO_ROOM = "There is no room left for search results. Answer with what you have."
NO_MORE = "No more searches are allowed. Answer with what you have."


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What was read under an address: the page itself, or the text that a provider gave. `sha256` is of that."""

    url: str
    title: str
    sha256: str
    num_bytes: int
    is_page: bool
    date: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRun:
    """What a search came to. `message` is what the model is told in place of sources; `error`, for programs, why.

    Sources are numbered from 1, until `numbered_from` has said where they stand among those of the answer.
    """

    sources: tuple[Source, ...] = ()
    reads: tuple[Read, ...] = ()
    message: str = ""
    error: str | None = None

    @property
    def text(self) -> str:
        """What the model is told."""
        return grounded(self.sources) if self.sources else self.message

    def numbered_from(self, number: int) -> "SearchRun":
        return replace(
            self, sources=tuple(replace(source, number=at) for at, source in enumerate(self.sources, number))
        )


async def run_search(
    text: str,
    tool: SearchTool,
    *,
    service: SearchService,
    tenant: str,
    room_tokens: int,
    count_tokens: Callable[[str], int],
    request_id: str,
) -> SearchRun:
    """Search for `text`. Never fails; takes no longer than the operator's limits on a search and on a page.

    Args:
        room_tokens: that the sources may take at most.
    """
    started_s = time.monotonic()
    budget_tokens = min(CONTEXT_TOKENS[tool.size], room_tokens)
    if budget_tokens < _MIN_TOKENS:
        return SearchRun(message=_NO_ROOM, error="no_room")
    try:
        query = tool.query(text, max_results=MAX_RESULTS[tool.size])
        answer = await service.search(query, tenant=tenant, is_local=tool.is_local)
    except RequestError as error:
        return SearchRun(message=f"The search was not made. {error.message}", error="invalid_tool_input")
    except ProviderError as error:
        logger.info("request_id=%s tool=%s provider=- reason=%s", request_id, tool.name, error.reason)
        return SearchRun(message=f"{error} Answer without sources, and say so.", error="unavailable")
    logger.info(
        "request_id=%s tool=%s provider=%s results=%d cached=%s failed=%s search_ms=%.0f",
        request_id,
        tool.name,
        answer.provider,
        len(answer.results),
        answer.is_cached,
        ",".join(f"{failure.provider}:{failure.reason}" for failure in answer.failures) or "-",
        (time.monotonic() - started_s) * 1e3,
    )
    if not answer.results:
        return SearchRun(message="Nothing was found. Try other words, or answer without sources, and say so.")
    num_pages = 0 if answer.provider == "local" else NUM_PAGES[tool.size]
    read = await asyncio.gather(
        *(
            _read(result, query, service=service, is_page=index < num_pages, request_id=request_id)
            for index, result in enumerate(answer.results)
        )
    )
    sources = await asyncio.to_thread(
        _pack, text, answer.results, read, budget_tokens=budget_tokens, count_tokens=count_tokens
    )
    reads = tuple(trace for _, trace in read)
    if not sources:
        message = "The results hold no text. Try other words, or answer without sources, and say so."
        return SearchRun(message=message, reads=reads)
    return SearchRun(sources=tuple(sources), reads=reads)


async def _read(
    result: SearchResult, query: SearchQuery, *, service: SearchService, is_page: bool, request_id: str
) -> tuple[SourceDocument, Read]:
    """The text of a result: its page, or what the provider says of it where the page cannot be had."""
    if is_page:
        try:
            page = await service.fetch(result.url)
        except FetchError as error:
            logger.info("request_id=%s url=%s not_read=%s", request_id, result.url, error.reason)
        else:
            hops = " ".join(page.hops)
            logger.info(
                "request_id=%s url=%s sha256=%s bytes=%d hops=%s",
                *(request_id, page.url, page.sha256, page.num_bytes, hops),
            )
            # Some pages are filled by scripts only, and some redirect to where the caller does not want to read.
            if len(page.text) >= len(result.snippet) and query.allows(page.url):
                title = page.title or result.title
                trace = Read(
                    url=page.url,
                    title=title,
                    sha256=page.sha256,
                    num_bytes=page.num_bytes,
                    is_page=True,
                    date=result.date,
                )
                return SourceDocument(text=page.text[:_MAX_PAGE_CHARS], title=title, url=page.url), trace
    data = result.snippet.encode("utf-8", "replace")
    digest = hashlib.sha256(data).hexdigest()
    logger.info(
        "request_id=%s url=%s sha256=%s bytes=%d from=%s", *(request_id, result.url, digest, len(data)), result.provider
    )
    document = SourceDocument(text=result.snippet, title=result.title, url=result.url)
    trace = Read(
        url=result.url, title=result.title, sha256=digest, num_bytes=len(data), is_page=False, date=result.date
    )
    return document, trace


def _pack(
    query: str,
    results: Sequence[SearchResult],
    read: Sequence[tuple[SourceDocument, Read]],
    *,
    budget_tokens: int,
    count_tokens: Callable[[str], int],
) -> list[Source]:
    """The passages that fit, best results first."""
    documents = [document for document, _ in read]
    budget_tokens -= count_tokens(CITE_INSTRUCTION)
    passages = pack(documents, query, budget_tokens=budget_tokens, count_tokens=count_tokens)
    return [
        replace(passage.source, location=results[passage.document].location, date=results[passage.document].date)
        for passage in passages
    ]
