"""What an answer cites, as the annotations of each API family. Offsets are in characters of the answer's text."""

import base64
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

from lfm.search.citations import Citation, Support, find_citations
from lfm.search.sources import Source

Json = dict[str, object]

MAX_ANNOTATIONS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Cited:
    """A source that an answer may cite.

    `document` and `offset` tell which of the request's own documents it is from, and where its text begins there.
    `is_file`: it was found by a search in files.
    """

    source: Source
    document: int | None = None
    offset: int = 0
    is_file: bool = False


class _Found(NamedTuple):
    citation: Citation
    cited: Cited
    span: tuple[int, int] | None  # of the sentence in the source that supports the statement

    @property
    def sentence(self) -> str | None:
        return None if self.span is None else self.cited.source.text[self.span[0] : self.span[1]]


class Citations:
    """The sources of one answer, by number. More may come while the answer is made."""

    def __init__(self) -> None:
        self._cited: dict[int, Cited] = {}
        self._supports: dict[int, Support] = {}

    @property
    def next_number(self) -> int:
        return max(self._cited, default=0) + 1

    def has(self, number: int) -> bool:
        return number in self._cited

    def add(self, cited: Cited) -> None:
        """No other source may have `cited.source.number`."""
        assert not self.has(cited.source.number), "every source has a number of its own"
        self._cited[cited.source.number] = cited

    def in_chat(self, text: str) -> list[Json]:
        """OpenAI's `annotations` of a chat message: [start_index, end_index) is the statement that a source supports.

        `content` is the sentence of the source that says so, as OpenRouter has it; `document` tells where that stands
        in the request's documents.
        """
        annotations: list[Json] = []
        for found in self._find(text):
            fields = _url_fields(found)
            if found.sentence is not None:
                fields["content"] = found.sentence
            if found.cited.document is not None:
                start, end = found.span or (0, len(found.cited.source.text))
                offset = found.cited.offset
                place = {"index": found.cited.document, "start_index": offset + start, "end_index": offset + end}
                fields["document"] = place
            annotations.append({"type": "url_citation", "url_citation": fields})
        return annotations

    def in_response(self, text: str) -> list[Json]:
        """OpenAI's `annotations` of an output text. A citation of a file has its place in the answer in `index`."""
        annotations: list[Json] = []
        for found in self._find(text):
            fields = _url_fields(found)
            if found.cited.is_file:
                name = file_name(found.cited.source)
                place = {"file_id": fields.pop("url"), "filename": name, "index": found.citation.end}
                annotations.append({"type": "file_citation", **place, **fields})
            else:
                annotations.append({"type": "url_citation", **fields})
        return annotations

    def in_message(self, text: str) -> list[Json]:
        """Anthropic's `citations` of a text block; the offsets of the statement are an addition of ours."""
        return [
            {
                "type": "web_search_result_location",
                "url": found.cited.source.url,
                "title": found.cited.source.title or None,
                "encrypted_index": base64.b64encode(str(found.citation.number).encode()).decode(),
                "cited_text": found.sentence or "",
                "start_index": found.citation.start,
                "end_index": found.citation.end,
            }
            for found in self._find(text)
        ]

    def _find(self, text: str) -> list[_Found]:
        found = []
        for citation in find_citations(text, self._cited)[:MAX_ANNOTATIONS]:
            number = citation.number
            if number not in self._supports:
                self._supports[number] = Support(self._cited[number].source.text)
            span = self._supports[number].span(text[citation.start : citation.end])
            found.append(_Found(citation, self._cited[number], span))
        return found


def file_name(source: Source) -> str:
    """The last part of a local document's address."""
    return unquote(PurePosixPath(source.url.rpartition(":")[2]).name) or source.title


def _url_fields(found: _Found) -> Json:
    source = found.cited.source
    return {
        "start_index": found.citation.start,
        "end_index": found.citation.end,
        "title": source.title or f"Source {source.number}",
        "url": source.url,
    }
