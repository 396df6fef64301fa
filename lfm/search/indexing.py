"""Adds files to an index: what changed is read, cut and written; what did not is left alone."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lfm.search.chunks import cut
from lfm.search.documents import RECIPE, extract_document, find_documents, read_document
from lfm.search.errors import ExtractionError
from lfm.search.extraction import Extractor
from lfm.search.local_index import LocalIndex
from lfm.search.store import NewDocument, Store

_BATCH_BYTES = 4 * 1024 * 1024  # of text in one transaction
_BATCH_DOCUMENTS = 100

OnProgress = Callable[[str], None]


@dataclass(slots=True)
class AddReport:
    """What became of the files. `failed` says why, `empty` are documents without any text (a scan, say).

    `gone` are documents of the index whose files are not in the folders any more. They stay: a disk may be missing.
    """

    num_added: int = 0
    num_changed: int = 0
    num_unchanged: int = 0
    num_bytes: int = 0  # of the files that were read into the index
    num_chunks: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)


def add_paths(index: LocalIndex, paths: Iterable[Path], *, extractor: Extractor, on_progress: OnProgress) -> AddReport:
    """Add files, and the documents in folders, to `index`, which is up to date afterwards.

    Each document is written whole or not at all, so that an add which was stopped goes on where it was when it is run
    again. Raises UsageError for a path that does not exist, before anything is read.
    """
    paths = list(paths)
    found = list(find_documents(paths))
    report = AddReport()
    batch: list[NewDocument] = []
    for number, path in enumerate(found, 1):
        on_progress(f"reading documents: {number:,} of {len(found):,}, {path.name}")
        try:
            document = _new_document(index, path, extractor, report)
        except ExtractionError as error:
            report.failed.append((path, str(error)))
            continue
        if document is not None:
            batch.append(document)
        if len(batch) >= _BATCH_DOCUMENTS or sum(document.num_bytes for document in batch) >= _BATCH_BYTES:
            index.store.write(batch)
            batch = []
    if batch:
        index.store.write(batch)
    report.gone = missing_documents(index.store, [str(path.resolve()) for path in paths if path.is_dir()])
    index.sync(on_change=lambda num_left: on_progress(f"building the index: {num_left:,} changes left"))
    return report


def missing_documents(store: Store, names: Iterable[str]) -> list[str]:
    """The documents at these paths, and in the folders of these names, whose files do not exist any more."""
    paths = {document.path for name in names for document in store.documents(under=name)}
    return sorted(path for path in paths if not os.path.lexists(path))


def _new_document(index: LocalIndex, path: Path, extractor: Extractor, report: AddReport) -> NewDocument | None:
    """Read one file; None if the index has it as it is. Raises ExtractionError."""
    try:
        name = str(path).encode("utf-8").decode("utf-8")
    except UnicodeEncodeError:
        raise ExtractionError("The document's name is no UTF-8. Rename it.") from None
    raw = read_document(path)
    known = index.store.document_at(name)
    if known is not None and (known.sha256, known.recipe) == (raw.sha256, RECIPE):
        report.num_unchanged += 1
        return None
    extracted = extract_document(raw, extractor)
    chunks = cut(extracted)
    report.num_added += known is None
    report.num_changed += known is not None
    report.num_bytes += len(raw.data)
    report.num_chunks += len(chunks)
    if not chunks:
        report.empty.append(path)
    return NewDocument(
        path=name,
        title=extracted.title,
        kind=raw.kind,
        sha256=raw.sha256,
        recipe=RECIPE,
        num_bytes=len(raw.data),
        chunks=chunks,
    )
