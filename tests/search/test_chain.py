"""The chain asks the next provider when one is no help, leaves tired ones alone, and remembers for 15 minutes."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from lfm.search.chain import CACHE_S, Link, SearchAnswer, SearchChain
from lfm.search.errors import ProviderError, ProviderReason
from lfm.search.rate_limit import RateLimit
from lfm.search.results import SearchQuery, SearchResult

QUERY = SearchQuery(text="pumps")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Fake:
    """A provider that does what the next of its `acts` says: an error, a number of results, or "hang"."""

    def __init__(self, name: str, *acts: ProviderError | int | str, is_cacheable: bool = True) -> None:
        self.name, self.is_cacheable = name, is_cacheable
        self.acts = list(acts)
        self.num_asked = 0
        self.is_closed = False

    async def search(self, query: SearchQuery) -> list[SearchResult]:
        act = self.acts[min(self.num_asked, len(self.acts) - 1)]
        self.num_asked += 1
        if isinstance(act, ProviderError):
            raise act
        if isinstance(act, str):
            await asyncio.Event().wait()
        assert isinstance(act, int)
        return [
            SearchResult(title=f"{number}", url="https://x.example/", snippet="", provider=self.name)
            for number in range(act)
        ]

    async def aclose(self) -> None:
        self.is_closed = True


def failing(reason: ProviderReason, *, retry_after_s: float | None = None) -> ProviderError:
    return ProviderError(reason, f"it {reason}.", retry_after_s=retry_after_s)


def run(call: Callable[[], Awaitable[SearchAnswer]]) -> SearchAnswer:
    async def body() -> SearchAnswer:
        return await call()

    return asyncio.run(body())


def search(
    chain: SearchChain, query: SearchQuery = QUERY, *, deadline_s: float = 5.0, tenant: str = ""
) -> SearchAnswer:
    return run(lambda: chain.search(query, deadline_s=deadline_s, tenant=tenant))


def test_the_first_provider_is_asked_and_no_other() -> None:
    first, second = Fake("first", 2), Fake("second", 2)
    answer = search(SearchChain([Link(provider=first), Link(provider=second)]))
    assert (answer.provider, len(answer.results), answer.failures, answer.is_cached) == ("first", 2, (), False)
    assert second.num_asked == 0


@pytest.mark.parametrize("reason", ["forbidden", "rate_limited", "timeout", "unreachable", "malformed", "failed"])
def test_after_a_failure_the_next_is_asked_and_the_failure_told(reason: ProviderReason) -> None:
    chain = SearchChain([Link(provider=Fake("first", failing(reason))), Link(provider=Fake("second", 1))])
    answer = search(chain)
    assert answer.provider == "second"
    assert [(failure.provider, failure.reason) for failure in answer.failures] == [("first", reason)]


def test_a_provider_that_hangs_is_left_after_its_time() -> None:
    chain = SearchChain([Link(provider=Fake("first", "hang"), timeout_s=0.1), Link(provider=Fake("second", 1))])
    start_s = time.monotonic()
    answer = search(chain)
    assert answer.provider == "second"
    assert answer.failures[0].reason == "timeout"
    assert time.monotonic() - start_s < 3


def test_the_deadline_holds_over_the_whole_chain() -> None:
    chain = SearchChain([Link(provider=Fake(name, "hang"), timeout_s=60) for name in ("first", "second", "third")])
    start_s = time.monotonic()
    with pytest.raises(ProviderError, match="The search failed"):
        search(chain, deadline_s=0.1)
    assert time.monotonic() - start_s < 3


def test_a_provider_that_finds_nothing_passes_the_question_on() -> None:
    answer = search(SearchChain([Link(provider=Fake("first", 0)), Link(provider=Fake("second", 3))]))
    assert (answer.provider, len(answer.results), answer.failures) == ("second", 3, ())


def test_when_all_find_nothing_that_is_the_answer() -> None:
    chain = SearchChain([Link(provider=Fake("first", failing("failed"))), Link(provider=Fake("second", 0))])
    answer = search(chain)
    assert (answer.provider, answer.results) == ("second", ())
    assert len(answer.failures) == 1


def test_when_all_fail_the_causes_are_told() -> None:
    chain = SearchChain([Link(provider=Fake("a", failing("forbidden"))), Link(provider=Fake("b", failing("timeout")))])
    with pytest.raises(ProviderError, match=r"The search failed\. it forbidden\. it timeout\."):
        search(chain)


def test_no_provider_at_all_says_who_can_help() -> None:
    with pytest.raises(ProviderError, match="There is no search provider"):
        search(SearchChain([]))


def test_a_provider_that_failed_is_asked_last_for_a_while() -> None:
    clock = Clock()
    first, second = Fake("first", failing("unreachable"), 1), Fake("second", 1)
    chain = SearchChain([Link(provider=first), Link(provider=second)], clock=clock)
    search(chain)
    assert search(chain, SearchQuery(text="other")).provider == "second"
    assert first.num_asked == 1
    clock.now_s += 31
    assert search(chain, SearchQuery(text="third")).provider == "first"


def test_a_resting_provider_is_still_better_than_none() -> None:
    first, second = Fake("first", failing("unreachable"), 1), Fake("second", 1, failing("failed"))
    chain = SearchChain([Link(provider=first), Link(provider=second)], clock=Clock())
    search(chain)
    assert search(chain, SearchQuery(text="other")).provider == "first"


def test_a_provider_that_wants_to_be_left_alone_is() -> None:
    clock = Clock()
    first = Fake("first", failing("rate_limited", retry_after_s=120.0), 1)
    chain = SearchChain([Link(provider=first)], clock=clock)
    for text in ("one", "two"):
        with pytest.raises(ProviderError):
            search(chain, SearchQuery(text=text))
    assert first.num_asked == 1
    clock.now_s += 121
    assert search(chain).provider == "first"


def test_the_same_question_is_answered_from_memory_for_15_minutes() -> None:
    clock = Clock()
    provider = Fake("first", 1)
    chain = SearchChain([Link(provider=provider)], clock=clock)
    search(chain)
    clock.now_s += CACHE_S - 1
    cached = search(chain, SearchQuery(text="  PUMPS "))
    assert cached.is_cached
    assert cached.results[0].provider == "first"
    assert provider.num_asked == 1
    clock.now_s += 2
    assert not search(chain).is_cached
    assert provider.num_asked == 2


@pytest.mark.parametrize(
    "other",
    [
        SearchQuery(text="valves"),
        SearchQuery(text="pumps", max_results=6),
        SearchQuery(text="pumps", allowed_domains=("example.org",)),
        SearchQuery(text="pumps", country="DE"),
    ],
)
def test_another_question_is_not(other: SearchQuery) -> None:
    provider = Fake("first", 1)
    chain = SearchChain([Link(provider=provider)])
    search(chain)
    assert not search(chain, other).is_cached


def test_what_one_tenant_asked_does_not_speed_up_another() -> None:
    provider = Fake("first", 1)
    chain = SearchChain([Link(provider=provider)])
    search(chain, tenant="a")
    assert not search(chain, tenant="b").is_cached
    assert search(chain, tenant="a").is_cached


def test_nothing_found_errors_and_the_user_s_documents_are_not_remembered() -> None:
    empty, local = Fake("empty", 0), Fake("local", 1, is_cacheable=False)
    for provider in (empty, local):
        chain = SearchChain([Link(provider=provider)])
        search(chain)
        assert not search(chain).is_cached
        assert provider.num_asked == 2


def test_the_memory_is_bounded() -> None:
    provider = Fake("first", 1)
    chain = SearchChain([Link(provider=provider)])

    async def body() -> None:
        for number in range(1100):
            await chain.search(SearchQuery(text=f"{number}"))
        assert (await chain.search(SearchQuery(text="1099"))).is_cached
        assert not (await chain.search(SearchQuery(text="0"))).is_cached

    asyncio.run(body())
    assert len(chain._cache) == 1024


def test_a_provider_whose_own_rate_is_used_up_is_passed_over() -> None:
    clock = Clock()
    first, second = Fake("first", 1), Fake("second", 1)
    limit = RateLimit(1.0, clock=clock)
    chain = SearchChain([Link(provider=first, rate_limit=limit), Link(provider=second)], clock=clock)
    providers = [search(chain, SearchQuery(text=text)).provider for text in ("one", "two")]
    clock.now_s += 1
    providers.append(search(chain, SearchQuery(text="three")).provider)
    assert providers == ["first", "second", "first"]


def test_without_another_provider_the_rate_is_waited_for() -> None:
    provider = Fake("first", 1)
    chain = SearchChain([Link(provider=provider, rate_limit=RateLimit(20.0))])

    async def body() -> float:
        start_s = time.monotonic()
        await asyncio.gather(*(chain.search(SearchQuery(text=f"{number}")) for number in range(5)))
        return time.monotonic() - start_s

    assert asyncio.run(body()) >= 4 / 20 - 0.01
    assert provider.num_asked == 5


def test_but_not_beyond_the_deadline() -> None:
    clock = Clock()
    chain = SearchChain([Link(provider=Fake("first", 1), rate_limit=RateLimit(0.01, clock=clock))], clock=clock)
    search(chain)
    with pytest.raises(ProviderError, match=r"first cannot be asked in time\."):
        search(chain, SearchQuery(text="two"))


def test_closing_the_chain_closes_its_providers() -> None:
    providers = [Fake("a", 1), Fake("b", 1)]
    asyncio.run(SearchChain([Link(provider=provider) for provider in providers]).aclose())
    assert all(provider.is_closed for provider in providers)


def test_a_rate_limit_saves_up_a_burst_and_no_more() -> None:
    clock = Clock()
    limit = RateLimit(2.0, burst=3, clock=clock)
    assert [limit.reserve() for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 1.0]
    clock.now_s += 1000
    assert [limit.reserve() for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
