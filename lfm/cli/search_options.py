"""What `lfm serve` lets an operator choose about search. Keys come from the environment only: flags can be seen by all.

The names of the fields are those of `SearchConfig`, which also checks them.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

from lfm.cli.options import flag
from lfm.config import ServerConfig
from lfm.errors import UsageError
from lfm.search.config import SearchConfig
from lfm.service.data_folder import data_folder

SEARCH = SearchConfig()
PROVIDERS = ",".join(SEARCH.providers)

_SEARCH = "Search"

ProvidersFlag = Annotated[
    str,
    flag(
        "search_providers",
        "Who is asked, in this order: local, searxng, brave, tavily, exa. Keys: LFM_BRAVE_API_KEY and the like.",
        panel=_SEARCH,
    ),
]
SearxngFlag = Annotated[str | None, flag("searxng_url", "Address of your SearXNG.", panel=_SEARCH)]
IndexFolderFlag = Annotated[
    str | None, flag("index", "Folder of the index of your documents. Unset: the one of lfm index.", panel=_SEARCH)
]
FetchAllowFlag = Annotated[
    list[str] | None,
    flag(
        "fetch_allow",
        "A server (docs.internal:8080) or network (10.1.0.0/16) inside that may be fetched from. May be repeated.",
        panel=_SEARCH,
    ),
]
SearchSecondsFlag = Annotated[float, flag("search_seconds", "The longest that a search may take.", panel=_SEARCH)]
ProviderSecondsFlag = Annotated[float, flag("provider_seconds", "The longest to wait for a provider.", panel=_SEARCH)]
RatesFlag = Annotated[
    str | None,
    flag("provider_rates", "Requests a second that your plans allow, such as brave=20,exa=10.", panel=_SEARCH),
]
MaxSearchesFlag = Annotated[int, flag("max_searches", "Searches of the model for one answer.", panel=_SEARCH)]


def search_config(
    environ: Mapping[str, str],
    *,
    providers: str,
    searxng_url: str | None,
    index_folder: str | None,
    fetch_allow: Sequence[str] | None,
    search_seconds: float,
    provider_seconds: float,
    provider_rates: str | None,
    max_searches: int,
    server: ServerConfig,
) -> SearchConfig:
    """The checked settings. The embeddings server is that of `lfm index`, from the environment. Raises UsageError."""
    return SearchConfig(
        providers=tuple(name for name in (part.strip() for part in providers.split(",")) if name),
        searxng_url=searxng_url,
        brave_api_key=_given(environ, "LFM_BRAVE_API_KEY"),
        tavily_api_key=_given(environ, "LFM_TAVILY_API_KEY"),
        exa_api_key=_given(environ, "LFM_EXA_API_KEY"),
        index_folder=index_folder or str(data_folder(environ) / "search"),
        embeddings_url=_given(environ, "LFM_EMBEDDINGS_URL"),
        embeddings_model=_given(environ, "LFM_EMBEDDINGS_MODEL"),
        embeddings_key=_given(environ, "LFM_EMBEDDINGS_KEY"),
        fetch_allow=tuple(fetch_allow or ()),
        search_seconds=search_seconds,
        provider_seconds=provider_seconds,
        rates_per_s=_rates(provider_rates or ""),
        max_searches=max_searches,
        shows_paths=server.is_loopback,
        num_processes=server.api_workers,
    )


def _rates(text: str) -> dict[str, float]:
    """Read brave=20,exa=10. Raises UsageError."""
    rates = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, rate = part.partition("=")
        try:
            rates[name.strip()] = float(rate)
        except ValueError as error:
            raise UsageError(f"--provider-rates {part!r} is no rate. Give some such as brave=20,exa=10.") from error
    return rates


def _given(environ: Mapping[str, str], name: str) -> str | None:
    return environ.get(name, "").strip() or None
