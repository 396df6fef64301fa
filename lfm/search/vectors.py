"""Dense vectors of the chunks, beside the BM25 index and as dispensable: they can be computed again.

They are kept by the digest of a text, so that a document that changed in one place costs one new vector, and a backup
that is put in the truth's place cannot mix them up. A search compares the question with every vector: exact, and fast
enough for a few hundred thousand of them.
"""

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lfm.search.embeddings import EmbeddingClient, Vectors
from lfm.search.errors import IndexFileError
from lfm.search.store import Position, Store, connect, explain
from lfm.search.text_index import ScoredChunk

logger = logging.getLogger(__name__)

FILE = "vectors-1.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS vectors (
    model TEXT NOT NULL, digest BLOB NOT NULL, vector BLOB NOT NULL, PRIMARY KEY (model, digest)
) WITHOUT ROWID
"""
_STORED = np.dtype("<f2")  # half precision loses no rank that the model would vouch for
_CHUNKS_PER_READ = 10_000
_TEXTS_PER_COMMIT = 256


class VectorIndex:
    """The vectors of one embedding model in `folder`. Several threads may share it. Close it."""

    def __init__(self, folder: Path, client: EmbeddingClient) -> None:
        """`client` is closed with the index."""
        self._path = folder / FILE
        self._client = client
        self._lock = threading.Lock()
        self._seen: Position | None = None
        self._loaded: tuple[npt.NDArray[np.int64], Vectors] | None = None  # chunk ids, and a row for each

    def close(self) -> None:
        self._client.close()

    def update(self, store: Store, *, on_change: Callable[[int], None]) -> None:
        """Compute the vectors that are missing, and drop those of no chunk. `on_change` gets how many are left.

        Raises EmbeddingError; what was computed before stays. A damaged file is begun anew.
        """
        try:
            self._update(store, on_change)
        except IndexFileError as error:
            logger.warning("the vectors are computed again: %s", error)
            self._path.unlink(missing_ok=True)
            self._update(store, on_change)

    def search(self, store: Store, query: str, *, limit: int) -> list[ScoredChunk]:
        """The chunks whose vectors are nearest to the question's, nearest first; those without a vector are not found.

        Raises EmbeddingError, IndexFileError, IndexBusyError or MachineError.
        """
        ids, rows = self._up_to_date(store)
        if not len(ids):
            return []
        question = self._client.embed([query])[0]
        if len(question) != rows.shape[1]:
            raise IndexFileError(
                f"The embeddings of {self._client.model} have another length now. Delete {self._path}."
            )
        scores = rows @ question
        best = np.argpartition(-scores, min(limit, len(scores)) - 1)[:limit]
        best = best[np.argsort(-scores[best], kind="stable")]
        return [ScoredChunk(int(ids[at]), float(scores[at])) for at in best]

    def _update(self, store: Store, on_change: Callable[[int], None]) -> None:
        chunk_of = {digest: chunk_id for chunk_id, digest in _digests(store)}
        with self._database() as database:
            known = {row[0] for row in database.execute("SELECT digest FROM vectors WHERE model = ?", (self._model,))}
            database.executemany(
                "DELETE FROM vectors WHERE model = ? AND digest = ?",
                [(self._model, digest) for digest in known - chunk_of.keys()],
            )
        missing = sorted(chunk_id for digest, chunk_id in chunk_of.items() if digest not in known)
        for first in range(0, len(missing), _TEXTS_PER_COMMIT):
            on_change(len(missing) - first)
            self._embed(store, missing[first : first + _TEXTS_PER_COMMIT])
        with self._lock:
            self._loaded = None

    def _embed(self, store: Store, chunk_ids: Sequence[int]) -> None:
        chunks = list(store.chunks(chunk_ids).values())
        if not chunks:
            return  # removed meanwhile
        rows = self._client.embed([chunk.text for chunk in chunks]).astype(_STORED)
        with self._database() as database:
            database.executemany(
                "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)",
                [(self._model, chunk.digest, row.tobytes()) for chunk, row in zip(chunks, rows, strict=True)],
            )

    def _up_to_date(self, store: Store) -> tuple[npt.NDArray[np.int64], Vectors]:
        head = store.head()
        with self._lock:
            if self._loaded is None or head != self._seen:
                self._loaded = self._load(store)
                self._seen = head
            return self._loaded

    def _load(self, store: Store) -> tuple[npt.NDArray[np.int64], Vectors]:
        with self._database() as database:
            found = database.execute("SELECT digest, vector FROM vectors WHERE model = ?", (self._model,)).fetchall()
        lengths = {len(vector) for _, vector in found}
        if len(lengths) > 1:
            raise IndexFileError(
                f"The vectors in {self._path} differ in length. Delete it, and add your documents again."
            )
        place_of = {digest: place for place, (digest, _) in enumerate(found)}
        pairs = [(chunk_id, place_of[digest]) for chunk_id, digest in _digests(store) if digest in place_of]
        stored = np.frombuffer(b"".join(vector for _, vector in found), dtype=_STORED)
        rows = stored.reshape(len(found), -1)[[place for _, place in pairs]] if found else stored.reshape(0, 0)
        return np.array([chunk_id for chunk_id, _ in pairs], dtype=np.int64), rows.astype(np.float32)

    @property
    def _model(self) -> str:
        return self._client.model

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """One transaction on a connection of its own."""
        try:
            with contextlib.closing(connect(self._path)) as connection:
                connection.execute(_SCHEMA)
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise explain(error, self._path) from error


def _digests(store: Store) -> Iterator[tuple[int, bytes]]:
    """Every chunk, with the digest of its text."""
    after = 0
    while batch := store.digests_after(after, limit=_CHUNKS_PER_READ):
        yield from batch
        after = batch[-1][0]
