"""Reads the user's files: which of them are documents, of what kind, and what their text is."""

import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lfm.errors import UsageError
from lfm.search import chunks
from lfm.search.clean import clean_line
from lfm.search.errors import ExtractionError
from lfm.search.extracted import Extracted
from lfm.search.extraction import Extractor
from lfm.search.extraction_wire import MAX_DOCUMENT_BYTES

DocumentKind = Literal["text", "markdown", "html", "pdf"]

KINDS: dict[str, DocumentKind] = {
    ".txt": "text",
    ".text": "text",
    ".rst": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
}

_EXTRACTION_VERSION = 1  # of the way texts are taken from files
RECIPE = f"{_EXTRACTION_VERSION}.{chunks.VERSION}"  # a document of another recipe is read again, changed or not

_MAX_TITLE_CHARS = 300
_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True, slots=True)
class RawDocument:
    """A file as it was read. `sha256` is of `data`."""

    path: Path
    kind: DocumentKind
    data: bytes
    sha256: bytes


def find_documents(paths: Iterable[Path]) -> Iterator[Path]:
    """The files among `paths` and, sorted, the documents in their folders, each as a real path and once.

    A folder gives the files whose name ends like a document's, at any depth; hidden ones are left out, and links to
    folders are not followed. A file that is named itself is taken whatever it is called. Raises UsageError for a path
    that does not exist.
    """
    seen = set()
    for path in paths:
        if not path.exists():
            raise UsageError(f"There is no file or folder {str(path)!r}. Give the path of one.")
        if not path.is_dir() and not path.is_file():  # a pipe would keep its reader waiting
            raise UsageError(f"{str(path)!r} is no file and no folder. Give the path of one.")
        for found in [path] if not path.is_dir() else _documents_under(path):
            real = found.resolve()
            if real not in seen:
                seen.add(real)
                yield real


def _documents_under(folder: Path) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(folder):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory, name)
            if not name.startswith(".") and path.suffix.lower() in KINDS and path.is_file():
                yield path


def read_document(path: Path) -> RawDocument:
    """Read a file. Raises ExtractionError if it cannot be read or is too large."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise ExtractionError(f"The document cannot be read ({error.strerror}).") from error
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ExtractionError(f"The document is larger than {MAX_DOCUMENT_BYTES:,} bytes. Split it.")
    return RawDocument(path, KINDS.get(path.suffix.lower(), "text"), data, hashlib.sha256(data).digest())


def extract_document(document: RawDocument, extractor: Extractor) -> Extracted:
    """The text and title of a file. Raises ExtractionError with the cause."""
    if document.kind in ("html", "pdf"):
        extracted = extractor.extract(document.data, document.kind)
    else:
        extracted = Extracted(text=decode_text(document.data), is_markdown=document.kind == "markdown")
    return Extracted(
        text=extracted.text,
        title=clean_line(
            extracted.title or _first_heading(extracted) or document.path.name, max_chars=_MAX_TITLE_CHARS
        ),
        is_markdown=extracted.is_markdown,
        page_starts=extracted.page_starts,
    )


def decode_text(data: bytes) -> str:
    """The text of a text file: UTF-8, or UTF-16 with a byte order mark. Raises ExtractionError for anything else."""
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ExtractionError(
            f"The document is no {encoding.removesuffix('-sig').upper()} text (byte {error.start:,}). Convert it first."
        ) from error
    if "\0" in text:
        raise ExtractionError("The document holds zero bytes, so it is no text.")
    return text


def _first_heading(extracted: Extracted) -> str:
    if not extracted.is_markdown:
        return ""
    lines = (line for line in extracted.text[:10_000].splitlines() if line.startswith("# "))
    return next(lines, "").removeprefix("# ").strip(" \t#")
