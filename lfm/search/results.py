"""What is asked of a search, and what comes back, whoever answers it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lfm.errors import RequestError
from lfm.search.clean import clean_line, clean_text
from lfm.search.errors import FetchError
from lfm.search.urls import parse_url

MAX_QUERY_CHARS = 2_000
MAX_RESULTS = 20
MAX_DOMAINS = 100
_MAX_TITLE_CHARS, _MAX_SNIPPET_CHARS, _MAX_DATE_CHARS = 300, 4_000, 40

_DOMAIN = re.compile(r"(?=.{1,253}$)(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))+")
_COUNTRY = re.compile(r"[A-Z]{2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchQuery:
    """A question. Domains stand for themselves and all below them; `country` is of two letters, as ISO 3166 has it.

    Raises RequestError, whose `param` is the field, for what no provider could be asked.
    """

    text: str
    max_results: int = 5
    allowed_domains: tuple[str, ...] = ()
    blocked_domains: tuple[str, ...] = ()
    country: str | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise RequestError("The search query is empty. Send some words.", param="query")
        if len(self.text) > MAX_QUERY_CHARS:
            raise RequestError(
                f"The search query has {len(self.text):,} characters. Allowed: {MAX_QUERY_CHARS:,}.", param="query"
            )
        if not 1 <= self.max_results <= MAX_RESULTS:
            raise RequestError(
                f"max_results={self.max_results} is out of range. Allowed: 1 to {MAX_RESULTS}.", param="max_results"
            )
        check_domains(self.allowed_domains, "allowed_domains")
        check_domains(self.blocked_domains, "blocked_domains")
        if self.country is not None and not _COUNTRY.fullmatch(self.country):
            raise RequestError(f"country={self.country[:20]!r} is not valid. Allowed: two letters.", param="country")

    @property
    def words(self) -> str:
        """The text on one line, without control characters: what is sent."""
        return clean_line(self.text, max_chars=MAX_QUERY_CHARS)

    def allows(self, url: str) -> bool:
        """Whether a result of this address is wanted. The providers' own filters are not relied on."""
        host = parse_url(url).host
        if self.allowed_domains and not _is_in(host, self.allowed_domains):
            return False
        return not _is_in(host, self.blocked_domains)


def bare_domain(text: str) -> str:
    """Clients write https://example.org/ for example.org."""
    return re.sub(r"^https?://", "", text).rstrip("/")


def check_domains(domains: Sequence[str], param: str) -> None:
    """Raises RequestError that names `param`."""
    if len(domains) > MAX_DOMAINS:
        raise RequestError(f"{param} has {len(domains)} entries. Allowed: {MAX_DOMAINS}.", param=param)
    for domain in domains:
        if not _DOMAIN.fullmatch(domain.lower()):
            raise RequestError(f"{param} names {domain[:60]!r}. Allowed: domains such as example.org.", param=param)


def _is_in(host: str, domains: Sequence[str]) -> bool:
    return any(f".{host}".endswith(f".{domain.lower()}") for domain in domains)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """One hit, cleaned: no control characters, bounded lengths. `provider` says who found it.

    `location` is where in the document it stands, for the user's own ones. `date` is as the provider writes it.
    """

    title: str
    url: str
    snippet: str
    provider: str
    date: str | None = None
    location: str = ""


def web_result(
    *, title: str | None, url: str | None, snippet: str | None, provider: str, date: str | None = None
) -> SearchResult | None:
    """A result as a provider gave it, made fit to be shown; None for one without a proper web address."""
    try:
        address = str(parse_url((url or "").strip()))
    except FetchError:
        return None
    return SearchResult(
        title=clean_line(title or "", max_chars=_MAX_TITLE_CHARS) or address,
        url=address,
        snippet=clean_text(snippet or "", max_chars=_MAX_SNIPPET_CHARS),
        provider=provider,
        date=clean_line(date, max_chars=_MAX_DATE_CHARS) if date else None,
    )


def wanted(results: Sequence[SearchResult | None], query: SearchQuery) -> list[SearchResult]:
    """The first `max_results` that exist, are of the wanted domains, and of an address that did not come before."""
    kept: dict[str, SearchResult] = {}
    for result in results:
        if result is not None and query.allows(result.url):
            kept.setdefault(result.url, result)
    return list(kept.values())[: query.max_results]
