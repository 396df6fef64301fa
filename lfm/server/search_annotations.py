"""What an answer cites, as the annotations of each API family. Offsets are in characters of the answer's text."""

from collections.abc import Sequence
from dataclasses import dataclass

from lfm.search.citations import Citation, Support, find_citations
from lfm.search.sources import Source

Json = dict[str, object]

MAX_ANNOTATIONS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Cited:
    """A source that an answer may cite. One out of the request's own documents has a number there and an offset."""

    source: Source
    document: int | None = None
    offset: int = 0


def chat_annotations(text: str, sources: Sequence[Cited]) -> list[Json]:
    """OpenAI's `annotations` of a chat message: [start_index, end_index) is the statement that a source supports.

    `content` is the sentence of the source that says so, as OpenRouter has it; `document` tells where that stands in
    the request's documents.
    """
    by_number = {cited.source.number: cited for cited in sources}
    supports: dict[int, Support] = {}
    annotations: list[Json] = []
    for citation in _citations(text, by_number):
        cited = by_number[citation.number]
        if citation.number not in supports:
            supports[citation.number] = Support(cited.source.text)
        fields: Json = url_fields(citation, cited.source)
        span = supports[citation.number].span(text[citation.start : citation.end])
        if span is not None:
            fields["content"] = cited.source.text[span[0] : span[1]]
        if cited.document is not None:
            start, end = span or (0, len(cited.source.text))
            place = {"index": cited.document, "start_index": cited.offset + start, "end_index": cited.offset + end}
            fields["document"] = place
        annotations.append({"type": "url_citation", "url_citation": fields})
    return annotations


def url_fields(citation: Citation, source: Source) -> Json:
    return {
        "start_index": citation.start,
        "end_index": citation.end,
        "title": source.title or f"Source {source.number}",
        "url": source.url,
    }


def _citations(text: str, by_number: dict[int, Cited]) -> list[Citation]:
    return find_citations(text, by_number)[:MAX_ANNOTATIONS]
