"""`lfm index` at the terminal: what it prints, and how it ends."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from lfm.cli.app import run
from tests.search.files import PAGE, pdf, write_files
from tests.search.web import Answer, Seen, serve

ROOT = Path(__file__).resolve().parents[2]


class Done(NamedTuple):
    code: int
    out: str
    err: str


Lfm = Callable[..., Done]


@pytest.fixture
def lfm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., Done]]:
    """Run `lfm index ...` in this process, with the user's data in a folder of the test."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    logger = logging.getLogger("lfm")
    level = logger.level

    def call(*words: str) -> Done:
        capsys.readouterr()
        code = run(["index", *words])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    yield call
    logger.setLevel(level)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "pump.md": "# Pumps\n\nA pump moves water.",
        "valve.txt": "A valve closes.",
        "tokyo.md": "東京は首都です。",
    }
    return write_files((tmp_path / "files").resolve(), files)


def test_documents_are_added_listed_found_and_removed(lfm: Lfm, folder: Path) -> None:
    done = lfm("add", str(folder))
    assert done.code == 0
    assert "3 added, 0 changed, 0 unchanged, 0 failed: " in done.out
    assert done.out.endswith("The index holds 3 documents in 3 passages.\n")
    assert "reading documents: 3 of 3" in done.err
    assert lfm("list").out.splitlines()[0] == f"{folder}/pump.md\tPumps\t1\t28"
    assert len(lfm("list", str(folder)).out.splitlines()) == 3
    found = lfm("search", "what", "moves", "WATER?")
    assert found.code == 0
    assert found.out == f"1. Pumps\n   {folder}/pump.md\n   A pump moves water.\n"
    assert f"{folder}/tokyo.md" in lfm("search", "首都").out
    assert lfm("remove", str(folder / "pump.md")).out == "Removed 1 documents.\n"
    assert lfm("search", "water").out == ""
    assert lfm("remove", str(folder)).out == "Removed 2 documents.\n"
    assert lfm("list").out == ""


def test_a_removed_file_can_still_be_removed_from_the_index(lfm: Lfm, folder: Path) -> None:
    lfm("add", str(folder))
    (folder / "pump.md").unlink()
    assert lfm("remove", str(folder / "pump.md")).code == 0


def test_files_that_are_gone_are_told_and_stay_until_they_are_removed(lfm: Lfm, folder: Path) -> None:
    """A disk may be missing for a while."""
    lfm("add", str(folder))
    (folder / "pump.md").unlink()
    done = lfm("add", str(folder))
    assert f"1 files are gone, such as {folder}/pump.md. Forget them with: lfm index remove --missing PATH" in done.err
    assert len(lfm("list").out.splitlines()) == 3
    assert lfm("remove", "--missing", str(folder)).out == "Removed 1 documents.\n"
    assert len(lfm("list").out.splitlines()) == 2
    assert "gone" not in lfm("add", str(folder)).err


def test_adding_again_says_what_is_unchanged(lfm: Lfm, folder: Path) -> None:
    lfm("add", str(folder))
    assert "0 added, 0 changed, 3 unchanged, 0 failed: 0 bytes" in lfm("add", str(folder)).out


def test_an_index_lives_where_the_flag_says(lfm: Lfm, folder: Path, tmp_path: Path) -> None:
    lfm("add", "--index", str(tmp_path / "mine"), str(folder))
    assert len(lfm("list", "--index", str(tmp_path / "mine")).out.splitlines()) == 3
    assert lfm("list").code == 2
    assert not (tmp_path / "data").exists()


def test_bad_documents_are_named_and_make_the_command_fail(lfm: Lfm, folder: Path) -> None:
    write_files(folder, {"bad.md": b"caf\xe9", "blank.md": " "})
    done = lfm("add", str(folder))
    assert done.code == 2
    assert f"{folder}/bad.md: The document is no UTF-8 text (byte 3). Convert it first." in done.err
    assert f"{folder}/blank.md: has no text" in done.err
    assert done.err.endswith("error: 1 of the documents could not be read; the causes are above.\n")
    assert "4 added" in done.out


def test_with_an_embeddings_server_documents_are_found_by_meaning(lfm: Lfm, folder: Path) -> None:
    def embeddings(seen: Seen) -> Answer:
        texts = json.loads(seen.body)["input"]
        rows = [[1.0, 0.1] if "valve" in text or "tap" in text else [0.1, 1.0] for text in texts]
        data = [{"index": index, "embedding": row} for index, row in enumerate(rows)]
        return Answer(body=json.dumps({"data": data}).encode())

    with serve() as web:
        web.answers["/v1/embeddings"] = embeddings
        flags = ["--embeddings-url", web.root, "--embeddings-model", "m"]
        assert lfm("add", str(folder), *flags).code == 0
        assert lfm("search", "tap", *flags).out.startswith("1. valve.txt\n")
    assert lfm("search", "tap").out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search", "x"], "There is no index in "),
        (["list"], "There is no index in "),
        (["remove", "x"], "There is no index in "),
        (["add", "/no/such/path"], "There is no file or folder '/no/such/path'"),
        (["add"], "Missing argument 'PATH...'"),
        (["search", "--limit", "0", "x"], "--limit 0 is out of range"),
        (["add", "--embeddings-url", "http://x", "."], "--embeddings-url and --embeddings-model belong together"),
        (
            ["add", "--embeddings-url", "x", "--embeddings-model", "m", "."],
            "server cannot be used: 'x' is no web address",
        ),
        (["serch"], "No such command 'serch'. Did you mean 'search'?"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(lfm: Lfm, words: list[str], message: str) -> None:
    done = lfm(*words)
    assert done.code == 2
    assert message in done.err


def test_a_path_that_is_not_in_the_index_is_named(lfm: Lfm, folder: Path) -> None:
    lfm("add", str(folder))
    done = lfm("remove", str(folder / "pump.md"), "other.md")
    assert done.code == 2
    assert "'other.md' is not in the index" in done.err
    assert len(lfm("list").out.splitlines()) == 3, "nothing was removed"


def test_names_of_any_characters_are_shown_on_one_line(lfm: Lfm, folder: Path) -> None:
    write_files(folder, {"a\n\x1b[31mb.md": "A turbine turns.", "c\nd.md": b"caf\xe9"})
    done = lfm("add", str(folder))
    assert f"{folder}/c\\nd.md: The document is no UTF-8" in done.err
    shown = f"{folder}/a\\n\\x1b[31mb.md"
    assert len(lfm("list").out.splitlines()) == 4
    assert f"{shown}\t" in lfm("list").out
    assert f"\n   {shown}\n" in lfm("search", "turbine").out
    assert "\x1b" not in done.err


@pytest.mark.parametrize("command", ["list", "remove"])
@pytest.mark.parametrize("name", ["loop", os.fsdecode(b"bad\xff.md")], ids=["loop", "no-utf-8"])
def test_a_path_that_no_index_can_hold_is_refused(lfm: Lfm, folder: Path, command: str, name: str) -> None:
    (folder / "loop").symlink_to("loop")
    lfm("add", str(folder))
    done = lfm(command, str(folder / name))
    assert "a bug" not in done.err
    assert done.code == 2 or not done.out


def test_what_is_neither_file_nor_folder_is_refused_and_not_waited_for(lfm: Lfm, folder: Path) -> None:
    os.mkfifo(folder / "pipe.md")
    done = lfm("add", str(folder / "pipe.md"))
    assert done.code == 2
    assert "pipe.md' is no file and no folder." in done.err
    assert "3 added" in lfm("add", str(folder)).out


def test_a_damaged_index_is_one_line(lfm: Lfm, folder: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "data" / "lfm" / "search", {"documents.sqlite": b"no database" * 500})
    done = lfm("search", "x")
    assert done.code == 2
    assert "is damaged or no search index" in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_web_pages_and_pdf_files_are_read_as_a_user_would(tmp_path: Path) -> None:
    pytest.importorskip("trafilatura")
    pytest.importorskip("pypdf")
    write_files(tmp_path / "files", {"page.html": PAGE, "book.pdf": pdf(["Cover", "The second page has a turbine"])})
    command = [sys.executable, "-m", "lfm.cli", "index"]
    flag = ["--index", str(tmp_path / "index")]

    def lfm(*words: str) -> str:
        done = subprocess.run(
            [*command, *words, *flag], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    assert "2 added" in lfm("add", str(tmp_path / "files"))
    assert "book.pdf (page 2)" in lfm("search", "turbine")
    assert "Pumps of the north (Pumps > Winter)" in lfm("search", "valve", "freezes")
