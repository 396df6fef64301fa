"""Indexes for tests: on either backend, with documents of a few sentences."""

import asyncio
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lfm.search.chunks import cut
from lfm.search.config import SearchConfig
from lfm.search.extracted import Extracted
from lfm.search.fts5_index import Fts5Index
from lfm.search.local_index import LocalIndex
from lfm.search.store import NewDocument
from lfm.search.text_index import TextIndex
from lfm.server.search_service import SearchService

HAS_TANTIVY = importlib.util.find_spec("tantivy") is not None
BACKENDS = [
    pytest.param("tantivy", marks=pytest.mark.skipif(not HAS_TANTIVY, reason="needs tantivy, of the extra search")),
    "fts5",
]


def text_index(backend: str, folder: Path) -> TextIndex:
    if backend == "fts5":
        return Fts5Index(folder / "bm25.sqlite")
    from lfm.search.tantivy_index import TantivyIndex

    return TantivyIndex(folder / "bm25.tantivy")


def open_index(backend: str, folder: Path) -> LocalIndex:
    return LocalIndex(folder, text_index=text_index(backend, folder))


def document(path: str, text: str, *, title: str = "") -> NewDocument:
    """A Markdown document as `add_paths` would write it; without a title its path is one."""
    return NewDocument(
        path=path,
        title=title or path,
        kind="markdown",
        sha256=text.encode()[:32],
        recipe="test",
        num_bytes=len(text.encode()),
        chunks=cut(Extracted(text=text, is_markdown=True)),
    )


def paths_found(index: LocalIndex, query: str, *, limit: int = 10) -> Sequence[str]:
    return [hit.chunk.path for hit in index.search(query, limit=limit)]


@contextmanager
def search_service(
    folder: Path, documents: Mapping[str, str], config: SearchConfig | None = None
) -> Iterator[SearchService]:
    """What a server searches with: an index of `documents`, by path, and the providers of `config`."""
    with LocalIndex(folder) as index:
        index.store.write([document(path, text) for path, text in documents.items()])
    service = SearchService(replace(config or SearchConfig(), index_folder=str(folder)))
    yield service
    asyncio.run(service.aclose())
