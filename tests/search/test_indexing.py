"""Files and folders become documents: each once, again only when it changed, and a bad one does not stop the others."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lfm.errors import UsageError
from lfm.search import documents, indexing
from lfm.search.documents import decode_text, find_documents
from lfm.search.errors import ExtractionError
from lfm.search.extracted import Extracted
from lfm.search.extraction import Extractor
from lfm.search.extraction_wire import Kind
from lfm.search.indexing import AddReport, add_paths
from lfm.search.local_index import LocalIndex
from tests.search.files import write_files


class FakeExtractor(Extractor):
    """Takes the bytes for the text, and fails on those that say so. No process."""

    def extract(self, data: bytes, kind: Kind) -> Extracted:
        if b"broken" in data:
            raise ExtractionError("The document is damaged.")
        return Extracted(text=data.decode(), title=f"a {kind}")


@pytest.fixture
def index(tmp_path: Path) -> Iterator[LocalIndex]:
    with LocalIndex(tmp_path / "index") as index:
        yield index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return (tmp_path / "files").resolve()


def add(index: LocalIndex, *paths: Path) -> AddReport:
    return add_paths(index, paths, extractor=FakeExtractor(), on_progress=lambda line: None)


def names(index: LocalIndex, folder: Path) -> Sequence[str]:
    return [str(Path(stored.path).relative_to(folder)) for stored in index.store.documents()]


def test_a_folder_gives_its_documents_at_any_depth(index: LocalIndex, folder: Path) -> None:
    write_files(
        folder,
        {
            "a.md": "# Pumps\ntext",
            "b/c.TXT": "plain",
            "b/d/e.html": "web",
            "f.pdf": "pages",
            ".hidden.md": "no",
            ".git/x.md": "no",
            "g.py": "no",
            "h": "no",
        },
    )
    report = add(index, folder)
    assert names(index, folder) == ["a.md", "b/c.TXT", "b/d/e.html", "f.pdf"]
    assert (report.num_added, report.num_chunks, report.num_bytes) == (4, 4, 12 + 5 + 3 + 5)
    assert [stored.title for stored in index.store.documents()] == ["Pumps", "c.TXT", "a html", "a pdf"]


def test_a_file_that_is_named_is_taken_whatever_it_is_called(index: LocalIndex, folder: Path) -> None:
    write_files(folder, {"g.py": "def pump(): pass", ".hidden": "secret pump"})
    assert add(index, folder / "g.py", folder / ".hidden", folder / "g.py").num_added == 2
    assert len(index.search("pump")) == 2


def test_only_what_changed_is_read_again(index: LocalIndex, folder: Path) -> None:
    write_files(folder, {"a.md": "one", "b.md": "two"})
    assert add(index, folder).num_added == 2
    write_files(folder, {"b.md": "three"})
    report = add(index, folder)
    assert (report.num_added, report.num_changed, report.num_unchanged) == (0, 1, 1)
    assert index.search("two") == []
    assert len(index.search("three")) == 1


def test_a_new_way_of_reading_reads_everything_again(
    index: LocalIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(index, write_files(folder, {"a.md": "one"}))
    monkeypatch.setattr(indexing, "RECIPE", "other")
    assert add(index, folder).num_changed == 1


def test_a_bad_document_does_not_stop_the_others(index: LocalIndex, folder: Path) -> None:
    write_files(folder, {"a.md": b"\xff\xfe\xff", "b.pdf": "broken", "c.md": "fine", "d.txt": b"\0", "e.md": " \n"})
    report = add(index, folder)
    assert [(path.name, cause) for path, cause in report.failed] == [
        ("a.md", "The document is no UTF-16 text (byte 2). Convert it first."),
        ("b.pdf", "The document is damaged."),
        ("d.txt", "The document holds zero bytes, so it is no text."),
    ]
    assert report.empty == [folder / "e.md"]
    assert names(index, folder) == ["c.md", "e.md"]


def test_a_document_that_breaks_keeps_its_last_good_state(index: LocalIndex, folder: Path) -> None:
    add(index, write_files(folder, {"a.pdf": "good"}))
    assert len(add(index, write_files(folder, {"a.pdf": "broken"})).failed) == 1
    assert len(index.search("good")) == 1


def test_a_name_that_is_no_utf_8_is_refused_by_itself(index: LocalIndex, folder: Path) -> None:
    write_files(folder, {"a.md": "fine"})
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.md")).write_text("text")
    ((_, cause),) = add(index, folder).failed
    assert cause == "The document's name is no UTF-8. Rename it."
    assert names(index, folder) == ["a.md"]


def test_too_large_a_file_is_refused(index: LocalIndex, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 10)
    write_files(folder, {"a.md": "x" * 11, "b.md": "x" * 10})
    ((path, cause),) = add(index, folder).failed
    assert path.name == "a.md"
    assert cause == "The document is larger than 10 bytes. Split it."


def test_links_to_files_are_followed_and_to_folders_not(folder: Path) -> None:
    write_files(folder, {"in/a.md": "x", "outside/b.md": "x", "outside/more/c.md": "x"})
    (folder / "in" / "link.md").symlink_to(folder / "outside" / "b.md")
    (folder / "in" / "again.md").symlink_to(folder / "in" / "a.md")
    (folder / "in" / "loop").symlink_to(folder / "in")
    (folder / "in" / "dead.md").symlink_to(folder / "nowhere")
    assert set(find_documents([folder / "in"])) == {folder / "in" / "a.md", folder / "outside" / "b.md"}


def test_a_path_that_does_not_exist_is_named_before_anything_is_read(index: LocalIndex, folder: Path) -> None:
    write_files(folder, {"a.md": "x"})
    with pytest.raises(UsageError, match="There is no file or folder"):
        add(index, folder, folder / "missing")
    assert names(index, folder) == []


def test_many_documents_are_written_in_several_transactions(
    index: LocalIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "_BATCH_DOCUMENTS", 3)
    lines: list[str] = []
    write_files(folder, {f"{number}.md": f"text {number}" for number in range(8)})
    add_paths(index, [folder], extractor=FakeExtractor(), on_progress=lines.append)
    assert len(names(index, folder)) == 8
    assert lines[0] == "reading documents: 1 of 8, 0.md"
    assert lines[-1] == "building the index: 8 changes left"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("pump 東京".encode(), "pump 東京"),
        ("pump 東京".encode("utf-8-sig"), "pump 東京"),
        ("pump 東京".encode("utf-16"), "pump 東京"),
        (b"\xfe\xff\0a", "a"),
        (b"", ""),
    ],
)
def test_text_may_be_utf_8_or_utf_16(data: bytes, text: str) -> None:
    assert decode_text(data) == text


def test_what_is_no_text_is_refused_with_the_place() -> None:
    with pytest.raises(ExtractionError, match=r"is no UTF-8 text \(byte 3\)"):
        decode_text("caf\xe9 ol\xe9".encode("latin-1"))
