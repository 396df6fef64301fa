"""A kill at any moment loses nothing that was committed, and two writers do not hurt each other."""

import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lfm.search.local_index import STORE_FILE, LocalIndex
from tests.search.writer import NUM_SENTENCES, text_of

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@contextmanager
def writer(
    folder: Path, *, first: int = 0, num_documents: int = 3, pause_at: str = ""
) -> "Iterator[subprocess.Popen[str]]":
    """A process that writes until it is killed, at the latest when the block ends."""
    words = [str(folder), str(first), str(num_documents), *([pause_at] if pause_at else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.search.writer", *words], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def read_reports(process: "subprocess.Popen[str]", *, num_lines: int | None = None) -> dict[int, int]:
    """The newest version of each document that was reported within `num_lines`, or until the pause or the end."""
    assert process.stdout is not None
    versions = {}
    for line_number, line in enumerate(process.stdout, 1):
        if line == "pausing\n":
            break
        if not line.endswith("\n"):
            break  # killed while it wrote this
        number, version = map(int, line.split())
        versions[number] = version
        if line_number == num_lines:
            break
    return versions


def check(folder: Path, committed: dict[int, int]) -> dict[int, int]:
    """Every document is whole, no older than `committed`, and found in just that version. Returns the versions."""
    database = sqlite3.connect(folder / STORE_FILE)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    found = {}
    with LocalIndex(folder) as index:
        for stored in index.store.documents():
            number = int(stored.path.strip("/").removesuffix(".md"))
            text = "".join(chunk.text for chunk in index.store.chunks_of(stored.id))
            version = int(text.split(" in v")[1].split(".")[0])
            assert text == text_of(number, version)
            found[number] = version
            hits = index.search(f"d{number}", limit=1000)
            assert len(hits) == NUM_SENTENCES
            assert {hit.chunk.document_id for hit in hits} == {stored.id}
    assert set(found) >= set(committed)
    assert all(found[number] >= version for number, version in committed.items())
    return found


def test_a_kill_at_any_moment_loses_nothing_committed(tmp_path: Path) -> None:
    """One index, killed again and again at random moments while documents are added and replaced."""
    rng = random.Random(0)
    for _ in range(5):
        with writer(tmp_path) as process:
            committed = read_reports(process, num_lines=rng.randrange(1, 16))
            for _ in range(rng.randrange(0, 20_000)):  # some microseconds into the next write, or the one after
                pass
            process.kill()
            committed |= read_reports(process)
        check(tmp_path, committed)


@pytest.mark.parametrize("pause_at", ["chunk", "commit"])
def test_a_kill_in_the_middle_of_an_index_update_is_caught_up(tmp_path: Path, pause_at: str) -> None:
    with writer(tmp_path, pause_at=pause_at) as process:
        committed = read_reports(process)
    assert check(tmp_path, committed) == committed == {0: 4, 1: 3, 2: 3}


def test_while_a_writer_is_stuck_in_an_update_others_search_and_write_the_truth(tmp_path: Path) -> None:
    with writer(tmp_path, pause_at="commit") as process:
        read_reports(process)
        with LocalIndex(tmp_path) as index:
            assert len(index.search("d1", limit=1000)) == NUM_SENTENCES
            index.store.write(remove=["/1.md"])
            assert index.search("d1") == []
        process.kill()
    with LocalIndex(tmp_path) as index:
        assert index.search("d1") == []
        assert len(index.search("v4", limit=1000)) == NUM_SENTENCES


def test_two_writers_and_a_reader_share_an_index(tmp_path: Path) -> None:
    with writer(tmp_path, num_documents=3) as one, writer(tmp_path, first=2, num_documents=3) as other:
        committed = read_reports(one, num_lines=8)
        with LocalIndex(tmp_path) as index:
            assert index.search("d0") != []
        others = read_reports(other, num_lines=8)
        os.kill(one.pid, 9)
        os.kill(other.pid, 9)
        committed |= read_reports(one)
        others |= read_reports(other)
    shared = {2: 1}  # both write it, so that neither knows its newest version
    found = check(tmp_path, {**committed, **others, **shared})
    assert set(found) == {0, 1, 2, 3, 4}
