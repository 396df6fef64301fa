"""Asks one provider after the other until one finds something, and remembers the answer for a while.

A provider that failed rests: it is asked after the others for half a minute, and not at all while it wants to be left
alone. One whose own rate limit is used up is passed over, and waited for only when no other answers.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from lfm.search.errors import ProviderError, ProviderReason
from lfm.search.providers.provider import Provider
from lfm.search.rate_limit import RateLimit
from lfm.search.results import SearchQuery, SearchResult

logger = logging.getLogger(__name__)

CACHE_S = 15 * 60.0
_MAX_CACHED = 1024
_REST_S = 30.0

Outcomes = Counter[tuple[str, str]]  # by provider, and "found", "empty", "cached" or the reason of its failure


@dataclass(slots=True, kw_only=True, eq=False)
class Link:
    """A provider and how it may be used. `timeout_s` is for one answer."""

    provider: Provider
    timeout_s: float = 5.0
    rate_limit: RateLimit | None = None
    resting_until_s: float = field(default=0.0, init=False)
    closed_until_s: float = field(default=0.0, init=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a provider was no help. `message` is fit for a reader."""

    provider: str
    reason: ProviderReason
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchAnswer:
    """What was found, by whom, and who failed before. No results: every provider that answered found nothing."""

    results: tuple[SearchResult, ...]
    provider: str
    failures: tuple[Failure, ...] = ()
    is_cached: bool = False


class SearchChain:
    """Providers in order of preference. For one event loop. Close it, and with it the providers."""

    def __init__(
        self, links: Sequence[Link], *, outcomes: Outcomes | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`outcomes` is counted up for every provider that a search came to."""
        self._outcomes: Outcomes = Counter() if outcomes is None else outcomes
        self._links = tuple(links)
        self._cacheable = {link.provider.name for link in links if link.provider.is_cacheable}
        self._clock = clock
        self._cache: OrderedDict[tuple[str, SearchQuery], tuple[float, SearchAnswer]] = OrderedDict()

    async def search(self, query: SearchQuery, *, deadline_s: float = 10.0, tenant: str = "") -> SearchAnswer:
        """The first answer with results, else an empty one. Raises ProviderError if no provider answered at all.

        `tenant` keeps the cache apart: nobody can tell from the time an answer takes what others asked for.
        """
        key = (tenant, replace(query, text=" ".join(query.text.casefold().split())))
        cached = self._cached(key)
        if cached is not None:
            self._outcomes[cached.provider, "cached"] += 1
            return cached
        search = _Search(query, self._clock, self._clock() + deadline_s, self._outcomes)
        answer = await search.run(self._links)
        if answer is None:
            raise _no_answer(search.failures)
        answer = replace(answer, failures=tuple(search.failures))
        if answer.results and answer.provider in self._cacheable:
            self._remember(key, answer)
        return answer

    async def aclose(self) -> None:
        """Close every provider."""
        for link in self._links:
            await link.provider.aclose()

    def _cached(self, key: tuple[str, SearchQuery]) -> SearchAnswer | None:
        expires_s, answer = self._cache.get(key, (0.0, None))
        if answer is None or expires_s <= self._clock():
            return None
        self._cache.move_to_end(key)
        return replace(answer, is_cached=True, failures=())

    def _remember(self, key: tuple[str, SearchQuery], answer: SearchAnswer) -> None:
        self._cache[key] = (self._clock() + CACHE_S, answer)
        self._cache.move_to_end(key)
        while len(self._cache) > _MAX_CACHED:
            self._cache.popitem(last=False)


class _Search:
    """One question on its way along the chain."""

    def __init__(self, query: SearchQuery, clock: Callable[[], float], deadline_s: float, outcomes: Outcomes) -> None:
        self._query, self._clock, self._deadline_s, self._outcomes = query, clock, deadline_s, outcomes
        self.failures: list[Failure] = []
        self._empty: SearchAnswer | None = None

    async def run(self, links: Sequence[Link]) -> SearchAnswer | None:
        """The first answer with results, else the first empty one, else None: all failed."""
        waiting = []
        for link in sorted(links, key=lambda link: link.resting_until_s > self._clock()):
            if link.closed_until_s > self._clock():
                self._fail(link, "rate_limited", f"{link.provider.name} wants to be left alone for a while.")
            elif link.rate_limit is not None and link.rate_limit.wait_s() > 0:
                waiting.append(link)
            elif answer := await self._ask(link):
                return answer
        for link in waiting:
            if self._empty is None and (answer := await self._ask(link)):
                return answer
        return self._empty

    async def _ask(self, link: Link) -> SearchAnswer | None:
        """The provider's answer if it has results; else None, and what it was is noted."""
        wait_s = link.rate_limit.wait_s() if link.rate_limit is not None else 0.0
        remaining_s = self._deadline_s - self._clock()
        if remaining_s <= wait_s:
            reason: ProviderReason = "timeout" if remaining_s <= 0 else "rate_limited"
            self._fail(link, reason, f"{link.provider.name} cannot be asked in time.")
            return None
        if link.rate_limit is not None:
            await asyncio.sleep(link.rate_limit.reserve())
        try:
            async with asyncio.timeout(min(link.timeout_s, self._deadline_s - self._clock())):
                results = await link.provider.search(self._query)
        except TimeoutError:
            self._rest(link, ProviderError("timeout", f"{link.provider.name} did not answer in time."))
            return None
        except ProviderError as error:
            self._rest(link, error)
            return None
        link.resting_until_s = 0.0
        self._outcomes[link.provider.name, "found" if results else "empty"] += 1
        answer = SearchAnswer(results=tuple(results), provider=link.provider.name)
        if results:
            return answer
        self._empty = self._empty or answer
        return None

    def _rest(self, link: Link, error: ProviderError) -> None:
        logger.warning("search provider %s failed (%s): %s", link.provider.name, error.reason, error)
        now = self._clock()
        link.resting_until_s = now + _REST_S
        if error.retry_after_s is not None:
            link.closed_until_s = now + error.retry_after_s
        self._fail(link, error.reason, str(error))

    def _fail(self, link: Link, reason: ProviderReason, message: str) -> None:
        self._outcomes[link.provider.name, reason] += 1
        self.failures.append(Failure(provider=link.provider.name, reason=reason, message=message))


def _no_answer(failures: Sequence[Failure]) -> ProviderError:
    if all(failure.reason == "not_configured" for failure in failures):
        nobody = "There is no search provider on this server. Its operator can choose some with --search-providers."
        return ProviderError("not_configured", " ".join(failure.message for failure in failures) or nobody)
    return ProviderError("failed", " ".join(["The search failed.", *(failure.message for failure in failures)]))
