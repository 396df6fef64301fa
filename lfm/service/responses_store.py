"""Stored responses in one SQLite file: a day long, ten thousand at most, each visible to its owner alone.

All statements run in one thread over one connection; whatever waits there is committed together. Several processes may
share the file. This module knows no JSON: what it keeps are bytes.
"""

import asyncio
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lfm.errors import InternalError

logger = logging.getLogger(__name__)

MAX_RESPONSES = 10_000
MAX_BYTES = 1 << 30  # of the file; the oldest responses make room
LIFETIME_S = 86_400.0
MAX_PENDING = 4096  # statements that wait for the thread
MAX_BATCH = 64
BUSY_S = 5.0  # how long to wait for another process that writes
FORMAT = 2  # of the tables and what they hold; a file of another one starts empty, since nothing lasts beyond a day

_SCHEMA = (
    "DROP TABLE IF EXISTS responses",
    "CREATE TABLE responses (response_id TEXT PRIMARY KEY, owner TEXT NOT NULL, expires_at REAL NOT NULL, "
    "response BLOB NOT NULL, conversation BLOB NOT NULL)",
    "CREATE INDEX responses_by_expiry ON responses (expires_at)",
    f"PRAGMA user_version={FORMAT}",
)

_T = TypeVar("_T")
_Work = Callable[[sqlite3.Connection], object]


class StoreError(InternalError):
    """The file cannot be read or written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """One response. `owner` is a digest of a key, never a key; `conversation` is what the response answered."""

    response_id: str
    owner: str
    response: bytes
    conversation: bytes


@dataclass(frozen=True, slots=True)
class _Job:
    work: _Work
    result: Future[object] = field(default_factory=Future)


class ResponsesStore:
    """The file is opened, and the thread started, when they are first needed. Usable from any event loop.

    Every method raises StoreError if the file cannot be used; the next call tries again.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_responses: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
        lifetime_s: float = LIFETIME_S,
        clock: Callable[[], float] = time.time,
        sqlite_version: tuple[int, int, int] = sqlite3.sqlite_version_info,
    ) -> None:
        self._path = path
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._journal_mode = "TRUNCATE" if has_wal_reset_bug(sqlite_version) else "WAL"
        self._jobs: queue.Queue[_Job | None] = queue.Queue(MAX_PENDING)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    async def put(self, stored: StoredResponse) -> None:
        """Keep a response; once this returns it outlives this process."""
        size = len(stored.response) + len(stored.conversation)
        if size > self._max_bytes // 8:
            raise StoreError(f"A response of {size} bytes is too large to be stored.")
        await self._do(lambda connection: self._insert(connection, stored))

    async def get(self, response_id: str, *, owner: str) -> StoredResponse | None:
        """A response of this owner that is not older than a day, or None."""
        return await self._do(lambda connection: self._select(connection, response_id, owner))

    async def delete(self, response_id: str, *, owner: str) -> bool:
        """Forget a response of this owner. Returns whether there was one."""
        return await self._do(lambda connection: self._delete(connection, response_id, owner))

    def close(self) -> None:
        """Finish what waits, close the file, end the thread. Idempotent; a closed store refuses everything."""
        with self._lock:
            self._is_closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join()

    async def _do(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        job = _Job(work)
        with self._lock:
            if self._is_closed:
                raise StoreError("The store of responses is closed.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="responses-store", daemon=True)
                self._thread.start()
            try:
                self._jobs.put_nowait(job)
            except queue.Full:
                raise StoreError(f"{MAX_PENDING} statements wait for {self._path} already.") from None
        return await asyncio.wrap_future(job.result)  # type: ignore[arg-type]  # a job's result is its work's

    # What follows runs in the thread.

    def _run(self) -> None:
        connection: sqlite3.Connection | None = None
        is_open = True
        while is_open:
            batch, is_open = self._next_batch()
            if batch:
                connection = self._serve(connection, batch)
        if connection is not None:
            connection.close()

    def _serve(self, connection: sqlite3.Connection | None, batch: Sequence[_Job]) -> sqlite3.Connection | None:
        """Run all in one transaction; if that fails, each in its own, so that only the culprit fails.

        Returns the connection to go on with, None after a failure: the file is opened again, its trouble may be over.
        """
        try:
            connection = connection or self._open()
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                results = [job.work(connection) for job in batch]
        except Exception as error:
            if connection is not None:
                connection.close()
                connection = None
            if len(batch) > 1:
                for job in batch:
                    connection = self._serve(connection, [job])
                return connection
            logger.exception("%s cannot be used", self._path)
            batch[0].result.set_exception(StoreError(f"{self._path} cannot be used: {error}."))
            return None
        for job, result in zip(batch, results, strict=True):
            job.result.set_result(result)
        return connection

    def _next_batch(self) -> tuple[list[_Job], bool]:
        """What waits, at least one job, and whether there will be more. Callers that gave up are left out."""
        batch: list[_Job] = []
        item = self._jobs.get()
        while item is not None:
            if item.result.set_running_or_notify_cancel():
                batch.append(item)
            if len(batch) == MAX_BATCH:
                break
            try:
                item = self._jobs.get_nowait()
            except queue.Empty:
                break
        return batch, item is not None

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite gives its journals the same mode
        connection = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)
        try:
            # NORMAL: after a loss of power the newest responses may be gone, but the file is sound.
            for setting in (f"journal_mode={self._journal_mode}", "synchronous=NORMAL", "secure_delete=ON"):
                connection.execute(f"PRAGMA {setting}")
            with connection:
                connection.execute("BEGIN IMMEDIATE")  # another process may be making the tables
                if connection.execute("PRAGMA user_version").fetchone()[0] != FORMAT:
                    for statement in _SCHEMA:
                        connection.execute(statement)
        except sqlite3.Error:
            connection.close()
            raise
        logger.info(
            "responses are stored in %s (SQLite %s, journal %s)", self._path, sqlite3.sqlite_version, self._journal_mode
        )
        return connection

    def _insert(self, connection: sqlite3.Connection, stored: StoredResponse) -> None:
        now = self._clock()
        connection.execute(
            "INSERT INTO responses VALUES (?, ?, ?, ?, ?)",
            (stored.response_id, stored.owner, now + self._lifetime_s, stored.response, stored.conversation),
        )
        connection.execute("DELETE FROM responses WHERE expires_at <= ?", (now,))
        _keep_newest(connection, self._max_responses)
        while _used_bytes(connection) > self._max_bytes:
            num_stored = connection.execute("SELECT count(expires_at) FROM responses").fetchone()[0]
            _keep_newest(connection, num_stored * 9 // 10)

    def _select(self, connection: sqlite3.Connection, response_id: str, owner: str) -> StoredResponse | None:
        row = connection.execute(
            "SELECT response, conversation FROM responses WHERE response_id = ? AND owner = ? AND expires_at > ?",
            (response_id, owner, self._clock()),
        ).fetchone()
        if row is None:
            return None
        return StoredResponse(response_id=response_id, owner=owner, response=row[0], conversation=row[1])

    def _delete(self, connection: sqlite3.Connection, response_id: str, owner: str) -> bool:
        deleted = connection.execute(
            "DELETE FROM responses WHERE response_id = ? AND owner = ? AND expires_at > ?",
            (response_id, owner, self._clock()),
        )
        return deleted.rowcount > 0


def has_wal_reset_bug(version: tuple[int, int, int]) -> bool:
    """Whether two connections in WAL mode can corrupt the file (https://sqlite.org/wal.html#walresetbug).

    Fixed in 3.51.3, 3.50.7 and 3.44.6. Several API processes, or servers, are several connections.
    """
    is_backport = (3, 44, 6) <= version < (3, 45, 0) or (3, 50, 7) <= version < (3, 51, 0)
    return (3, 7, 0) <= version < (3, 51, 3) and not is_backport


def _keep_newest(connection: sqlite3.Connection, num_kept: int) -> None:
    connection.execute(
        "DELETE FROM responses WHERE rowid IN (SELECT rowid FROM responses ORDER BY expires_at DESC LIMIT -1 OFFSET ?)",
        (num_kept,),
    )


def _used_bytes(connection: sqlite3.Connection) -> int:
    pages, free, page_bytes = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * page_bytes)
