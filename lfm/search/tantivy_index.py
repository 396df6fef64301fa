"""BM25 with tantivy, of the extra `search`: a question on a million chunks takes it milliseconds, and FTS5 a second.

In a large index, terms that stand in every fifth chunk are left out of questions that say enough without them: they
weigh next to nothing, and reading their long lists is most of the work.

Terms come from our analyser and are joined by spaces, which is all that tantivy is asked to split at; queries are built
as objects. The position in the log is an entry of its own, replaced by the same commit that changes the others.
"""

import contextlib
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tantivy

from lfm.errors import MachineError
from lfm.search.errors import IndexBusyError
from lfm.search.store import Position
from lfm.search.text_index import IndexDamaged, ScoredChunk, Update

_TOKENIZER = "terms"
_WRITER_BYTES = 64 * 1024 * 1024
_MACHINE_SIGNS = ("No space left", "Permission denied", "Read-only file system", "Too many open files")
_LARGE_INDEX = 10_000  # chunks
_COMMON_SHARE = 1 / 5  # of the chunks: a term of more weighs less than 1.6, one of a thousandth 6.9
_MIN_TELLING = 3  # terms that a question must have besides
_POSITION_ENTRY = -1  # the `document` of the one entry that is no chunk


class TantivyIndex:
    """A `TextIndex` in the folder `path`. From `large_index` chunks on, the commonest terms are left out."""

    def __init__(self, path: Path, *, large_index: int = _LARGE_INDEX) -> None:
        self._path = path
        self._large_index = large_index
        self._opened: tantivy.Index | None = None
        self._lock = threading.Lock()

    def position(self) -> Position | None:
        with _damage():
            index = self._index()
            index.reload()
            searcher = index.searcher()
            query = tantivy.Query.term_query(index.schema, "document", _POSITION_ENTRY)
            hits = searcher.search(query, 1, count=False).hits
            if not hits:
                return None
            seq, token = searcher.doc(hits[0][1])["position"][0].split()
            return Position(int(seq), bytes.fromhex(token))

    def apply(self, updates: Iterable[Update]) -> None:
        with contextlib.ExitStack() as stack:
            writer: tantivy.IndexWriter | None = None
            for update in updates:
                with _damage():
                    if writer is None:
                        writer = self._index().writer(_WRITER_BYTES, 1)
                        stack.callback(_finish, writer)
                    _commit(writer, update)

    def search(self, terms: Sequence[str], *, limit: int) -> list[ScoredChunk]:
        with _damage():
            index = self._index()
            searcher = index.searcher()
            query = tantivy.Query.boolean_query(
                [
                    (tantivy.Occur.Should, tantivy.Query.term_query(index.schema, "terms", term, "freq"))
                    for term in self._telling(terms, searcher)
                ]
            )
            hits = searcher.search(query, limit, count=False).hits
            chunks = searcher.fast_field_values("chunk", [address for _, address in hits])
            return [ScoredChunk(int(chunk or 0), score) for chunk, (score, _) in zip(chunks, hits, strict=True)]

    def clear(self) -> None:
        with self._lock:
            self._opened = None
            if self._path.is_dir():
                shutil.rmtree(self._path, ignore_errors=True)
            else:
                self._path.unlink(missing_ok=True)

    def close(self) -> None:
        with self._lock:
            self._opened = None

    def _telling(self, terms: Sequence[str], searcher: tantivy.Searcher) -> Sequence[str]:
        """The terms without those that stand almost everywhere, if enough of the others exist."""
        if searcher.num_docs < self._large_index:
            return terms
        limit = searcher.num_docs * _COMMON_SHARE
        telling = [term for term in terms if 0 < searcher.doc_freq("terms", term) <= limit]
        return telling if len(telling) >= _MIN_TELLING else terms

    def _index(self) -> tantivy.Index:
        with self._lock:
            if self._opened is None:
                self._path.mkdir(mode=0o700, exist_ok=True)
                index = tantivy.Index(_schema(), str(self._path))
                words = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.whitespace()).build()
                index.register_tokenizer(_TOKENIZER, words)
                index.config_reader("manual")
                index.reload()
                self._opened = index
            return self._opened


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_integer_field("document", indexed=True)
    builder.add_integer_field("chunk", fast=True)
    builder.add_text_field("terms", tokenizer_name=_TOKENIZER, index_option="freq")
    builder.add_text_field("position", stored=True, tokenizer_name="raw", index_option="basic")
    return builder.build()


def _commit(writer: tantivy.IndexWriter, update: Update) -> None:
    for document_id in (_POSITION_ENTRY, *update.removed_documents):
        writer.delete_documents_by_term("document", document_id)
    for chunk in update.chunks:
        entry = tantivy.Document()
        entry.add_integer("document", chunk.document_id)
        entry.add_integer("chunk", chunk.chunk_id)
        entry.add_text("terms", " ".join(chunk.terms))
        writer.add_document(entry)
    entry = tantivy.Document()
    entry.add_integer("document", _POSITION_ENTRY)
    entry.add_text("position", f"{update.position.seq} {update.position.token.hex()}")
    writer.add_document(entry)
    writer.commit()


def _finish(writer: tantivy.IndexWriter) -> None:
    """Let go of the index's lock. What was not committed is dropped."""
    with _damage():
        writer.wait_merging_threads()


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Failures of tantivy as IndexDamaged, but for those that no new index would cure. It names them by texts only."""
    try:
        yield
    except (ValueError, OSError, LookupError, RuntimeError) as error:
        text = str(error)
        if "LockBusy" in text:
            raise IndexBusyError("Another process writes to the search index. Try again later.") from error
        if any(sign in text for sign in _MACHINE_SIGNS):
            raise MachineError(f"The search index cannot be read or written ({text[:200]}).") from error
        raise IndexDamaged(f"tantivy: {text[:200]}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # how a panic in Rust arrives; it is no Exception
            raise
        raise IndexDamaged(f"tantivy panicked: {error}") from error
