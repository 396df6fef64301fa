"""The `site:` operator, for providers that have no field for domains."""

from lfm.search.results import SearchQuery

_MAX_SITES = 10  # in one query; more are left to our own filter


def with_sites(query: SearchQuery) -> str:
    """The words, and the allowed domains as the `site:` operator that most engines know."""
    if not 0 < len(query.allowed_domains) <= _MAX_SITES:
        return query.words
    sites = " OR ".join(f"site:{domain}" for domain in query.allowed_domains)
    return f"{query.words} ({sites})" if len(query.allowed_domains) > 1 else f"{query.words} {sites}"
