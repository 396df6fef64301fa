"""SearXNG, a meta search engine that one runs oneself. Shape: docs.searxng.org/dev/search_api.html, read 2026-11-21.

The operator must have `json` among `search.formats` in its settings.yml; without it, every request gets a 403.
"""

import msgspec

from lfm.search.errors import ProviderError
from lfm.search.providers.provider import ProviderClient
from lfm.search.providers.site_operator import with_sites
from lfm.search.results import SearchQuery, SearchResult, wanted, web_result


class _Result(msgspec.Struct):
    url: str | None = None
    title: str | None = None
    content: str | None = None
    publishedDate: str | None = None


class _Answer(msgspec.Struct):
    results: list[object]  # of `_Result`


class SearXng:
    """Searches an instance at `base_url`."""

    name = "searxng"
    is_cacheable = True

    def __init__(self, *, base_url: str) -> None:
        self._client = ProviderClient(self.name, base_url)

    async def search(self, query: SearchQuery) -> list[SearchResult]:
        try:
            answer = await self._client.get(
                "/search", params={"q": with_sites(query), "format": "json", "categories": "general"}, answer=_Answer
            )
        except ProviderError as error:
            if error.reason == "forbidden":
                raise ProviderError(
                    "forbidden", "searxng refuses to answer in JSON. Add json to search.formats in its settings.yml."
                ) from error
            raise
        results = [
            web_result(
                title=result.title,
                url=result.url,
                snippet=result.content,
                provider=self.name,
                date=result.publishedDate,
            )
            for result in self._client.well_formed(answer.results, _Result)
        ]
        return wanted(results, query)

    async def aclose(self) -> None:
        await self._client.aclose()
