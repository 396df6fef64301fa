"""What a BM25 index beside the truth must offer, and how it follows the log of changes.

An index never holds text that is shown, only terms and chunk ids: it may be deleted at any time, and is built again. It
keeps its position in the log together with its contents, in one commit, so it is never in doubt about what it holds.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lfm.search.analyser import index_terms
from lfm.search.store import Change, Position, Store, StoredChunk

_CHUNKS_PER_COMMIT = 20_000
_CHANGES_PER_READ = 1_000


class IndexDamaged(Exception):
    """An index that cannot be read or written. It is thrown away and built again."""


class ScoredChunk(NamedTuple):
    """A chunk's id, and how well it matches: more is better."""

    chunk_id: int
    score: float


class IndexedChunk(NamedTuple):
    document_id: int
    chunk_id: int
    terms: Sequence[str]


@dataclass(frozen=True, slots=True)
class Update:
    """What one commit changes: first documents go, then chunks come, and the index is at `position`."""

    removed_documents: Sequence[int]
    chunks: Iterable[IndexedChunk]
    position: Position


class TextIndex(Protocol):
    """A BM25 index over terms. Every method may raise IndexDamaged."""

    def position(self) -> Position | None:
        """Up to where in the log it holds the documents; None: it is empty."""

    def apply(self, updates: Iterable[Update]) -> None:
        """Commit each update, one after the other. One process at a time may do that."""

    def search(self, terms: Sequence[str], *, limit: int) -> list[ScoredChunk]:
        """The best chunks that hold any of the terms, best first."""

    def clear(self) -> None:
        """Throw everything away, damaged or not."""

    def close(self) -> None:
        """Release its files. Idempotent."""


def catch_up(index: TextIndex, store: Store, *, on_change: Callable[[int], None]) -> None:
    """Bring `index` to the head of the log. It is emptied first if it does not belong to this log.

    `on_change` gets the number of changes that are still to be looked at, now and then.
    """
    position = index.position()
    if position is not None and not store.has_passed(position):
        index.clear()
        position = None
    index.apply(_updates(store, after=position.seq if position else 0, on_change=on_change))


class _Batch:
    """The changes that the next commit will hold."""

    def __init__(self) -> None:
        self.removed: list[int] = []
        self.added: dict[int, list[StoredChunk]] = {}
        self.num_chunks = 0
        self.position: Position | None = None

    def take(self, change: Change, store: Store) -> None:
        if change.is_removal:
            self.removed.append(change.document_id)
            self.added.pop(change.document_id, None)  # it went while we read
        else:
            chunks = store.chunks_of(change.document_id)  # none, if it went before that
            self.added[change.document_id] = chunks
            self.num_chunks += len(chunks)
        self.position = change.position

    def update(self) -> Update:
        assert self.position is not None
        chunks = (_indexed(chunk) for chunks in self.added.values() for chunk in chunks)
        return Update(self.removed, chunks, self.position)


def _updates(store: Store, *, after: int, on_change: Callable[[int], None]) -> Iterator[Update]:
    batch = _Batch()
    while changes := store.changes_after(after, limit=_CHANGES_PER_READ):
        on_change(store.num_changes_after(after))
        for change in changes:
            batch.take(change, store)
            if batch.num_chunks >= _CHUNKS_PER_COMMIT:
                yield batch.update()
                batch = _Batch()
        after = changes[-1].position.seq
    if batch.position is not None:
        yield batch.update()


def _indexed(chunk: StoredChunk) -> IndexedChunk:
    """The title and the heading say what a chunk is about, often in words that it does not repeat."""
    about = chunk.heading if chunk.heading.startswith(chunk.title) else f"{chunk.title}\n\n{chunk.heading}"
    terms = index_terms(f"{about}\n\n{chunk.text}")
    return IndexedChunk(chunk.document_id, chunk.id, terms)
