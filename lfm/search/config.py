"""What an operator may choose about search, checked. Nothing is opened or asked here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from lfm.errors import UsageError
from lfm.search.addresses import AllowList
from lfm.search.urls import server_root

MAX_WAIT_S = 120.0
MAX_SEARCHES = 16
MAX_RATE = 10_000
_NEEDS = {
    "searxng": "searxng_url",
    "brave": "brave_api_key",
    "tavily": "tavily_api_key",
    "exa": "exa_api_key",
}
_KEYS = ("brave_api_key", "tavily_api_key", "exa_api_key", "embeddings_key")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """Providers in order of preference, and what each needs. Keys are masked in `repr`.

    `rates_per_s` replaces the usual rates, by provider; each of `num_processes` takes its part of them. `index_folder`
    None: there is no local index. `shows_paths`: whether callers see where the operator's documents are, or names only.
    `fetch_allow`: servers and networks inside that pages may be fetched from. `provider_seconds` is the time for one
    provider, `search_seconds` for all of a search, `page_seconds` for one page. `max_searches` is how often a model may
    search for one answer.

    Raises UsageError for a provider that is not known or lacks its key or address, for keys and addresses that cannot
    be, and for values out of range.
    """

    providers: tuple[str, ...] = ("local",)
    searxng_url: str | None = None
    brave_api_key: str | None = None
    tavily_api_key: str | None = None
    exa_api_key: str | None = None
    rates_per_s: Mapping[str, float] = field(default_factory=dict)
    num_processes: int = 1
    index_folder: str | None = None
    shows_paths: bool = True
    embeddings_url: str | None = None
    embeddings_model: str | None = None
    embeddings_key: str | None = None
    fetch_allow: tuple[str, ...] = ()
    provider_seconds: float = 5.0
    search_seconds: float = 10.0
    page_seconds: float = 8.0
    max_searches: int = 4

    def __post_init__(self) -> None:
        for name in self.providers:
            if name != "local" and name not in _NEEDS:
                known = ", ".join(("local", *_NEEDS))
                raise UsageError(f"The search provider {name!r} is not known. Allowed: {known}.")
            if name in _NEEDS and not getattr(self, _NEEDS[name]):
                raise UsageError(f"The search provider {name} needs {_NEEDS[name]}. Set LFM_{_NEEDS[name].upper()}.")
        if len(set(self.providers)) < len(self.providers):
            raise UsageError(f"A search provider is named twice in {', '.join(self.providers)}. Name each once.")
        for name, rate in self.rates_per_s.items():
            if name not in _NEEDS:
                raise UsageError(
                    f"There is no search provider {name!r} to set a rate of. Allowed: {', '.join(_NEEDS)}."
                )
            if not 0 < rate <= MAX_RATE:
                raise UsageError(
                    f"The rate of {name}, {rate:g} a second, is out of range. Allowed: up to {MAX_RATE:,}."
                )
        for name in ("provider_seconds", "search_seconds", "page_seconds"):
            if not 0 < getattr(self, name) <= MAX_WAIT_S:
                raise UsageError(f"{name}={getattr(self, name):g} is out of range. Allowed: above 0 to {MAX_WAIT_S:g}.")
        if not 1 <= self.max_searches <= MAX_SEARCHES:
            raise UsageError(f"max_searches={self.max_searches} is out of range. Allowed: 1 to {MAX_SEARCHES}.")
        if (self.embeddings_url is None) != (self.embeddings_model is None):
            raise UsageError("--embeddings-url and --embeddings-model belong together. Give both, or neither.")
        if self.searxng_url is not None:
            server_root(self.searxng_url, of="searxng")
        if self.embeddings_url is not None:
            server_root(self.embeddings_url, of="the embeddings server")
        for name in _KEYS:
            key = getattr(self, name) or ""
            if not key.isascii() or not key.isprintable():  # no header could hold it
                raise UsageError(f"{name} holds characters that are in no key. Set LFM_{name.upper()} again.")
        AllowList.parse(self.fetch_allow)

    def __repr__(self) -> str:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        shown = ((name, "***" if name in _KEYS and value else value) for name, value in values)
        return f"SearchConfig({', '.join(f'{name}={value!r}' for name, value in shown)})"
