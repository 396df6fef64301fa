"""The chain of providers that an operator's settings make."""

from collections.abc import Callable, Mapping

from lfm.errors import UsageError
from lfm.search.chain import Link, Outcomes, SearchChain
from lfm.search.config import SearchConfig
from lfm.search.providers.brave import Brave
from lfm.search.providers.exa import Exa
from lfm.search.providers.local import Local, Searchable
from lfm.search.providers.provider import Provider
from lfm.search.providers.searxng import SearXng
from lfm.search.providers.tavily import Tavily
from lfm.search.rate_limit import RateLimit

# Requests per second that the smallest plan of each allows.
RATES_PER_S: Mapping[str, float] = {"brave": 1.0, "tavily": 1.5, "exa": 5.0}


def open_chain(
    config: SearchConfig, *, index: Searchable | None = None, outcomes: Outcomes | None = None
) -> SearchChain:
    """The chain of the configured providers. `index` serves `local` and stays the caller's. `outcomes` is counted up.

    Raises UsageError where `local` is configured and there is no index.
    """
    makers: dict[str, Callable[[], Provider]] = {
        "searxng": lambda: SearXng(base_url=config.searxng_url or ""),
        "brave": lambda: Brave(api_key=config.brave_api_key or ""),
        "tavily": lambda: Tavily(api_key=config.tavily_api_key or ""),
        "exa": lambda: Exa(api_key=config.exa_api_key or ""),
        "local": lambda: Local(_given(index), shows_paths=config.shows_paths),
    }
    return SearchChain([_link(makers[name](), config) for name in config.providers], outcomes=outcomes)


def _given(index: Searchable | None) -> Searchable:
    if index is None:
        raise UsageError("The search provider local needs an index. Make one with: lfm index add PATH...")
    return index


def _link(provider: Provider, config: SearchConfig) -> Link:
    per_s = config.rates_per_s.get(provider.name, RATES_PER_S.get(provider.name))
    per_s = None if per_s is None else per_s / config.num_processes
    limit = None if per_s is None else RateLimit(per_s, burst=max(1, round(per_s)))
    return Link(provider=provider, timeout_s=config.provider_seconds, rate_limit=limit)
