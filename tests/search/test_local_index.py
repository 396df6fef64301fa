"""The index finds what was added and nothing that was removed, on both backends, however its files were mistreated."""

import json
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.search.errors import IndexBusyError, IndexFileError
from lfm.search.local_index import STORE_FILE, LocalIndex, default_text_index
from lfm.search.text_index import IndexDamaged, ScoredChunk, TextIndex, Update
from tests.search.indexes import BACKENDS, HAS_TANTIVY, document, open_index, paths_found

TEXTS = {
    "/pump.md": "# Pumps\n\nA pump moves water to a high place.\n\n## Winter\n\nIn winter its valve freezes.",
    "/valve.md": "# Valves\n\nA valve opens and closes. It does not freeze when it is drained.",
    "/tokyo.md": "# 東京\n\n東京都は日本の首都です。人口は約千四百万人です。",
    "/cairo.md": "# القاهرة\n\nالقاهرةُ عاصمة مصر وأكبر مدنها.",  # noqa: RUF001 -- Arabic
    "/seoul.md": "# 서울\n\n서울은 대한민국의 수도이다. 한강이 흐른다.",
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def index(backend: str, tmp_path: Path) -> Iterable[LocalIndex]:
    with open_index(backend, tmp_path) as index:
        index.store.write([document(path, text) for path, text in TEXTS.items()])
        yield index


@pytest.mark.parametrize(
    ("query", "path"),
    [
        ("what moves water to a high place?", "/pump.md"),
        ("WINTER", "/pump.md"),
        ("drained valve", "/valve.md"),
        ("日本の首都", "/tokyo.md"),
        ("人口", "/tokyo.md"),
        ("عاصمة مصر", "/cairo.md"),
        ("قاهره", "/cairo.md"),
        ("수도", "/seoul.md"),
        ("한강", "/seoul.md"),
        ("cairo", "/cairo.md"),
    ],
)
def test_a_question_finds_its_document_first(index: LocalIndex, query: str, path: str) -> None:
    assert paths_found(index, query)[0] == path


def test_a_question_in_mixed_scripts_finds_documents_in_each(index: LocalIndex) -> None:
    assert set(paths_found(index, "moves 首都 nothing")) == {"/pump.md", "/tokyo.md"}


def test_a_hit_has_all_that_a_citation_needs(index: LocalIndex) -> None:
    (hit,) = index.search("winter")
    assert (hit.chunk.title, hit.location, hit.chunk.path) == ("/pump.md", "Pumps > Winter", "/pump.md")
    assert (
        TEXTS["/pump.md"][hit.chunk.start : hit.chunk.end]
        == hit.chunk.text
        == "## Winter\n\nIn winter its valve freezes."
    )
    assert hit.score > 0


@pytest.mark.parametrize("query", ["", " ?! ", "unknownword", "京", "a" * 100_000])
def test_a_query_without_a_match_finds_nothing_or_single_characters(index: LocalIndex, query: str) -> None:
    assert paths_found(index, query) in ([], ["/tokyo.md"])


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ('"', ""),
        ('"pump" OR "', "pump or"),
        ("pump AND (", "pump and"),
        ("-pump", "pump"),
        ("NEAR(pump valve)", "near pump valve"),
        ("terms:pump", "terms pump"),
        ("val* ^pump", "val pump"),
        ("'; DROP TABLE chunks; --", "drop table chunks"),
        ("pump\0\x1b[2J", "pump 2j"),
    ],
)
def test_a_query_is_text_whatever_it_contains(index: LocalIndex, query: str, words: str) -> None:
    assert paths_found(index, query) == paths_found(index, words)


def test_an_empty_index_finds_nothing(backend: str, tmp_path: Path) -> None:
    with open_index(backend, tmp_path) as index:
        assert index.search("anything") == []
        index.sync()
        assert index.search("anything") == []


def test_changes_are_found_at_once_without_being_told(index: LocalIndex) -> None:
    assert paths_found(index, "winter") == ["/pump.md"]
    index.store.write(
        [document("/pump.md", "A summer text."), document("/new.md", "Winter is coming.")], remove=["/valve.md"]
    )
    assert paths_found(index, "winter") == ["/new.md"]
    assert paths_found(index, "summer") == ["/pump.md"]
    assert paths_found(index, "drained") == []


def test_another_process_s_changes_are_found(index: LocalIndex, backend: str, tmp_path: Path) -> None:
    assert paths_found(index, "winter") == ["/pump.md"]
    with open_index(backend, tmp_path) as other:
        other.store.write([document("/new.md", "A glacier.")])
        assert paths_found(other, "glacier") == ["/new.md"]
    assert paths_found(index, "glacier") == ["/new.md"]


def test_the_limit_holds(index: LocalIndex) -> None:
    index.store.write([document(f"/{number}.md", f"common word {number}") for number in range(30)])
    assert len(index.search("common", limit=7)) == 7
    assert len(index.search("common", limit=100)) == 30


def damage_nothing(folder: Path) -> None:
    pass


def delete_index(folder: Path) -> None:
    for path in folder.glob("bm25*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def overwrite_all(folder: Path) -> None:
    for path in (path for path in folder.glob("bm25*/**/*") if path.is_file()):
        path.write_bytes(b"\xff" * path.stat().st_size)
    for path in (path for path in folder.glob("bm25*") if path.is_file()):
        path.write_bytes(b"\xff" * path.stat().st_size)


def truncate_all(folder: Path) -> None:
    for path in (path for path in folder.glob("bm25*/**/*") if path.is_file()):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for path in (path for path in folder.glob("bm25*") if path.is_file()):
        path.write_bytes(path.read_bytes()[:5000])


def empty_all(folder: Path) -> None:
    for path in (path for path in folder.glob("bm25*/**/*") if path.is_file()):
        path.write_bytes(b"")


def garble_postings(folder: Path) -> None:
    """Flip bytes where tantivy does not look before it searches, so that it panics in the middle of a search."""
    for path in folder.glob("bm25*/*.term"):
        content = bytearray(path.read_bytes())
        content[: len(content) // 2] = b"\xa5" * (len(content) // 2)
        path.write_bytes(content)


def delete_one_file(folder: Path) -> None:
    next(folder.glob("bm25*/*.idx"), folder / "none").unlink(missing_ok=True)


def of_another_schema(folder: Path) -> None:
    for path in folder.glob("bm25*/meta.json"):
        meta = json.loads(path.read_text())
        meta["schema"] = meta["schema"][:1]
        path.write_text(json.dumps(meta))


def put_a_file_in_its_place(folder: Path) -> None:
    for path in folder.glob("bm25*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.write_bytes(b"no index")


@pytest.mark.parametrize(
    "damage",
    [
        damage_nothing,
        put_a_file_in_its_place,
        delete_index,
        overwrite_all,
        truncate_all,
        empty_all,
        garble_postings,
        delete_one_file,
        of_another_schema,
    ],
)
def test_a_missing_or_damaged_bm25_index_is_built_again(
    index: LocalIndex, backend: str, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    index.sync()
    index.close()
    damage(tmp_path)
    with open_index(backend, tmp_path) as again, caplog.at_level(logging.WARNING):
        assert paths_found(again, "winter") == ["/pump.md"]
        assert paths_found(again, "日本")[0] == "/tokyo.md"
        again.store.write(remove=["/pump.md"])
        assert paths_found(again, "winter") == []


def test_a_bm25_index_that_another_truth_made_is_built_again(index: LocalIndex, backend: str, tmp_path: Path) -> None:
    """The truth was replaced by a backup and has moved on since, to the same number of changes or beyond."""
    index.store.write([document("/a.md", "before the backup")])
    index.store.close()
    shutil.copy(tmp_path / STORE_FILE, tmp_path / "backup")
    with open_index(backend, tmp_path) as later:
        later.store.write([document("/b.md", "lost with the restore")])
        assert paths_found(later, "lost") == ["/b.md"]
    shutil.copy(tmp_path / "backup", tmp_path / STORE_FILE)
    with open_index(backend, tmp_path) as restored:
        restored.store.write([document("/c.md", "after the restore")])
        assert paths_found(restored, "lost") == []
        assert paths_found(restored, "after") == ["/c.md"]
        assert "/a.md" in paths_found(restored, "backup")


def test_while_another_process_writes_the_older_state_is_searched(
    index: LocalIndex, backend: str, tmp_path: Path
) -> None:
    assert paths_found(index, "winter") == ["/pump.md"]
    with open_index(backend, tmp_path) as other:
        other.store.write([document("/new.md", "winter")], remove=["/pump.md"])
        with other._exclusive(wait_s=0.0):
            assert paths_found(index, "winter") == [], "what was removed is not found, what was added not yet"
            with (
                pytest.raises(IndexBusyError, match="is being written by another process"),
                index._exclusive(wait_s=0.0),
            ):
                pass
    assert paths_found(index, "winter") == ["/new.md"]


def test_while_another_process_builds_it_from_nothing_a_search_says_so(
    index: LocalIndex, backend: str, tmp_path: Path
) -> None:
    with open_index(backend, tmp_path) as other, other._exclusive(wait_s=0.0), pytest.raises(IndexBusyError):
        index.search("winter")


class Broken:
    """A text index that no new start helps."""

    def position(self) -> None:
        raise IndexDamaged("the disk is bad")

    def apply(self, updates: Iterable[Update]) -> None:
        raise IndexDamaged("the disk is bad")

    def search(self, terms: object, *, limit: int) -> list[ScoredChunk]:
        raise IndexDamaged("the disk is bad")

    def clear(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_an_index_that_cannot_be_built_is_an_error_and_no_loop(tmp_path: Path) -> None:
    with LocalIndex(tmp_path, text_index=Broken()) as index:
        index.store.write([document("/a.md", "text")])
        with pytest.raises(IndexFileError, match="cannot be built: the disk is bad"):
            index.search("text")
        with pytest.raises(IndexFileError, match="cannot be built"):
            index.sync()


def test_tantivy_is_the_default_where_it_is_installed(tmp_path: Path) -> None:
    chosen: TextIndex = default_text_index(tmp_path)
    assert type(chosen).__name__ == ("TantivyIndex" if HAS_TANTIVY else "Fts5Index")


WORDS = ["pump", "valve", "water", "東京", "京都", "كتاب", "winter"]
CHANGES = st.lists(
    st.tuples(st.sampled_from(["/a", "/b", "/c", "/d"]), st.lists(st.sampled_from(WORDS), max_size=6)), max_size=12
)


@given(CHANGES, st.sets(st.integers(0, 11)))
@settings(max_examples=12)
def test_both_backends_find_exactly_what_the_truth_holds(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, list[str]]], searches: set[int]
) -> None:
    """Whatever is added, changed and removed, and whenever an index is brought up to date in between."""
    for backend in ("tantivy", "fts5") if HAS_TANTIVY else ("fts5",):
        truth: dict[str, list[str]] = {}
        with open_index(backend, tmp_path_factory.mktemp(backend)) as index:
            for number, (path, words) in enumerate(changes):
                if words:
                    truth[path] = words
                    index.store.write([document(path, ". ".join(words), title="x")])
                else:
                    truth.pop(path, None)
                    index.store.write(remove=[path])
                if number in searches:
                    index.sync()
            for word in WORDS:
                expected = {path for path, words in truth.items() if word in words}
                assert set(paths_found(index, word)) == expected


def test_without_tantivy_fts5_serves_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lfm.search.tantivy_index", raising=False)
    monkeypatch.setitem(sys.modules, "tantivy", None)
    with LocalIndex(tmp_path) as index:
        index.store.write([document("/a.md", "A pump moves water.")])
        assert paths_found(index, "water") == ["/a.md"]
    assert {path.name for path in tmp_path.iterdir()} == {"documents.sqlite", "bm25-1.sqlite", "writer.lock"}


def test_threads_that_ask_first_wait_for_the_one_that_builds_the_index(tmp_path: Path, backend: str) -> None:
    """They would otherwise be told that another process is writing it."""
    with open_index(backend, tmp_path) as index:
        index.store.write([document(f"/{number}.md", f"A pump of number {number}.") for number in range(200)])
        barrier = threading.Barrier(4)

        def ask(_: int) -> int:
            barrier.wait(10)
            return len(index.search("pump", limit=3))

        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(ask, range(4))) == [3] * 4


@pytest.mark.skipif(not HAS_TANTIVY, reason="needs tantivy, of the extra search")
def test_the_commonest_words_are_left_out_of_long_questions_on_a_large_index(tmp_path: Path) -> None:
    from lfm.search.tantivy_index import TantivyIndex

    texts = {f"/{number}.md": f"The house of number {number}." for number in range(40)}
    texts |= {
        "/pump.md": "The pump of a valve.",
        "/valve.md": "Valve and rotor.",
        "/rotor.md": "A rotor, a pump, a valve.",
    }
    large = TantivyIndex(tmp_path / "bm25", large_index=40)
    with LocalIndex(tmp_path, text_index=large) as index:
        index.store.write([document(path, text, title="-") for path, text in texts.items()])
        assert set(paths_found(index, "the pump of the valve and its rotor")) == {"/pump.md", "/valve.md", "/rotor.md"}
        assert len(paths_found(index, "the pump", limit=50)) == 42  # too short to do without
        assert len(paths_found(index, "the absent thing of nothing at all", limit=50)) == 41
