"""Exa. Shape: exa.ai/docs/reference/search, read 2026-11-21. Highlights are asked for: they are what fits a prompt."""

import msgspec

from lfm.search.providers.provider import ProviderClient
from lfm.search.results import SearchQuery, SearchResult, wanted, web_result

BASE_URL = "https://api.exa.ai"


class _Result(msgspec.Struct):
    url: str | None = None
    title: str | None = None
    text: str | None = None
    highlights: list[str] | None = None
    publishedDate: str | None = None


class _Answer(msgspec.Struct):
    results: list[object]  # of `_Result`


class Exa:
    """Searches with an API key."""

    name = "exa"
    is_cacheable = True

    def __init__(self, *, api_key: str, base_url: str = BASE_URL) -> None:
        self._client = ProviderClient(self.name, base_url, headers={"x-api-key": api_key})

    async def search(self, query: SearchQuery) -> list[SearchResult]:
        body: dict[str, object] = {
            "query": query.words,
            "numResults": query.max_results,
            "contents": {"highlights": True},
        }
        if query.allowed_domains:
            body["includeDomains"] = query.allowed_domains
        if query.blocked_domains:
            body["excludeDomains"] = query.blocked_domains
        if query.country is not None:
            body["userLocation"] = query.country
        answer = await self._client.post("/search", body=body, answer=_Answer)
        results = [
            web_result(
                title=result.title,
                url=result.url,
                snippet="\n".join(result.highlights or []) or result.text,
                provider=self.name,
                date=result.publishedDate,
            )
            for result in self._client.well_formed(answer.results, _Result)
        ]
        return wanted(results, query)

    async def aclose(self) -> None:
        await self._client.aclose()
