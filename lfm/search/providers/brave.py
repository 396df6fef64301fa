"""Brave Search. Shape: api-dashboard.search.brave.com/api-reference/web/search/get, read 2026-11-21.

Its plans are limited by the second. Snippets carry <strong> tags and entities.
"""

import html
import re

import msgspec

from lfm.search.providers.provider import ProviderClient
from lfm.search.providers.site_operator import with_sites
from lfm.search.results import MAX_RESULTS, SearchQuery, SearchResult, wanted, web_result

BASE_URL = "https://api.search.brave.com"
_MAX_QUERY_CHARS, _MAX_QUERY_WORDS = 400, 50
_COUNTRIES = frozenset(
    ("AR", "AU", "AT", "BE", "BR", "CA", "CL", "CN", "DE", "DK", "ES", "FI", "FR", "GB", "GR", "HK", "ID", "IN", "IT")
) | {"JP", "KR", "MX", "MY", "NL", "NO", "NZ", "PH", "PL", "PT", "RU", "SA", "SE", "CH", "TR", "TW", "US", "ZA"}
_TAG = re.compile(r"</?[a-z]{1,10}>")


class _Result(msgspec.Struct):
    url: str | None = None
    title: str | None = None
    description: str | None = None
    page_age: str | None = None
    extra_snippets: list[str] = []


class _Web(msgspec.Struct):
    results: list[object] = []  # of `_Result`


class _Answer(msgspec.Struct):
    web: _Web | None = None  # absent where nothing was found


class Brave:
    """Searches with a subscription token."""

    name = "brave"
    is_cacheable = True

    def __init__(self, *, api_key: str, base_url: str = BASE_URL) -> None:
        self._client = ProviderClient(self.name, base_url, headers={"X-Subscription-Token": api_key})

    async def search(self, query: SearchQuery) -> list[SearchResult]:
        is_filtered = bool(query.allowed_domains or query.blocked_domains)
        params = {
            "q": " ".join(with_sites(query).split()[:_MAX_QUERY_WORDS])[:_MAX_QUERY_CHARS],
            "count": str(MAX_RESULTS if is_filtered else query.max_results),
        }
        if query.country in _COUNTRIES:
            params["country"] = query.country
        answer = await self._client.get("/res/v1/web/search", params=params, answer=_Answer)
        results = [
            web_result(
                title=_plain(result.title or ""),
                url=result.url,
                snippet="\n".join(map(_plain, [result.description or "", *result.extra_snippets])),
                provider=self.name,
                date=result.page_age,
            )
            for result in self._client.well_formed(answer.web.results if answer.web else [], _Result)
        ]
        return wanted(results, query)

    async def aclose(self) -> None:
        await self._client.aclose()


def _plain(text: str) -> str:
    return html.unescape(_TAG.sub("", text))
