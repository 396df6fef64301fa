"""A document's text cut into the pieces that are indexed, found and cited.

Chunks are whole sentences, join to the whole text, and never run across a heading or a page, so that each has one
place to cite. The work is linear in the text, whatever it is.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lfm.search.analyser import UNSPACED
from lfm.search.extracted import Extracted
from lfm.search.sentences import sentence_spans

VERSION = 1  # of the way documents are cut: a document that was cut another way is indexed again

TARGET_TOKENS = 256  # five of them are some 1,300 tokens of a prompt
_TOKENS_PER_CHAR, _TOKENS_PER_UNSPACED_CHAR = 0.25, 0.75
_MAX_PIECE_CHARS = int(TARGET_TOKENS / _TOKENS_PER_CHAR)
_MAX_HEADING_CHARS = 200

_UNSPACED_CHAR = re.compile(f"[{UNSPACED}]")
_HEADING = re.compile(r"(#{1,6})[ \t]+(.*)")
_FENCE = re.compile(r"[ \t]{0,3}(```|~~~)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece [start, end) of a document's text, in characters. `heading` is the path to it, "Install > Linux"."""

    start: int
    end: int
    text: str
    heading: str = ""
    page: int | None = None  # from 1


@dataclass(frozen=True, slots=True)
class _Section:
    """A part of the text that no chunk runs across, from `start` to the start of the next."""

    start: int
    heading: str = ""
    page: int | None = None


def cut(extracted: Extracted) -> list[Chunk]:
    """The chunks of a document, in order. None for a text of white space."""
    text = extracted.text
    if not text.strip():
        return []
    sections = _sections(extracted)
    chunks: list[Chunk] = []
    for section, section_end in zip(sections, _ends(sections, text), strict=True):
        for piece_start, piece_end in _pieces(text[section.start : section_end]):
            start, end = section.start + piece_start, section.start + piece_end
            chunks.append(Chunk(start=start, end=end, text=text[start:end], heading=section.heading, page=section.page))
    return chunks


def num_tokens_estimated(text: str) -> float:
    """About how many tokens a text has, without a tokenizer: a character of an unspaced script is most of one."""
    num_unspaced = 0 if text.isascii() else len(_UNSPACED_CHAR.findall(text))
    return _TOKENS_PER_UNSPACED_CHAR * num_unspaced + _TOKENS_PER_CHAR * (len(text) - num_unspaced)


def _ends(sections: list[_Section], text: str) -> list[int]:
    return [section.start for section in sections[1:]] + [len(text)]


def _sections(extracted: Extracted) -> list[_Section]:
    """The sections that have something to say; the others (headings alone, blank pages) join the next, or the last."""
    text = extracted.text
    sections = [_Section(0)]
    if extracted.page_starts:
        sections = [_Section(start, page=page) for page, start in enumerate(extracted.page_starts, 1)]
    elif extracted.is_markdown:
        sections = list(_headed_sections(text))
    kept: list[_Section] = []
    joined_from: int | None = 0  # where the sections before this one begin that said nothing
    for section, end in zip(sections, _ends(sections, text), strict=True):
        start = section.start if joined_from is None else joined_from
        joined_from = start
        if _has_body(text[section.start : end], is_markdown=extracted.is_markdown):
            kept.append(_Section(start, section.heading, section.page))
            joined_from = None
    return kept or [_Section(0)]


def _has_body(text: str, *, is_markdown: bool) -> bool:
    return any(line.strip() and not (is_markdown and _HEADING.match(line)) for line in text.splitlines())


def _headed_sections(text: str) -> Iterator[_Section]:
    """One section for each Markdown heading outside of code, and one for what stands before the first."""
    yield _Section(0)
    path: list[tuple[int, str]] = []  # (level, heading)
    position, fence = 0, ""
    for line in text.splitlines(keepends=True):
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1] == fence:
            fence = ""
        elif not fence and (heading := _HEADING.match(line)):
            level, name = len(heading[1]), heading[2].rstrip(" \t#")[:_MAX_HEADING_CHARS]
            path = [(at, above) for at, above in path if at < level] + [(level, name)]
            yield _Section(position, " > ".join(name for _, name in path))
        position += len(line)


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Spans of whole sentences of about TARGET_TOKENS that join to `text`. White space joins what is before it."""
    body_start, body_end = len(text) - len(text.lstrip()), len(text.rstrip())
    start, size = 0, 0.0
    for sentence_start, sentence_end in _short_spans(text):
        num_tokens = num_tokens_estimated(text[sentence_start:sentence_end])
        if size + num_tokens > TARGET_TOKENS and body_start < sentence_start < body_end and sentence_start > start:
            yield start, sentence_start
            start, size = sentence_start, 0.0
        size += num_tokens
    if len(text) > start:
        yield start, len(text)


def _short_spans(text: str) -> Iterator[tuple[int, int]]:
    """Sentences; those too long for a chunk (tables, logs, data) are cut at white space, or anywhere."""
    for start, end in sentence_spans(text):
        while end - start > _MAX_PIECE_CHARS or num_tokens_estimated(text[start:end]) > TARGET_TOKENS:
            cut_at = _cut_point(text, start, end)
            yield start, cut_at
            start = cut_at
        yield start, end


def _cut_point(text: str, start: int, end: int) -> int:
    """Where to cut a sentence that is too long: at the last white space within TARGET_TOKENS of `start`, if any."""
    limit = min(end, start + _MAX_PIECE_CHARS)
    while num_tokens_estimated(text[start:limit]) > TARGET_TOKENS:
        limit -= (limit - start) // 8
    for at in range(limit, start + (limit - start) // 2, -1):
        if text[at - 1].isspace():
            return at
    return limit
