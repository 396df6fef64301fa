"""`lfm index`: the search index over your own documents. Add them, list them, search them, remove them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lfm.cli import options
from lfm.cli.terminal import PhaseLine, note, one_line, write_text
from lfm.errors import UsageError
from lfm.service.data_folder import data_folder

if TYPE_CHECKING:
    from lfm.search.embeddings import EmbeddingClient
    from lfm.search.indexing import AddReport
    from lfm.search.local_index import Hit, LocalIndex

_SHOWN_CHARS = 300

index = typer.Typer(help="Search your own documents: add, list, search, remove.", no_args_is_help=True)

PathsArgument = Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files, or folders with all in them.")]
IndexFlag = Annotated[
    Path | None,
    options.flag("index", "Folder of the index. Unset: ~/.local/share/lfm/search, or as XDG_DATA_HOME says."),
]
EmbeddingsUrlFlag = Annotated[
    str | None, options.flag("embeddings_url", "A server with /v1/embeddings: search by meaning as well as by words.")
]
EmbeddingsModelFlag = Annotated[str | None, options.flag("embeddings_model", "The model to name to that server.")]
EmbeddingsKeyFlag = Annotated[str | None, options.flag("embeddings_key", "Its API key, if it wants one.")]
MissingFlag = Annotated[bool, options.flag("missing", "Only those whose files do not exist any more.")]
LimitFlag = Annotated[int, options.flag("limit", "Most passages to show.")]


@index.command("add")
def add(
    paths: PathsArgument,
    index_folder: IndexFlag = None,
    embeddings_url: EmbeddingsUrlFlag = None,
    embeddings_model: EmbeddingsModelFlag = None,
    embeddings_key: EmbeddingsKeyFlag = None,
    debug: options.DebugFlag = False,
) -> None:
    """Add documents: text, Markdown, HTML and PDF. What has not changed since the last time is skipped."""
    from lfm.search.extraction import Extractor
    from lfm.search.indexing import add_paths

    line = PhaseLine()
    embeddings = _embeddings(embeddings_url, embeddings_model, embeddings_key)
    with _opened(index_folder, is_new=True, embeddings=embeddings) as opened, Extractor() as extractor:
        try:
            report = add_paths(opened, paths, extractor=extractor, on_progress=line)
        finally:
            line.close()
        num_documents, num_chunks = opened.store.counts()
    _show_report(report)
    print(f"The index holds {num_documents:,} documents in {num_chunks:,} passages.")
    if report.failed:
        raise UsageError(f"{len(report.failed):,} of the documents could not be read; the causes are above.")


@index.command("list")
def list_documents(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[PATH...]", help="Only these files or folders.")
    ] = None,
    index_folder: IndexFlag = None,
    debug: options.DebugFlag = False,
) -> None:
    """List the documents in the index: path, title, passages and bytes, separated by tabs."""
    with _opened(index_folder) as opened:
        names = [_name(path) for path in paths] if paths else [None]
        documents = [document for name in names for document in opened.store.documents(under=name)]
    for document in documents:
        write_text(f"{one_line(document.path)}\t{document.title}\t{document.num_chunks}\t{document.num_bytes}\n")
    if not documents:
        note("No documents. Add some with: lfm index add PATH...")


@index.command("search")
def search(
    query: Annotated[list[str], typer.Argument(metavar="QUERY...", help="What to look for, in any words.")],
    limit: LimitFlag = 5,
    index_folder: IndexFlag = None,
    embeddings_url: EmbeddingsUrlFlag = None,
    embeddings_model: EmbeddingsModelFlag = None,
    embeddings_key: EmbeddingsKeyFlag = None,
    debug: options.DebugFlag = False,
) -> None:
    """Show the passages that match any word of the query, best first."""
    if limit < 1:
        raise UsageError(f"--limit {limit} is out of range. Allowed: 1 or more.")
    embeddings = _embeddings(embeddings_url, embeddings_model, embeddings_key)
    with _opened(index_folder, embeddings=embeddings) as opened:
        hits = opened.search(" ".join(query), limit=limit)
    for number, hit in enumerate(hits, 1):
        write_text(_shown(number, hit, " ".join(query)))
    if not hits:
        note("Nothing found.")


@index.command("remove")
def remove(
    paths: PathsArgument, missing: MissingFlag = False, index_folder: IndexFlag = None, debug: options.DebugFlag = False
) -> None:
    """Remove documents from the index; the files themselves stay. They need not exist any more."""
    from lfm.search.indexing import missing_documents

    with _opened(index_folder) as opened:
        removed: set[str] = set()
        for path in paths:
            documents = opened.store.documents(under=_name(path))
            if not documents:
                raise UsageError(f"{str(path)!r} is not in the index. See what is: lfm index list")
            removed |= {document.path for document in documents}
        if missing:
            removed = set(missing_documents(opened.store, map(_name, paths)))
        opened.store.write(remove=removed)
        opened.sync()
    print(f"Removed {len(removed):,} documents.")


@contextmanager
def _opened(
    folder: Path | None, *, is_new: bool = False, embeddings: "EmbeddingClient | None" = None
) -> Iterator["LocalIndex"]:
    """The index, which must exist already unless `is_new`."""
    from lfm.search.local_index import STORE_FILE, LocalIndex

    folder = folder or data_folder() / "search"
    if not is_new and not (folder / STORE_FILE).is_file():
        raise UsageError(f"There is no index in {folder}. Make one with: lfm index add PATH...")
    with LocalIndex(folder, embeddings=embeddings) as opened:
        yield opened


def _embeddings(url: str | None, model: str | None, key: str | None) -> "EmbeddingClient | None":
    if url is None and model is None:
        return None
    if url is None or model is None:
        raise UsageError("--embeddings-url and --embeddings-model belong together. Give both, or neither.")
    from lfm.search.embeddings import EmbeddingClient

    return EmbeddingClient(url, model, api_key=key)


def _name(path: Path) -> str:
    """A path as the index knows it."""
    try:
        name = str(path.resolve())
        name.encode()
    except (OSError, RuntimeError, UnicodeEncodeError) as error:  # RuntimeError: links in a circle
        raise UsageError(f"{str(path)!r} cannot be in the index ({error}). See what is: lfm index list") from error
    return name


def _show_report(report: "AddReport") -> None:
    for path, cause in report.failed:
        note(f"{one_line(str(path))}: {cause}")
    for path in report.empty:
        note(f"{one_line(str(path))}: has no text (a scan?), so nothing in it can be found.")
    if report.gone:
        example = one_line(report.gone[0])
        note(
            f"{len(report.gone):,} files are gone, such as {example}. Forget them with: lfm index remove --missing PATH"
        )
    print(
        f"{report.num_added:,} added, {report.num_changed:,} changed, {report.num_unchanged:,} unchanged, "
        f"{len(report.failed):,} failed: {report.num_bytes:,} bytes, {report.num_chunks:,} passages."
    )


def _shown(number: int, hit: "Hit", query: str) -> str:
    """A hit in three lines: what it is, where it is, and its text from the sentence that matches best."""
    from lfm.search.citations import supporting_span

    where = f" ({hit.location})" if hit.location else ""
    start, _ = supporting_span(query, hit.chunk.text) or (0, 0)
    text = " ".join(hit.chunk.text[start:].split())
    text = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
    return f"{number}. {hit.chunk.title}{where}\n   {one_line(hit.chunk.path)}\n   {text}\n"
