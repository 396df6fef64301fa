"""Where the sentences of a text begin and end, in any script, well enough for passages that do not stop midway.

Known weaknesses: an abbreviation outside the list ends a sentence, and one that does end a sentence does not.
"""

import re

_WESTERN = ("e.g", "i.e", "etc", "vs", "cf", "al", "dr", "mr", "mrs", "ms", "prof", "nos", "fig", "figs", "eq", "sec")
_MORE_WESTERN = ("vol", "pp", "ed", "eds", "inc", "ltd", "jr", "sr", "approx", "z.b", "bzw", "usw", "d.h", "nr", "mme")
_ABBREVIATIONS = frozenset({*_WESTERN, *_MORE_WESTERN})
_UNSURE = (".", "...", "\u2026")  # these may stand inside a sentence too
# A mark that ends a sentence by itself (full-width, Arabic, Urdu, Devanagari); or one of the West with the quotes and
# brackets that close after it and then white space; or a blank line; or a line that begins a list item or a heading.
_END = re.compile(
    "[\u3002\uff01\uff1f\uff61\u061f\u06d4\u0964\u0965]++[\u300d\u300f\u3011\uff09\u201d\u2019\"')\\]]*\\s*"
    "|(?<![.!?\u2026])(?P<western>[.!?\u2026]++)[\"'\u201d\u2019\u00bb)\\]*_]*+\\s++"
    "|\n[ \t]*\n\\s*"
    "|\n+(?=[ \t]*(?:[-*+\u2022]|\\d{1,3}[.)]|\\#{1,6})[ \t]|[ \t]*[|>])"
)
_LAST_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|\.(?=[^\W\d_]))*$")
_MAX_WORD_CHARS = 24


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Offsets (start, end) of the sentences of `text`, white space after a sentence included: they join to the text."""
    spans = []
    start = 0
    for match in _END.finditer(text):
        if match["western"] in _UNSURE and _continues(text, match.start(), match.end()):
            continue
        if match.end() > start:
            spans.append((start, match.end()))
            start = match.end()
    if start < len(text):
        spans.append((start, len(text)))
    return spans


def _continues(text: str, dot: int, following: int) -> bool:
    """Whether the sentence goes on after dots: an abbreviation or initial before them, or a small letter behind."""
    if "\n\n" in text[dot:following]:
        return False
    if following < len(text) and text[following].islower():
        return True
    word = _LAST_WORD.search(text, max(0, dot - _MAX_WORD_CHARS), dot)
    if word is None:
        return False
    return word[0].lower() in _ABBREVIATIONS or (len(word[0]) == 1 and word[0].isupper())
