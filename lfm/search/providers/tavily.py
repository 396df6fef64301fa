"""Tavily. Shape: docs.tavily.com/documentation/api-reference/endpoint/search, read 2026-11-21."""

import msgspec

from lfm.search.providers.provider import ProviderClient
from lfm.search.results import SearchQuery, SearchResult, wanted, web_result

BASE_URL = "https://api.tavily.com"


class _Result(msgspec.Struct):
    url: str | None = None
    title: str | None = None
    content: str | None = None
    published_date: str | None = None


class _Answer(msgspec.Struct):
    results: list[object]  # of `_Result`


class Tavily:
    """Searches with an API key, at the basic depth of one credit."""

    name = "tavily"
    is_cacheable = True

    def __init__(self, *, api_key: str, base_url: str = BASE_URL) -> None:
        self._client = ProviderClient(self.name, base_url, headers={"Authorization": f"Bearer {api_key}"})

    async def search(self, query: SearchQuery) -> list[SearchResult]:
        body: dict[str, object] = {
            "query": query.words,
            "max_results": query.max_results,
            "search_depth": "basic",
            "include_answer": False,
            "include_raw_content": False,
        }
        if query.allowed_domains:
            body["include_domains"] = query.allowed_domains
        if query.blocked_domains:
            body["exclude_domains"] = query.blocked_domains
        answer = await self._client.post("/search", body=body, answer=_Answer)
        results = [
            web_result(
                title=result.title,
                url=result.url,
                snippet=result.content,
                provider=self.name,
                date=result.published_date,
            )
            for result in self._client.well_formed(answer.results, _Result)
        ]
        return wanted(results, query)

    async def aclose(self) -> None:
        await self._client.aclose()
