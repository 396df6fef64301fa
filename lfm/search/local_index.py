"""The embedded index over the user's own documents: a folder with the truth in SQLite and a BM25 index beside it.

The BM25 index follows the truth: it is brought up to date before a search, built again when it is missing, damaged or
of another history, and written by one process at a time. Any number of processes may search and add.
"""

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lfm.errors import LfmError, MachineError
from lfm.search import analyser
from lfm.search.analyser import query_terms
from lfm.search.errors import IndexBusyError, IndexFileError
from lfm.search.fts5_index import Fts5Index
from lfm.search.ranking import fuse
from lfm.search.store import Position, Store, StoredChunk
from lfm.search.text_index import IndexDamaged, ScoredChunk, TextIndex, catch_up

if TYPE_CHECKING:
    from lfm.search.embeddings import EmbeddingClient
    from lfm.search.vectors import VectorIndex

logger = logging.getLogger(__name__)

STORE_FILE = "documents.sqlite"
LOCK_FILE = "writer.lock"
_LOCK_WAIT_S = 600.0  # another process may be building the whole index
_LOCK_POLL_S = 0.05
_FUSED = 50  # hits of each kind that are fused

OnChange = Callable[[int], None]


def ignore_change(num_left: int) -> None:
    """The callback of a caller that does not want to know."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk that was found. `score` compares only with the other hits of the same search."""

    chunk: StoredChunk
    score: float

    @property
    def location(self) -> str:
        """Where in the document it stands, for people: "page 3", "Install > Linux" or ""."""
        if self.chunk.page is not None:
            return f"page {self.chunk.page}"
        return self.chunk.heading.removeprefix(self.chunk.title).removeprefix(" > ")


class LocalIndex:
    """An open index, which several threads may share. Close it, or use `with`."""

    def __init__(
        self, folder: Path, *, text_index: TextIndex | None = None, embeddings: "EmbeddingClient | None" = None
    ) -> None:
        """Open the index in `folder`, or make it. Raises IndexFileError, IndexBusyError or MachineError.

        `text_index` None: tantivy where it is installed, else FTS5. `embeddings` adds dense vectors, and is closed with
        the index.
        """
        self._folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(f"The index folder {folder} cannot be made ({error.strerror}).") from error
        self.store = Store(folder / STORE_FILE)
        self._text = text_index or default_text_index(folder)
        self._vectors = _open_vectors(folder, embeddings) if embeddings is not None else None
        self._following = threading.Lock()  # held by the thread that brings the text index up to date for a search
        self._seen: Position | None = None  # the head of the log when the text index was last seen to be there

    def close(self) -> None:
        self._text.close()
        if self._vectors is not None:
            self._vectors.close()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def search(self, query: str, *, limit: int = 10) -> list[Hit]:
        """The chunks that match any term of `query`, best first. The query is text, whatever it contains.

        With dense vectors, the chunks nearest to it in meaning are found too, and the two rankings fused; if that
        fails, the words alone decide.

        Brings the BM25 index up to date first; while another process does that, the older state is searched. Raises
        IndexBusyError while another one builds it from nothing.
        """
        terms = query_terms(query)
        if not terms:
            return []
        scored = self._search_words(terms, limit if self._vectors is None else max(limit, _FUSED))
        if self._vectors is not None:
            scored = self._fused(self._vectors, scored, query)[:limit]
        chunks = self.store.chunks([found.chunk_id for found in scored])
        return [Hit(chunks[found.chunk_id], found.score) for found in scored if found.chunk_id in chunks]

    def sync(self, *, on_change: OnChange = ignore_change) -> None:
        """Bring the indexes up to date, waiting for another process that does. `on_change`: how much is left to do.

        Raises EmbeddingError when the words are indexed and some vectors are not.
        """
        with self._exclusive(wait_s=_LOCK_WAIT_S):
            try:
                self._follow_log(on_change)
            except IndexDamaged as damage:
                self._rebuild(damage, on_change)
        if self._vectors is not None:
            self._vectors.update(self.store, on_change=on_change)

    def _search_words(self, terms: list[str], limit: int) -> list[ScoredChunk]:
        try:
            return self._search_terms(terms, limit)
        except IndexDamaged as damage:
            with self._exclusive(wait_s=0.0):
                self._rebuild(damage)
            return self._search_terms(terms, limit)

    def _fused(self, vectors: "VectorIndex", scored: list[ScoredChunk], query: str) -> list[ScoredChunk]:
        try:
            near = vectors.search(self.store, query, limit=_FUSED)
        except LfmError as error:
            logger.warning("searching by words alone: %s", error)
            return scored
        return [ScoredChunk(chunk_id, score) for chunk_id, score in fuse([_ids(scored), _ids(near)])]

    def _search_terms(self, terms: list[str], limit: int) -> list[ScoredChunk]:
        head = self.store.head()
        if head is None:
            return []
        if head != self._seen:
            self._follow(head)
        return self._text.search(terms, limit=limit)

    def _follow(self, head: Position) -> None:
        """Get to the head of the log, unless somebody else is about to and there is something to search meanwhile."""
        position = self._text.position()
        if position == head:
            self._seen = head
            return
        if not self._following.acquire(blocking=position is None):
            return
        try:
            with self._exclusive(wait_s=0.0):
                self._follow_log(ignore_change)
        except IndexBusyError:
            if position is None:
                raise
        finally:
            self._following.release()

    def _follow_log(self, on_change: OnChange) -> None:
        catch_up(self._text, self.store, on_change=on_change)
        self._seen = self._text.position()

    def _rebuild(self, damage: IndexDamaged, on_change: OnChange = ignore_change) -> None:
        """Throw the BM25 index away and make another. To be called under the writer's lock."""
        logger.warning("the BM25 index in %s is built again: %s", self._folder, damage)
        self._seen = None
        try:
            self._text.clear()
            self._follow_log(on_change)
        except IndexDamaged as error:
            raise IndexFileError(f"The BM25 index in {self._folder} cannot be built: {error}.") from error

    @contextlib.contextmanager
    def _exclusive(self, *, wait_s: float) -> Iterator[None]:
        """Hold the one right to write the BM25 index; the kernel gives it back when a process dies."""
        deadline_s = time.monotonic() + wait_s
        descriptor = os.open(self._folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline_s:
                        raise IndexBusyError(
                            f"The BM25 index in {self._folder} is being written by another process. Try again later."
                        ) from None
                    time.sleep(_LOCK_POLL_S)
            yield
        finally:
            os.close(descriptor)


def _open_vectors(folder: Path, embeddings: "EmbeddingClient") -> "VectorIndex":
    from lfm.search.vectors import VectorIndex  # numpy takes longer to load than most searches last

    return VectorIndex(folder, embeddings)


def _ids(scored: list[ScoredChunk]) -> list[int]:
    return [found.chunk_id for found in scored]


def default_text_index(folder: Path) -> TextIndex:
    """Tantivy where the extra `search` is installed, else FTS5. Indexes of another analyser are left alone."""
    try:
        from lfm.search.tantivy_index import TantivyIndex
    except ModuleNotFoundError as error:
        if error.name != "tantivy":
            raise
        return Fts5Index(folder / f"bm25-{analyser.VERSION}.sqlite")
    return TantivyIndex(folder / f"bm25-{analyser.VERSION}.tantivy")
