"""Chooses what of some documents goes into a prompt: within a budget of tokens, fair to each document, best first.

What is chosen depends on the question, unless everything fits. The order does not: passages stand as in the request and
in the document, so that questions about the same documents share the longest prefix that they can, and with it the
engine's cached blocks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lfm.errors import RequestError
from lfm.search.chunks import cut, num_tokens_estimated
from lfm.search.extracted import Extracted
from lfm.search.ranking import bm25_scores
from lfm.search.sentences import sentence_spans
from lfm.search.sources import Source, render

CountTokens = Callable[[str], int]

CONTEXT_TOKENS: Mapping[str, int] = {"low": 1_500, "medium": 4_000, "high": 8_000}  # by `search_context_size`
MAX_DOCUMENTS = 256
MAX_DOCUMENT_CHARS = 16 * 1024 * 1024  # of all together
_ANY_NUMBER = 999  # of a source whose number is not known yet
_JOINT_TOKENS = 2  # of the blank line between two sources
_MAX_MISSES = 16  # pieces too large for what is left, before no more are tried
_MIN_SHARE_TOKENS = 96  # with less, a document has nothing to say


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceDocument:
    """A document that came with a request."""

    text: str
    title: str = ""
    url: str = ""


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece [start, end) of the text of document number `document` (from 0), as the source that the model sees."""

    document: int
    start: int
    end: int
    source: Source


@dataclass(frozen=True, slots=True)
class _Piece:
    """A chunk of a document and how well it matches the question."""

    document: int
    start: int
    end: int
    location: str = ""
    score: float = 0.0

    def overlaps(self, other: "_Piece") -> bool:
        return self.document == other.document and self.start < other.end and other.start < self.end


def parse_documents(value: object) -> list[SourceDocument]:
    """Read the `documents` of a request: texts, or objects with `text` or `content` and perhaps `title` and `url`.

    Raises RequestError that names the first wrong one.
    """
    if not isinstance(value, list):
        raise RequestError("documents is no array. Send an array of texts or objects.", param="documents")
    if len(value) > MAX_DOCUMENTS:
        raise RequestError(f"documents has {len(value)} entries. Allowed: {MAX_DOCUMENTS}.", param="documents")
    documents = [_parse_document(item, f"documents[{index}]") for index, item in enumerate(value)]
    num_chars = sum(len(document.text) for document in documents)
    if num_chars > MAX_DOCUMENT_CHARS:
        raise RequestError(
            f"documents have {num_chars:,} characters together. Allowed: {MAX_DOCUMENT_CHARS:,}.", param="documents"
        )
    return documents


def _parse_document(value: object, where: str) -> SourceDocument:
    if isinstance(value, str):
        return SourceDocument(text=value)
    fields = value.get("data", value) if isinstance(value, dict) else None
    if isinstance(fields, str):
        return SourceDocument(text=fields)
    if not isinstance(fields, dict):
        raise RequestError(f"{where} is no text and no object. Send one.", param=where)
    text = fields.get("text", fields.get("content"))
    if not isinstance(text, str):
        raise RequestError(f"{where}.text is missing or no text. Send one.", param=f"{where}.text")
    title, url = fields.get("title"), fields.get("url")
    for name, given in (("title", title), ("url", url)):
        if given is not None and not isinstance(given, str):
            raise RequestError(f"{where}.{name} is no text. Send one, or leave it out.", param=f"{where}.{name}")
    return SourceDocument(text=text, title=title or "", url=url or "")


def pack(
    documents: Sequence[SourceDocument], question: str, *, budget_tokens: int, count_tokens: CountTokens
) -> list[Passage]:
    """The passages of `documents` that fit `budget_tokens` when rendered, in the documents' order.

    If all documents fit, they are taken as they are. Else each gets an equal share of the budget, and what one does not
    need goes to the others; within its share come the chunks that match the question best, in whole sentences. Where
    there are too many documents for shares of any use, those that match best are served.
    """
    packer = _Packer(documents, question, budget_tokens, count_tokens)
    whole = [
        _Piece(number, 0, len(document.text)) for number, document in enumerate(documents) if document.text.strip()
    ]
    if packer.may_fit(whole) and packer.fits(whole):
        return packer.passages(whole)
    return packer.passages(packer.choose(_pieces(documents, question)))


def _pieces(documents: Sequence[SourceDocument], question: str) -> list[_Piece]:
    """All chunks of all documents, scored among each other."""
    cuts = [
        (number, chunk)
        for number, document in enumerate(documents)
        for chunk in cut(Extracted(text=document.text, is_markdown=True))
    ]
    scores = bm25_scores(question, [f"{documents[number].title}\n{chunk.text}" for number, chunk in cuts])
    return [
        _Piece(number, chunk.start, chunk.end, chunk.heading, score)
        for (number, chunk), score in zip(cuts, scores, strict=True)
    ]


class _Packer:
    """Keeps count of one budget."""

    def __init__(
        self, documents: Sequence[SourceDocument], question: str, budget_tokens: int, count_tokens: CountTokens
    ) -> None:
        self._documents, self._question = documents, question
        self._budget_tokens, self._count_tokens = budget_tokens, count_tokens
        self._costs: dict[tuple[int, int, int], int] = {}

    def passages(self, pieces: Sequence[_Piece]) -> list[Passage]:
        """Pieces as numbered passages in the documents' order; neighbours become one."""
        joined: list[_Piece] = []
        for piece in sorted(pieces, key=lambda piece: (piece.document, piece.start)):
            last = joined[-1] if joined else None
            if last is not None and (last.document, last.end) == (piece.document, piece.start):
                joined[-1] = replace(last, end=piece.end)
            else:
                joined.append(piece)
        return [
            Passage(piece.document, piece.start, piece.end, self._source(piece, number))
            for number, piece in enumerate(joined, 1)
        ]

    def may_fit(self, pieces: Sequence[_Piece]) -> bool:
        """Whether it is worth counting the tokens: a long text takes long to count."""
        estimate = sum(num_tokens_estimated(self._documents[piece.document].text) for piece in pieces)
        return estimate < 4 * self._budget_tokens

    def fits(self, pieces: Sequence[_Piece]) -> bool:
        sources = [passage.source for passage in self.passages(pieces)]
        return self._count_tokens(render(sources)) <= self._budget_tokens

    def choose(self, pieces: Sequence[_Piece]) -> list[_Piece]:
        """What to take: first each document's share, then whatever matches best as long as there is room."""
        best_first = sorted(pieces, key=lambda piece: -piece.score)
        by_document: dict[int, list[_Piece]] = {}
        for piece in best_first:
            by_document.setdefault(piece.document, []).append(piece)
        served = list(by_document.values())[: max(1, self._budget_tokens // _MIN_SHARE_TOKENS)]
        chosen: list[_Piece] = []
        for own, share in zip(served, self._shares(served), strict=True):
            chosen += self._within(own, share)
        chosen += self._fillers(best_first, chosen)
        while chosen and not self.fits(chosen):  # texts may cost a token more together than apart
            chosen.remove(min(chosen, key=lambda piece: piece.score))
        return chosen

    def _fillers(self, best_first: Sequence[_Piece], chosen: Sequence[_Piece]) -> list[_Piece]:
        """The best matching pieces that fit what `chosen` leaves of the budget."""
        room = self._budget_tokens - sum(map(self._cost, chosen))
        fillers: list[_Piece] = []
        num_misses = 0
        for piece in best_first:
            if piece.score <= 0 or num_misses == _MAX_MISSES:
                break
            if any(map(piece.overlaps, chosen)):
                continue
            if self._cost(piece) <= room:
                fillers.append(piece)
                room -= self._cost(piece)
            else:
                num_misses += 1
        return fillers

    def _shares(self, served: Sequence[Sequence[_Piece]]) -> list[int]:
        """The tokens that each document may have: equal shares, but none more than it needs."""
        needs = [self._need(own) for own in served]
        shares = [0] * len(served)
        left = self._budget_tokens
        for num_done, index in enumerate(sorted(range(len(served)), key=needs.__getitem__)):
            shares[index] = min(needs[index], left // (len(served) - num_done))
            left -= shares[index]
        return shares

    def _need(self, own: Sequence[_Piece]) -> int:
        """What a document costs as a whole, or the budget if that is less. No more is counted than it takes to know."""
        need = 0
        for piece in own:
            need += self._cost(piece)
            if need >= self._budget_tokens:
                return self._budget_tokens
        return need

    def _within(self, own: Sequence[_Piece], share: int) -> list[_Piece]:
        """The best pieces of one document that fit its share; of the last one, the best of its sentences."""
        taken: list[_Piece] = []
        for piece in own:
            if self._cost(piece) > share:
                part = self._best_part(piece, share)
                return [*taken, part] if part is not None else taken
            taken.append(piece)
            share -= self._cost(piece)
        return taken

    def _best_part(self, piece: _Piece, share: int) -> _Piece | None:
        """The sentence of a piece that matches best, with as many around it as fit; None if it does not fit itself."""
        text = self._documents[piece.document].text[piece.start : piece.end]
        spans = sentence_spans(text)
        scores = bm25_scores(self._question, [text[start:end] for start, end in spans])
        first = last = max(range(len(spans)), key=scores.__getitem__)

        def part(first: int, last: int) -> _Piece | None:
            shorter = replace(piece, start=piece.start + spans[first][0], end=piece.start + spans[last][1])
            return shorter if self._cost(shorter) <= share else None

        best = part(first, last)
        while best is not None:
            if last + 1 < len(spans) and (wider := part(first, last + 1)) is not None:
                best, last = wider, last + 1
            elif first > 0 and (wider := part(first - 1, last)) is not None:
                best, first = wider, first - 1
            else:
                break
        return best

    def _cost(self, piece: _Piece) -> int:
        """Tokens of a piece as a source of its own: a little more than it will cost beside its neighbour."""
        key = (piece.document, piece.start, piece.end)
        if key not in self._costs:
            self._costs[key] = self._count_tokens(render([self._source(piece, _ANY_NUMBER)])) + _JOINT_TOKENS
        return self._costs[key]

    def _source(self, piece: _Piece, number: int) -> Source:
        document = self._documents[piece.document]
        return Source(
            number=number,
            text=document.text[piece.start : piece.end],
            title=document.title,
            url=document.url,
            location=piece.location,
        )
