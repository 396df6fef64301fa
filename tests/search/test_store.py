"""The SQLite file is the truth: whole documents or none, a log of every change, clear words for a file of no use."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lfm.errors import MachineError
from lfm.search.errors import IndexFileError
from lfm.search.store import APPLICATION_ID, SCHEMA_VERSION, Position, Store
from tests.search.indexes import document


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "documents.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with closing(Store(path)) as store:
        yield store


def test_a_document_comes_back_as_it_was_written(store: Store) -> None:
    text = "# Pumps\n\nA pump moves water.\n\n## Winter\n\nIn winter it freezes: \0 \U0001f600 東京."
    store.write([document("/a.md", text, title="Pumps")])
    stored = store.document_at("/a.md")
    assert stored is not None
    assert (stored.title, stored.kind, stored.num_chunks, stored.num_bytes) == (
        "Pumps",
        "markdown",
        2,
        len(text.encode()),
    )
    chunks = store.chunks_of(stored.id)
    assert "".join(chunk.text for chunk in chunks) == text
    assert [(chunk.heading, chunk.title, chunk.path) for chunk in chunks] == [
        ("Pumps", "Pumps", "/a.md"),
        ("Pumps > Winter", "Pumps", "/a.md"),
    ]
    assert store.chunks([chunks[1].id, 999]) == {chunks[1].id: chunks[1]}
    assert store.counts() == (1, 2)


def test_a_changed_document_takes_the_place_of_the_old_under_new_ids(store: Store) -> None:
    store.write([document("/a.md", "old text")])
    old = store.document_at("/a.md")
    store.write([document("/a.md", "new text")])
    new = store.document_at("/a.md")
    assert old is not None
    assert new is not None
    assert new.id > old.id
    assert store.chunks_of(old.id) == []
    assert [chunk.text for chunk in store.chunks_of(new.id)] == ["new text"]


def test_ids_are_never_used_twice(store: Store) -> None:
    store.write([document("/a.md", "text")])
    first = store.document_at("/a.md")
    store.write(remove=["/a.md"])
    store.write([document("/a.md", "text")])
    second = store.document_at("/a.md")
    assert first is not None
    assert second is not None
    assert second.id > first.id
    assert store.chunks_of(second.id)[0].id > 1


def test_a_write_is_done_whole_or_not_at_all(store: Store) -> None:
    store.write([document("/a.md", "text")])
    broken = document("/b.md", "text")
    with pytest.raises(AttributeError):
        store.write([document("/c.md", "text"), broken, None], remove=["/a.md"])  # type: ignore[list-item]
    assert [stored.path for stored in store.documents()] == ["/a.md"]
    head = store.head()
    assert head is not None
    assert head.seq == 1


def test_documents_are_listed_by_file_and_by_folder(store: Store) -> None:
    names = ["/a", "/a/b.md", "/a/c/d.md", "/a.md", "/a-b/c.md", "/a0", "/b.md", "/a%/x", "/a_/x"]
    store.write([document(name, "text") for name in names])
    assert [stored.path for stored in store.documents()] == sorted(names)
    assert [stored.path for stored in store.documents(under="/a")] == ["/a", "/a/b.md", "/a/c/d.md"]
    assert [stored.path for stored in store.documents(under="/a%")] == ["/a%/x"]
    assert [stored.path for stored in store.documents(under="/a/c/d.md")] == ["/a/c/d.md"]
    assert len(store.documents(under="/")) == len(names)
    assert store.documents(under="/nothing") == []


def test_the_log_tells_every_change_and_whose_history_it_is(store: Store, tmp_path: Path) -> None:
    assert store.head() is None
    store.write([document("/a.md", "1"), document("/b.md", "1")])
    store.write([document("/a.md", "2")], remove=["/b.md", "/never-there"])
    changes = store.changes_after(0, limit=100)
    assert [(change.document_id, change.is_removal) for change in changes] == [
        (1, False),
        (2, False),
        (2, True),
        (1, True),
        (3, False),
    ]
    assert store.changes_after(3, limit=1) == changes[3:4]
    assert store.num_changes_after(3) == 2
    head = store.head()
    assert head == changes[-1].position
    assert store.has_passed(changes[2].position)
    assert not store.has_passed(Position(3, b"elsewhere"))
    with closing(Store(tmp_path / "other.sqlite")) as other:
        other.write([document("/a.md", "1")])
        assert not other.has_passed(changes[0].position)


def test_two_connections_see_each_other_s_writes(store: Store, path: Path) -> None:
    with closing(Store(path)) as other:
        store.write([document("/a.md", "text")])
        other.write([document("/b.md", "text")])
    assert [stored.path for stored in store.documents()] == ["/a.md", "/b.md"]


def test_it_never_uses_the_write_ahead_log(store: Store, path: Path) -> None:
    """SQLite 3.7.0 to 3.51.2 can corrupt a database in that mode when two connections write to it."""
    store.write([document("/a.md", "text")])
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    Store(path).close()
    check = sqlite3.connect(path)
    assert check.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    check.close()


def test_only_the_user_may_read_it(store: Store, path: Path) -> None:
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("content", [b"x" * 5000, b"SQLite format 3\0" + b"x" * 5000])
def test_a_damaged_file_is_named_with_what_to_do(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(IndexFileError, match=r"documents\.sqlite is damaged or no search index .* Move it away"):
        Store(path)


def test_a_damaged_page_is_named_when_it_is_read(store: Store, path: Path) -> None:
    store.write([document(f"/{number}.md", "text " * 2000) for number in range(20)])
    store.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with closing(Store(path)) as damaged, pytest.raises(IndexFileError, match="is damaged"):
        damaged.documents()


def test_a_database_of_another_program_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(IndexFileError, match="is no search index of lfm"):
        Store(path)
    assert path.read_bytes() == before


def test_a_file_of_a_newer_version_is_left_alone(store: Store, path: Path) -> None:
    store.close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(IndexFileError, match=f"is of version {SCHEMA_VERSION + 1}; this lfm reads version"):
        Store(path)


def test_the_file_says_what_it_is(store: Store, path: Path) -> None:
    store.close()
    assert path.read_bytes()[68:72] == APPLICATION_ID.to_bytes(4, "big")


def test_a_folder_that_is_not_there_is_the_machine_s_fault(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot be read or written"):
        Store(tmp_path / "missing" / "documents.sqlite")
