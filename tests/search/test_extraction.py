"""Hostile HTML and PDF are parsed in another process, and cost at most one error."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lfm.search.errors import ExtractionError
from lfm.search.extraction import Extractor
from lfm.search.extraction_wire import MAX_DOCUMENT_BYTES
from tests.search.files import PAGE, pdf

pytestmark = pytest.mark.slow

# A worker that misbehaves as its document says. It speaks the real protocol, and stands in for a parser with a bug.
MISBEHAVING = """
import os, resource, signal, struct, sys, time
from lfm.search.extraction_wire import Done, decode_job, frame
from lfm.search.extracted import Extracted
while header := sys.stdin.buffer.read(4):
    job = decode_job(sys.stdin.buffer.read(struct.unpack("!I", header)[0]))
    if job.data == b"segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif job.data == b"exit":
        os._exit(3)
    elif job.data == b"hang":
        signal.pause()
    elif job.data == b"close":
        os.close(1)
        signal.pause()
    elif job.data == b"huge":
        os.write(1, struct.pack("!I", 2**32 - 1))
    elif job.data == b"nonsense":
        os.write(1, struct.pack("!I", 3) + b"abc")
    elif job.data == b"half":
        os.write(1, struct.pack("!I", 100) + b"abc")
        os._exit(0)
    elif job.data == b"burn":
        resource.setrlimit(resource.RLIMIT_CPU, (1, resource.RLIM_INFINITY))
        while True:
            pass
    os.write(1, frame(Done(Extracted(text=f"{os.getpid()}"))))
"""


@pytest.fixture(scope="module")
def extractor() -> Iterator[Extractor]:
    with Extractor() as extractor:
        yield extractor


@pytest.fixture
def misbehaving() -> Iterator[Extractor]:
    with Extractor(timeout_s=5.0, command=(sys.executable, "-c", MISBEHAVING)) as extractor:
        yield extractor


def test_a_page_gives_its_article_as_markdown_and_its_title(extractor: Extractor) -> None:
    pytest.importorskip("trafilatura")
    page = extractor.extract(PAGE.encode(), "html")
    assert page.title == "Pumps of the north"
    assert page.is_markdown
    assert "## Winter" in page.text
    assert "the valve of a pump freezes" in page.text
    assert "Buy now" not in page.text


@pytest.mark.parametrize(
    "data",
    [
        b"<p>just a fragment",
        "<html><body><p>日本語の段落です。</p></body></html>".encode(),
        "<meta charset=latin1><body><p>caf\xe9 au lait".encode("latin-1"),
        b"<body><p>" + b"x &amp; y " * 10000,
    ],
)
def test_odd_html_gives_its_text(extractor: Extractor, data: bytes) -> None:
    pytest.importorskip("trafilatura")
    assert extractor.extract(data, "html").text.strip()


@pytest.mark.parametrize("data", [b"", b"\0\1\2", b"%PDF-1.4", b"\xff" * 1000, b"<div>" * 5000 + b"deep"])
def test_what_is_no_html_is_an_error_or_empty(extractor: Extractor, data: bytes) -> None:
    pytest.importorskip("trafilatura")
    with contextlib.suppress(ExtractionError):
        assert len(extractor.extract(data, "html").text) <= 4 * len(data)
    assert "freezes" in extractor.extract(PAGE.encode(), "html").text


def test_a_pdf_gives_its_pages(extractor: Extractor) -> None:
    pytest.importorskip("pypdf")
    document = extractor.extract(pdf(["First (page)", "", "Third page"]), "pdf")
    assert len(document.page_starts) == 3
    assert document.text[: document.page_starts[1]].strip() == "First (page)"
    assert document.text[document.page_starts[2] :].strip() == "Third page"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pdf",
        b"%PDF-1.4\n%%EOF",
        pdf(["x"])[:-300],
        pdf(["x"]).replace(b"/Count 1", b"/Count 9999999"),
        pdf(["x"]).replace(b"/Kids [", b"/Kids [2 0 R "),
    ],
)
def test_a_damaged_pdf_is_an_error_or_what_is_left_of_it(extractor: Extractor, data: bytes) -> None:
    pytest.importorskip("pypdf")
    with contextlib.suppress(ExtractionError):
        assert extractor.extract(data, "pdf").text.strip() in ("x", "")
    assert extractor.extract(pdf(["still here"]), "pdf").text.strip() == "still here"


def test_memory_is_bounded() -> None:
    pytest.importorskip("trafilatura")
    with Extractor(memory_bytes=200 * 1024 * 1024) as extractor, pytest.raises(ExtractionError, match="The document "):
        extractor.extract(b"<p>" + b"<b>x</b>" * 2_000_000, "html")


def test_the_parser_gets_no_keys_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "abc")
    told = tmp_path / "environ"
    spy = f"import os; open({str(told)!r}, 'w').write(repr(dict(os.environ)))"
    with Extractor(command=(sys.executable, "-c", spy)) as extractor, pytest.raises(ExtractionError):
        extractor.extract(b"", "html")
    assert "SECRET_KEY" not in told.read_text()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"segfault", r"crashed its parser \(SIGSEGV\)"),
        (b"exit", r"ended its parser \(exit code 3\)"),
        (b"close", "made its parser close its pipes"),
        (b"huge", "made its parser answer nonsense"),
        (b"nonsense", "made its parser answer nonsense"),
        (b"half", r"ended its parser \(exit code 0\)"),
        (b"burn", "took too much processor time"),
    ],
)
def test_a_parser_that_dies_or_lies_costs_one_document(misbehaving: Extractor, data: bytes, message: str) -> None:
    before = misbehaving.extract(b"fine", "pdf").text
    with pytest.raises(ExtractionError, match=message):
        misbehaving.extract(data, "pdf")
    after = misbehaving.extract(b"fine", "pdf").text
    assert after != before, "the process was replaced"
    assert misbehaving.extract(b"fine", "pdf").text == after, "and is kept"


def test_a_parser_that_hangs_is_killed_at_the_deadline() -> None:
    with Extractor(timeout_s=0.5, command=(sys.executable, "-c", MISBEHAVING)) as extractor:
        start_s = time.monotonic()
        with pytest.raises(ExtractionError, match=r"took longer than 0\.5 s"):
            extractor.extract(b"hang", "pdf")
        assert time.monotonic() - start_s < 5


def test_too_large_a_document_is_refused_before_any_process_starts() -> None:
    extractor = Extractor(command=("/nonexistent",))
    with pytest.raises(ExtractionError, match=r"has 67,108,865 bytes\. Allowed: 67,108,864"):
        extractor.extract(bytes(MAX_DOCUMENT_BYTES + 1), "pdf")


def test_closing_twice_is_harmless_and_a_closed_one_starts_again(misbehaving: Extractor) -> None:
    first = misbehaving.extract(b"fine", "pdf").text
    misbehaving.close()
    misbehaving.close()
    assert misbehaving.extract(b"fine", "pdf").text != first
