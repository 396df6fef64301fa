"""BM25 with SQLite's FTS5, which every Python has: the index of an installation without the extra `search`.

It is a file of its own beside the truth, since it follows the same log and may be thrown away as well. Terms come from
our analyser, joined by spaces; FTS5's `ascii` tokenizer splits at nothing else of them. Queries are made of quoted
terms, never of a user's text.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lfm.search.errors import IndexFileError
from lfm.search.store import Position, connect, explain
from lfm.search.text_index import IndexDamaged, ScoredChunk, Update

_SCHEMA = """
CREATE VIRTUAL TABLE IF NOT EXISTS entries USING fts5(terms, tokenize = 'ascii');
CREATE TABLE IF NOT EXISTS members (chunk_id INTEGER PRIMARY KEY, document_id INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS members_of_document ON members (document_id);
CREATE TABLE IF NOT EXISTS position (one INTEGER PRIMARY KEY, seq INTEGER NOT NULL, token BLOB NOT NULL);
"""


class Fts5Index:
    """A `TextIndex` in the file `path`. Several threads may use it, one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened: sqlite3.Connection | None = None
        self._lock = threading.RLock()

    def position(self) -> Position | None:
        with self._connection() as connection:
            row = connection.execute("SELECT seq, token FROM position").fetchone()
            return Position(*row) if row else None

    def apply(self, updates: Iterable[Update]) -> None:
        for update in updates:
            with self._connection() as connection:
                connection.execute("BEGIN IMMEDIATE")
                try:
                    _write(connection, update)
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise

    def search(self, terms: Sequence[str], *, limit: int) -> list[ScoredChunk]:
        query = " OR ".join('"' + term.replace('"', "") + '"' for term in terms)
        with self._connection() as connection:
            rows = connection.execute(
                "SELECT rowid, -rank FROM entries WHERE entries MATCH ? ORDER BY rank LIMIT ?",
                (query, limit),
            ).fetchall()
        return [ScoredChunk(*row) for row in rows]

    def clear(self) -> None:
        self.close()
        for suffix in ("", "-journal"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)

    def close(self) -> None:
        with self._lock:
            if self._opened is not None:
                self._opened.close()
            self._opened = None

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                if self._opened is None:
                    self._opened = _open(self._path)
                yield self._opened
            except sqlite3.Error as error:
                explained = explain(error, self._path)
                raise (IndexDamaged(str(explained)) if isinstance(explained, IndexFileError) else explained) from error


def _open(path: Path) -> sqlite3.Connection:
    connection = connect(path)
    try:
        connection.execute("PRAGMA cache_spill = OFF")
        for statement in _SCHEMA.split(";\n"):
            connection.execute(statement)
    except BaseException:
        connection.close()
        raise
    return connection


def _write(connection: sqlite3.Connection, update: Update) -> None:
    for document_id in update.removed_documents:
        connection.execute(
            "DELETE FROM entries WHERE rowid IN (SELECT chunk_id FROM members WHERE document_id = ?)", (document_id,)
        )
        connection.execute("DELETE FROM members WHERE document_id = ?", (document_id,))
    for chunk in update.chunks:
        connection.execute("INSERT INTO members VALUES (?, ?)", (chunk.chunk_id, chunk.document_id))
        connection.execute("INSERT INTO entries (rowid, terms) VALUES (?, ?)", (chunk.chunk_id, " ".join(chunk.terms)))
    connection.execute("INSERT OR REPLACE INTO position VALUES (1, ?, ?)", (update.position.seq, update.position.token))
