"""The truth of an index: one SQLite file with the documents, their chunks, and a log of every change.

It uses SQLite's rollback journal and not its write-ahead log: with two connections the latter can corrupt a database in
SQLite 3.7.0 to 3.51.2 (sqlite.org/wal.html#walresetbug), which many Pythons link. A commit is synced, so a kill or a
power cut at any moment leaves the state before or after a whole document. Ids are never used twice.

A text index (`text_index.py`) beside it follows the log: each change has a number and a random token, so that an index
can tell whether it belongs to this file's history.
"""

import contextlib
import hashlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm.errors import MachineError
from lfm.search.chunks import Chunk
from lfm.search.errors import IndexBusyError, IndexFileError

APPLICATION_ID = 0x6C666D69  # "lfmi"
SCHEMA_VERSION = 1
BUSY_S = 30.0
_TOKEN_BYTES = 8
_DIGEST_BYTES = 16
_MACHINE_CODES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR)

_SCHEMA = """
CREATE TABLE documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT NOT NULL UNIQUE, title TEXT NOT NULL, kind TEXT NOT NULL,
    sha256 BLOB NOT NULL, recipe TEXT NOT NULL, num_bytes INTEGER NOT NULL, num_chunks INTEGER NOT NULL,
    added_at REAL NOT NULL
);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY AUTOINCREMENT, document_id INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
    start INTEGER NOT NULL, end INTEGER NOT NULL, heading TEXT NOT NULL, page INTEGER, text TEXT NOT NULL,
    digest BLOB NOT NULL
);
CREATE INDEX chunks_of_document ON chunks (document_id);
CREATE TABLE changes (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, document_id INTEGER NOT NULL, is_removal INTEGER NOT NULL,
    token BLOB NOT NULL
);
CREATE VIEW cited_chunks AS
    SELECT chunks.id, document_id, path, title, heading, page, start, end, text, digest
    FROM chunks JOIN documents ON documents.id = document_id;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDocument:
    """A document to be written, in place of the one of the same path."""

    path: str
    title: str
    kind: str
    sha256: bytes
    recipe: str
    num_bytes: int
    chunks: Sequence[Chunk]


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A row of `documents`. `added_at` is in seconds since 1970."""

    id: int
    path: str
    title: str
    kind: str
    sha256: bytes
    recipe: str
    num_bytes: int
    num_chunks: int
    added_at: float


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A row of `cited_chunks`: a chunk, and the document that it is of."""

    id: int
    document_id: int
    path: str
    title: str
    heading: str
    page: int | None
    start: int
    end: int
    text: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the log: the number and the token of the last change that was seen."""

    seq: int
    token: bytes


@dataclass(frozen=True, slots=True)
class Change:
    position: Position
    document_id: int
    is_removal: bool


class Store:
    """One connection, which several threads may share. Close it, or use it through `LocalIndex`."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it. Raises IndexFileError, IndexBusyError or MachineError."""
        self._path = path
        self._lock = threading.RLock()
        with self._translated():
            self._connection = connect(path)
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def document_at(self, path: str) -> StoredDocument | None:
        rows = self._rows("SELECT * FROM documents WHERE path = ?", (path,))
        return StoredDocument(*rows[0]) if rows else None

    def documents(self, *, under: str | None = None) -> list[StoredDocument]:
        """All documents by path, or those at the path `under` and in the folder of that name."""
        if under is None:
            rows = self._rows("SELECT * FROM documents ORDER BY path")
        else:
            # Everything in a folder lies between "folder/" and "folder0": 0 is the character after the slash.
            folder = under.rstrip("/")
            rows = self._rows(
                "SELECT * FROM documents WHERE path = ? OR (path > ? AND path < ?) ORDER BY path",
                (under, f"{folder}/", f"{folder}0"),
            )
        return [StoredDocument(*row) for row in rows]

    def counts(self) -> tuple[int, int]:
        """The numbers of documents and of chunks."""
        num_documents, num_chunks = self._rows("SELECT count(*), coalesce(sum(num_chunks), 0) FROM documents")[0]
        return num_documents, num_chunks

    def chunks(self, ids: Sequence[int]) -> dict[int, StoredChunk]:
        """The chunks of these ids that (still) exist."""
        rows = self._rows(
            "SELECT * FROM cited_chunks WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(list(ids)),)
        )
        return {row[0]: StoredChunk(*row) for row in rows}

    def chunks_of(self, document_id: int) -> list[StoredChunk]:
        """The chunks of a document in order; none if it does not exist (any more). Their texts join to its text."""
        rows = self._rows("SELECT * FROM cited_chunks WHERE document_id = ? ORDER BY id", (document_id,))
        return [StoredChunk(*row) for row in rows]

    def digests_after(self, chunk_id: int, *, limit: int) -> list[tuple[int, bytes]]:
        """The next chunks by id, each with the digest of its text."""
        return self._rows("SELECT id, digest FROM chunks WHERE id > ? ORDER BY id LIMIT ?", (chunk_id, limit))

    def write(self, documents: Iterable[NewDocument] = (), *, remove: Iterable[str] = ()) -> None:
        """Remove the documents of some paths, and write others in place of those of the same path: all or nothing."""
        with self._transaction():
            for path in remove:
                self._remove(path)
            for document in documents:
                self._remove(document.path)
                self._insert(document)

    def head(self) -> Position | None:
        """The last change; None if there has never been one."""
        rows = self._rows("SELECT seq, token FROM changes ORDER BY seq DESC LIMIT 1")
        return Position(*rows[0]) if rows else None

    def has_passed(self, position: Position) -> bool:
        """Whether `position` is part of this file's history. It is not once a backup was put in this file's place."""
        return self._rows("SELECT token FROM changes WHERE seq = ?", (position.seq,)) == [(position.token,)]

    def changes_after(self, seq: int, *, limit: int) -> list[Change]:
        rows = self._rows(
            "SELECT seq, token, document_id, is_removal FROM changes WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit)
        )
        return [Change(Position(seq, token), document, bool(removal)) for seq, token, document, removal in rows]

    def num_changes_after(self, seq: int) -> int:
        num_changes: int = self._rows("SELECT count(*) FROM changes WHERE seq > ?", (seq,))[0][0]
        return num_changes

    def _prepare(self) -> None:
        with self._translated():
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._connection.execute("PRAGMA synchronous = FULL")
            # A transaction that outgrows the cache must not lock out the readers before it commits.
            self._connection.execute("PRAGMA cache_spill = OFF")
        if self._identity() == (0, 0) and not self._has_tables():
            self._create()
        application_id, version = self._identity()
        if application_id != APPLICATION_ID:
            raise IndexFileError(f"{self._path} is no search index of lfm. Give another --index folder.")
        if version != SCHEMA_VERSION:
            raise IndexFileError(
                f"{self._path} is of version {version}; this lfm reads version {SCHEMA_VERSION}. "
                "Use the lfm that made it, or give another --index folder."
            )
        with self._translated():
            self._connection.execute("PRAGMA journal_mode = DELETE")

    def _create(self) -> None:
        with self._transaction():
            if self._has_tables():
                return  # another process was faster
            for statement in _SCHEMA.split(";"):
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _identity(self) -> tuple[int, int]:
        return self._rows("PRAGMA application_id")[0][0], self._rows("PRAGMA user_version")[0][0]

    def _has_tables(self) -> bool:
        return bool(self._rows("SELECT 1 FROM sqlite_master LIMIT 1"))

    def _remove(self, path: str) -> None:
        for (document_id,) in self._connection.execute("SELECT id FROM documents WHERE path = ?", (path,)).fetchall():
            self._connection.execute("DELETE FROM documents WHERE id = ?", (document_id,))
            self._log(document_id, is_removal=True)

    def _insert(self, document: NewDocument) -> None:
        cursor = self._connection.execute(
            "INSERT INTO documents (path, title, kind, sha256, recipe, num_bytes, num_chunks, added_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(document.path, document.title, document.kind, document.sha256, document.recipe),
                *(document.num_bytes, len(document.chunks), time.time()),
            ),
        )
        assert cursor.lastrowid is not None
        self._connection.executemany(
            "INSERT INTO chunks (document_id, start, end, heading, page, text, digest) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (cursor.lastrowid, chunk.start, chunk.end, chunk.heading, chunk.page, chunk.text, digest(chunk.text))
                for chunk in document.chunks
            ),
        )
        self._log(cursor.lastrowid, is_removal=False)

    def _log(self, document_id: int, *, is_removal: bool) -> None:
        self._connection.execute(
            "INSERT INTO changes (document_id, is_removal, token) VALUES (?, ?, ?)",
            (document_id, is_removal, secrets.token_bytes(_TOKEN_BYTES)),
        )

    def _rows(self, statement: str, values: Sequence[object] = ()) -> list[Any]:
        with self._lock, self._translated():
            return self._connection.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._translated():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise explain(error, self._path) from error


def digest(text: str) -> bytes:
    """Names a text by its content."""
    return hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES]


def connect(path: Path) -> sqlite3.Connection:
    """Open a database, or make one that only its owner may read. Raises sqlite3.Error."""
    with contextlib.suppress(OSError):  # SQLite will say so in its own way
        path.touch(mode=0o600, exist_ok=True)
    return sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)


def explain(error: sqlite3.Error, path: Path) -> IndexFileError | IndexBusyError | MachineError:
    """An error of SQLite in our words, with what to do."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without the detail
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return IndexBusyError(f"{path} has been locked by another process for {BUSY_S:g} s. Try again later.")
    if code in _MACHINE_CODES:
        return MachineError(f"{path} cannot be read or written ({error}). Free some space, or give another --index.")
    return IndexFileError(f"{path} is damaged or no search index ({error}). Move it away and add your documents again.")
