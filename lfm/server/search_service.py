"""Everything that searches for one API process: providers, the local index, page fetch. Opened when first used."""

import asyncio
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

from lfm.search.addresses import AllowList
from lfm.search.chain import Outcomes, SearchAnswer, SearchChain
from lfm.search.config import SearchConfig
from lfm.search.embeddings import EmbeddingClient
from lfm.search.errors import FetchError, NoIndexError
from lfm.search.extraction import Extractor
from lfm.search.fetch import FetchLimits, Page, PageFetcher
from lfm.search.local_index import STORE_FILE, Hit, LocalIndex
from lfm.search.results import SearchQuery
from lfm.search.setup import open_chain
from lfm.server.search_memory import SearchMemory


class SearchService:
    """For one event loop. Close it; nothing is open before the first search. `outcomes` counts what became of them."""

    def __init__(self, config: SearchConfig | None = None) -> None:
        self.config = config or SearchConfig()
        self._index = _Index(self.config)
        self._web: SearchChain | None = None
        self._local: SearchChain | None = None
        self._extractor: Extractor | None = None
        self._fetcher: PageFetcher | None = None
        self.outcomes: Outcomes = Counter()
        self.memory = SearchMemory()

    async def search(self, query: SearchQuery, *, tenant: str, is_local: bool = False) -> SearchAnswer:
        """What the configured providers find, or with `is_local` what stands in the operator's own documents.

        Raises ProviderError if no provider answered. `tenant` keeps the cache of answers apart.
        """
        chain = self._local_chain() if is_local else self._web_chain()
        return await chain.search(query, deadline_s=self.config.search_seconds, tenant=tenant)

    async def fetch(self, url: str) -> Page:
        """One page as text, within `page_seconds` all in all. Raises FetchError."""
        if self._fetcher is None:
            self._extractor = Extractor(timeout_s=self.config.page_seconds)
            limits = FetchLimits(timeout_s=self.config.page_seconds)
            allow = AllowList.parse(self.config.fetch_allow)
            self._fetcher = PageFetcher(self._extractor, allow=allow, limits=limits)
        try:
            async with asyncio.timeout(self.config.page_seconds):
                return await self._fetcher.fetch(url)
        except TimeoutError:
            raise FetchError("timeout", f"The page took longer than {self.config.page_seconds:g} s.") from None

    async def aclose(self) -> None:
        """Close what was opened. Idempotent."""
        for chain in (self._web, self._local):
            if chain is not None:
                await chain.aclose()
        if self._fetcher is not None:
            await self._fetcher.aclose()
        if self._extractor is not None:
            self._extractor.close()
        self._index.close()
        self._web = self._local = self._fetcher = self._extractor = None

    def _web_chain(self) -> SearchChain:
        if self._web is None:
            self._web = open_chain(self.config, index=self._index, outcomes=self.outcomes)
        return self._web

    def _local_chain(self) -> SearchChain:
        if self._local is None:
            local = replace(self.config, providers=("local",))
            self._local = open_chain(local, index=self._index, outcomes=self.outcomes)
        return self._local


class _Index:
    """The operator's index, opened by the first search that finds it there. One that fails to open is tried again."""

    def __init__(self, config: SearchConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._opened: LocalIndex | None = None

    def search(self, query: str, *, limit: int = 10) -> list[Hit]:
        return self._open().search(query, limit=limit)

    def close(self) -> None:
        with self._lock:
            if self._opened is not None:
                self._opened.close()
            self._opened = None

    def _open(self) -> LocalIndex:
        config = self._config
        with self._lock:
            if self._opened is None:
                folder = None if config.index_folder is None else Path(config.index_folder)
                if folder is None or not (folder / STORE_FILE).is_file():
                    raise NoIndexError(
                        "There is no index of documents on this server yet. Its operator can make one with "
                        "`lfm index add PATH...`, or choose a provider with --search-providers."
                    )
                embeddings = None
                if config.embeddings_url is not None and config.embeddings_model is not None:
                    embeddings = EmbeddingClient(
                        config.embeddings_url, config.embeddings_model, api_key=config.embeddings_key
                    )
                self._opened = LocalIndex(folder, embeddings=embeddings)
            return self._opened
