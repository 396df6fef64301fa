"""The user's own documents as a search provider: it needs no network, and its answers are never stale."""

import asyncio
from pathlib import Path

from lfm.errors import LfmError
from lfm.search.clean import clean_line, clean_text
from lfm.search.errors import ProviderError
from lfm.search.local_index import Hit, LocalIndex
from lfm.search.results import SearchQuery, SearchResult

_MAX_TITLE_CHARS, _MAX_SNIPPET_CHARS, _MAX_LOCATION_CHARS = 300, 4_000, 200


class Local:
    """Searches a `LocalIndex`, which stays the caller's. Domains mean nothing here and are ignored."""

    name = "local"
    is_cacheable = False

    def __init__(self, index: LocalIndex) -> None:
        self._index = index

    async def search(self, query: SearchQuery) -> list[SearchResult]:
        try:
            hits = await asyncio.to_thread(self._index.search, query.text, limit=query.max_results)
        except LfmError as error:
            raise ProviderError("failed", f"The local index cannot be searched. {error}") from error
        return [self._result(hit) for hit in hits]

    async def aclose(self) -> None:
        """Nothing: the index is the caller's."""

    def _result(self, hit: Hit) -> SearchResult:
        return SearchResult(
            title=clean_line(hit.chunk.title, max_chars=_MAX_TITLE_CHARS),
            url=Path(hit.chunk.path).as_uri() if hit.chunk.path.startswith("/") else hit.chunk.path,
            snippet=clean_text(hit.chunk.text, max_chars=_MAX_SNIPPET_CHARS),
            provider=self.name,
            location=clean_line(hit.location, max_chars=_MAX_LOCATION_CHARS),
        )
