"""The store of responses: who sees what, for how long, how much of it, and what a crash or a bad disk does to it."""

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from lfm.service import responses_store
from lfm.service.responses_store import ResponsesStore, StoredResponse, StoreError, has_wal_reset_bug

SOUND, BUGGY = (3, 53, 0), (3, 40, 1)
T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, timeout=30))


def stored(response_id: str, *, owner: str = "ann", size: int = 10) -> StoredResponse:
    text = (response_id.encode() * size)[:size]
    return StoredResponse(response_id=response_id, owner=owner, response=text, conversation=text)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "lfm" / "responses.sqlite3"


@pytest.fixture
def make(path: Path) -> Iterator[Callable[..., ResponsesStore]]:
    made: list[ResponsesStore] = []

    def make(**options: Any) -> ResponsesStore:
        made.append(ResponsesStore(path, **options))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(make: Callable[..., ResponsesStore]) -> ResponsesStore:
    return make()


def ids_in(store: ResponsesStore, ids: list[str], *, owner: str = "ann") -> list[str]:
    async def found() -> list[str]:
        return [name for name in ids if await store.get(name, owner=owner)]

    return run(found())


def test_nothing_is_created_before_the_first_use(store: ResponsesStore, path: Path) -> None:
    store.close()
    assert not path.parent.exists()


def test_a_response_comes_back_byte_for_byte(store: ResponsesStore) -> None:
    response = StoredResponse(response_id="r", owner="ann", response=b'{"a": "\x00\xff"}', conversation=b"")
    run(store.put(response))
    assert run(store.get("r", owner="ann")) == response
    assert run(store.get("R", owner="ann")) is None


@pytest.mark.parametrize("owner", ["", "bob", "ANN", "ann ", "ann' OR '1'='1"])
def test_another_owner_neither_sees_nor_deletes_it(store: ResponsesStore, owner: str) -> None:
    run(store.put(stored("r")))
    assert run(store.get("r", owner=owner)) is None
    assert not run(store.delete("r", owner=owner))
    assert run(store.get("r", owner="ann")) is not None


def test_a_deleted_response_is_gone_and_leaves_no_text_behind(store: ResponsesStore, path: Path) -> None:
    run(store.put(StoredResponse(response_id="r", owner="ann", response=b"SECRET" * 2000, conversation=b"")))
    assert b"SECRET" in path.read_bytes()
    assert run(store.delete("r", owner="ann"))
    assert not run(store.delete("r", owner="ann"))
    assert run(store.get("r", owner="ann")) is None
    store.close()
    assert b"SECRET" not in path.read_bytes()


def test_a_response_lives_for_a_day(make: Callable[..., ResponsesStore], path: Path) -> None:
    clock = Clock()
    store = make(clock=clock)
    run(store.put(stored("old")))
    clock.now += 86_399
    assert ids_in(store, ["old"]) == ["old"]
    clock.now += 1
    assert ids_in(store, ["old"]) == []
    assert not run(store.delete("old", owner="ann"))
    run(store.put(stored("new")))
    store.close()
    with sqlite3.connect(path) as connection:  # not only hidden
        assert connection.execute("SELECT response_id FROM responses").fetchall() == [("new",)]
    connection.close()


def test_the_newest_are_kept(make: Callable[..., ResponsesStore]) -> None:
    clock = Clock()
    store = make(max_responses=3, clock=clock)
    for name in "abcde":
        clock.now += 1
        run(store.put(stored(name)))
    assert ids_in(store, list("abcde")) == list("cde")


def test_the_oldest_make_room_when_the_file_grows_too_large(make: Callable[..., ResponsesStore], path: Path) -> None:
    clock = Clock()
    store = make(max_bytes=1_000_000, clock=clock)
    names = [f"{i:03}" for i in range(60)]
    for name in names:
        clock.now += 1
        run(store.put(stored(name, size=25_000)))
    kept = ids_in(store, names)
    assert kept == names[-len(kept) :]
    assert 10 <= len(kept) <= 20
    assert path.stat().st_size < 1_200_000


def test_a_response_that_would_push_out_the_others_is_refused(make: Callable[..., ResponsesStore]) -> None:
    with pytest.raises(StoreError, match="too large"):
        run(make(max_bytes=1_000_000).put(stored("r", size=70_000)))


@pytest.mark.parametrize("sqlite_version", [SOUND, BUGGY])
def test_another_process_sees_it_at_once(
    make: Callable[..., ResponsesStore], sqlite_version: tuple[int, int, int]
) -> None:
    one, other = (make(sqlite_version=sqlite_version) for _ in range(2))
    for number in range(10):
        writer, reader = (one, other) if number % 2 else (other, one)
        run(writer.put(stored(str(number))))
        assert run(reader.get(str(number), owner="ann")) is not None


def test_write_ahead_logging_is_used_where_it_is_sound(make: Callable[..., ResponsesStore], path: Path) -> None:
    for version, mode in ((SOUND, "wal"), (BUGGY, "truncate")):
        store = make(sqlite_version=version)
        run(store.put(stored(mode)))
        assert path.with_name(path.name + "-wal").exists() == (mode == "wal")
        store.close()


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((4, 0, 0), False),
    ],
)
def test_versions_with_the_wal_reset_bug(version: tuple[int, int, int], expected: bool) -> None:
    assert has_wal_reset_bug(version) == expected


def test_what_waits_is_committed_together(make: Callable[..., ResponsesStore]) -> None:
    store = make()
    statements: list[str] = []
    is_free = threading.Event()

    async def scenario() -> None:
        await store.put(stored("first"))
        blocker = asyncio.create_task(store._do(lambda connection: _block(connection)))
        puts = [asyncio.create_task(store.put(stored(str(i)))) for i in range(50)]
        await asyncio.sleep(0)
        is_free.set()
        await asyncio.gather(blocker, *puts)

    def _block(connection: sqlite3.Connection) -> None:
        connection.set_trace_callback(statements.append)
        assert is_free.wait(10)

    run(scenario())
    assert ids_in(store, [str(i) for i in range(50)]) == [str(i) for i in range(50)]
    assert statements.count("BEGIN IMMEDIATE") - 50 <= 2  # one for all puts; then the 50 reads


def test_one_bad_statement_of_a_batch_fails_alone(store: ResponsesStore) -> None:
    async def scenario() -> list[Any]:
        await store.put(stored("taken"))
        puts = [store.put(stored(name)) for name in ("a", "taken", "b")]
        return list(await asyncio.gather(*puts, return_exceptions=True))

    results = run(scenario())
    assert [type(result) for result in results] == [type(None), StoreError, type(None)]
    assert ids_in(store, ["a", "b", "taken"]) == ["a", "b", "taken"]


def test_a_caller_that_gave_up_disturbs_nobody(store: ResponsesStore) -> None:
    async def scenario() -> None:
        tasks = [asyncio.create_task(store.put(stored(str(i)))) for i in range(20)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.put(stored("last"))

    run(scenario())
    kept = [str(i) for i in range(1, 20, 2)]
    assert ids_in(store, [*kept, "last"]) == [*kept, "last"]


def test_too_many_that_wait_are_refused(make: Callable[..., ResponsesStore], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses_store, "MAX_PENDING", 4)
    store = make()
    is_free = threading.Event()

    async def scenario() -> list[Any]:
        blocker = asyncio.create_task(store._do(lambda connection: is_free.wait(10)))
        tasks = [asyncio.create_task(store.put(stored(str(i)))) for i in range(20)]
        await asyncio.sleep(0)
        is_free.set()
        return list(await asyncio.gather(blocker, *tasks, return_exceptions=True))

    refused = [result for result in run(scenario()) if isinstance(result, StoreError)]
    assert len(refused) >= 14


def test_a_place_that_cannot_be_written_is_an_error_until_it_can(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.write_text("a file where the folder should be")
    store = ResponsesStore(folder / "responses.sqlite3")
    for _ in range(2):
        with pytest.raises(StoreError, match="cannot be used"):
            run(store.put(stored("r")))
    folder.unlink()
    run(store.put(stored("r")))
    assert ids_in(store, ["r"]) == ["r"]
    store.close()


def test_a_file_that_is_no_database_is_an_error_and_stays(make: Callable[..., ResponsesStore], path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"these are somebody's notes" * 100)
    with pytest.raises(StoreError, match="not a database"):
        run(make().get("r", owner="ann"))
    assert path.read_bytes().startswith(b"these are")


def test_a_file_of_another_format_starts_empty(make: Callable[..., ResponsesStore], path: Path) -> None:
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE responses (id TEXT)")
        connection.execute("PRAGMA user_version=99")
    connection.close()
    store = make()
    run(store.put(stored("r")))
    assert ids_in(store, ["r"]) == ["r"]


def test_a_closed_store_refuses(store: ResponsesStore) -> None:
    run(store.put(stored("r")))
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        run(store.get("r", owner="ann"))


def test_only_the_user_can_read_the_file(store: ResponsesStore, path: Path) -> None:
    old = os.umask(0)
    try:
        run(store.put(stored("r")))
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


WRITER = """
import asyncio, sys
from pathlib import Path
from lfm.service.responses_store import ResponsesStore, StoredResponse

async def main():
    store = ResponsesStore(Path(sys.argv[1]), sqlite_version=(3, int(sys.argv[2]), 0))
    for i in range(100_000):
        await store.put(StoredResponse(response_id=str(i), owner="ann", response=b"x" * 9000, conversation=b""))
        print(i, flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("minor", [40, 53], ids=["rollback-journal", "write-ahead-log"])
def test_what_was_acknowledged_survives_a_kill(make: Callable[..., ResponsesStore], path: Path, minor: int) -> None:
    command = [sys.executable, "-c", WRITER, str(path), str(minor)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 40:
                process.kill()
                break
        acknowledged = 41 + sum(1 for _ in process.stdout)
    store = make(sqlite_version=(3, minor, 0))
    names = [str(i) for i in range(acknowledged)]
    assert ids_in(store, names) == names
    store.close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
