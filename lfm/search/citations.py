"""Finds in an answer what it cites, and in a source what supports it.

The model names sources by number in square brackets. Offsets are in characters (code points), as OpenAI's annotations
have them.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from lfm.search.ranking import Bm25
from lfm.search.sentences import sentence_spans

MAX_NUMBER = 9_999  # of a source: more digits in brackets are something else
_NUMBERS = r"\d{1,4}(?:\s{0,2}[,;]\s{0,2}\d{1,4}){0,20}"
_MARK = rf"\[(?:[Ss]ources?\s)?{_NUMBERS}\](?![(:])"
_MARKS = re.compile(rf"{_MARK}(?:\s{{0,2}}{_MARK}){{0,20}}")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Citation:
    """An answer's statement [start, end) and the source that it names for it, at the mark [mark_start, mark_end).

    The mark is outside of the statement, right behind it. One statement with several sources has several citations.
    """

    number: int
    start: int
    end: int
    mark_start: int
    mark_end: int


def find_citations(answer: str, numbers: Collection[int]) -> list[Citation]:
    """The citations of the sources of these numbers, in order. Other numbers in brackets, and code, are left alone.

    A statement begins where its sentence does, or behind the mark before it in the same sentence.
    """
    code = [match.span() for match in _CODE.finditer(answer)]
    sentences = sentence_spans(answer)
    citations: list[Citation] = []
    last_end, at = 0, 0
    for marks in _MARKS.finditer(answer):
        cited = [number for number in _numbers_in(marks[0]) if number in numbers]
        if not cited or any(start <= marks.start() < end for start, end in code):
            continue
        end = marks.start()
        while end > last_end and answer[end - 1].isspace():
            end -= 1
        while sentences[at][1] < end:
            at += 1
        start = max(sentences[at][0], last_end)
        while start < end and answer[start].isspace():
            start += 1
        citations += [Citation(number, min(start, end), end, marks.start(), marks.end()) for number in cited]
        last_end = marks.end()
    return citations


def supporting_span(statement: str, text: str) -> tuple[int, int] | None:
    """The sentence of a source's text that shares most with a statement, as offsets; None if none shares a word."""
    return Support(text).span(statement)


class Support:
    """A source's text that several statements cite: it is read once."""

    def __init__(self, text: str) -> None:
        self._spans = [
            (start, start + len(text[start:end].rstrip()))
            for start, end in sentence_spans(text)
            if text[start:end].strip()
        ]
        self._ranking = Bm25([text[start:end] for start, end in self._spans])

    def span(self, statement: str) -> tuple[int, int] | None:
        """The sentence that shares most with the statement, as offsets; None if none shares a word."""
        scores = self._ranking.scores(statement)
        return self._spans[max(range(len(scores)), key=scores.__getitem__)] if any(scores) else None


def _numbers_in(marks: str) -> list[int]:
    """The numbers of adjacent marks, each once."""
    return list(dict.fromkeys(int(number) for number in re.findall(r"\d+", marks)))
