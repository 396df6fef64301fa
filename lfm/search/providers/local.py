"""The user's own documents as a search provider: it needs no network, and its answers are never stale."""

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from lfm.errors import LfmError
from lfm.search.clean import clean_line, clean_text
from lfm.search.errors import NoIndexError, ProviderError
from lfm.search.local_index import Hit
from lfm.search.results import SearchQuery, SearchResult

logger = logging.getLogger(__name__)

_MAX_AT_ONCE = 4
_MAX_TITLE_CHARS, _MAX_SNIPPET_CHARS, _MAX_LOCATION_CHARS = 300, 4_000, 200


class Searchable(Protocol):
    """What this provider needs of an index: `LocalIndex` has it."""

    def search(self, query: str, *, limit: int = 10) -> Sequence[Hit]:
        """The best matching passages, best first. Raises LfmError."""


class Local:
    """Searches an index, which stays the caller's. Documents are of no domain: where some are asked for, it finds none.

    `shows_paths`: whether results tell where a document is on this machine (file:///...), which its operator wants to
    see and nobody else should; without it an address is a digest of the path and the file's name (document:...).
    """

    name = "local"
    is_cacheable = False

    def __init__(self, index: Searchable, *, shows_paths: bool = True) -> None:
        self._index = index
        self._shows_paths = shows_paths
        # The first search may build the index, and the others wait for it: not in threads that others need.
        self._threads = ThreadPoolExecutor(_MAX_AT_ONCE, thread_name_prefix="lfm-index")

    async def search(self, query: SearchQuery) -> list[SearchResult]:
        if query.allowed_domains:
            return []
        try:
            search = partial(self._index.search, query.text, limit=query.max_results)
            hits = await asyncio.get_running_loop().run_in_executor(self._threads, search)
        except NoIndexError as error:
            raise ProviderError("not_configured", str(error)) from error
        except LfmError as error:
            logger.warning("the local index cannot be searched: %s", error)
            cause = f" {error}" if self._shows_paths else " The log of the server says why."
            raise ProviderError("failed", f"The local index cannot be searched.{cause}") from error
        return [self._result(hit) for hit in hits]

    async def aclose(self) -> None:
        """Wait for searches that run. The index is the caller's."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    def _result(self, hit: Hit) -> SearchResult:
        return SearchResult(
            title=clean_line(hit.chunk.title, max_chars=_MAX_TITLE_CHARS),
            url=self._address(hit.chunk.path),
            snippet=clean_text(hit.chunk.text, max_chars=_MAX_SNIPPET_CHARS),
            provider=self.name,
            location=clean_line(hit.location, max_chars=_MAX_LOCATION_CHARS),
        )

    def _address(self, path: str) -> str:
        if not path.startswith("/"):
            return path
        if self._shows_paths:
            return Path(path).as_uri()
        digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return f"document:{digest}/{quote(Path(path).name)}"
