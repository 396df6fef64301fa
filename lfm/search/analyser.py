"""From text to the terms that are indexed and searched. Both sides of a search go through here, whatever the backend.

Scripts with spaces give words, case-folded, in compatibility form (NFKC), Latin and Greek without accents. Scripts
without give overlapping pairs of characters, and single characters for those who search for one: Han, Kana, Hangul
(whose words carry their particles), Thai, Lao, Burmese and Khmer. Arabic loses its vowel marks and its article, and the
forms of a letter become one, as Lucene's ArabicNormalizer has it. No stemming, no stop words.
"""

import functools
import itertools
import re
import sys
import unicodedata

VERSION = 1  # of what this file makes of a text: an index of another version is rebuilt

MAX_TERM_CHARS = 64  # longer ones are hashes and encoded data
MAX_QUERY_TERMS = 64

_HAN = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\U0001b000-\U0001b16f"
_HANGUL = "\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\uac00-\ud7ff"
_SOUTHEAST_ASIAN = "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u1000-\u109f\u1780-\u17d3"
UNSPACED = _HAN + _KANA + _HANGUL + _SOUTHEAST_ASIAN

_ASCII_WORD = re.compile(r"[a-z0-9]+")
_WRAPPED_LINE = re.compile(f"(?<=[{_HAN}{_KANA}])[ \t]*\n[ \t]*(?=[{_HAN}{_KANA}])")
_ACCENTS = re.compile("(?<=[a-z\u03b1-\u03c9])[\u0300-\u036f]+")
_ARABIC_ARTICLE = re.compile("^(?:\u0648|\u0628|\u0643|\u0641)?\u0627\u0644(?=.{3})|^\u0644\u0644(?=.{3})")
_SOFT_HYPHEN, _TATWEEL = "\u00ad", "\u0640"


def _letter_table() -> dict[int, str | None]:
    """Marks that readers leave out (Arabic vowels, Hebrew points), and the one form of each Arabic letter and digit."""
    marks = [*range(0x0610, 0x061B), *range(0x064B, 0x0660), 0x0670, *range(0x06D6, 0x06DD), *range(0x06DF, 0x06E9)]
    marks += [*range(0x06EA, 0x06EE), *range(0x0591, 0x05BE), 0x05BF, 0x05C1, 0x05C2, 0x05C4, 0x05C5, 0x05C7]
    table: dict[int, str | None] = dict.fromkeys([*marks, ord(_SOFT_HYPHEN), ord(_TATWEEL)])
    table |= dict.fromkeys(map(ord, "\u0622\u0623\u0625\u0671"), "\u0627")  # alef with madda, hamza, wasla
    table |= {0x0649: "\u064a", 0x06CC: "\u064a", 0x0629: "\u0647", 0x06A9: "\u0643"}  # yeh, heh, kaf
    for zero in (0x0660, 0x06F0):
        table |= {zero + digit: str(digit) for digit in range(10)}
    return table


_LETTERS = _letter_table()


@functools.cache
def _runs() -> re.Pattern[str]:
    """Finds runs of an unspaced script (group 1) and words: letters and digits with the marks that belong to them."""
    marks = "".join(
        chr(code)
        for code in range(0x0300, min(0x10000, sys.maxunicode))
        if unicodedata.category(chr(code)) in ("Mn", "Mc")
    )
    letter = rf"[^\W_{UNSPACED}]"
    return re.compile(rf"([{UNSPACED}]+)|{letter}(?:{letter}|[{marks}])*")


def index_terms(text: str) -> list[str]:
    """Every term of a text, in order, repeated as often as it occurs."""
    terms: list[str] = []
    for run, is_unspaced in _split(text):
        if is_unspaced:
            terms.extend(run)
            terms.extend(_pairs(run))
        else:
            terms.append(run)
    return terms


def query_terms(text: str) -> list[str]:
    """The distinct terms to look for, at most MAX_QUERY_TERMS. A single character only where it stands alone."""
    terms: dict[str, None] = {}
    for run, is_unspaced in _split(text):
        if is_unspaced and len(run) > 1:
            terms.update(dict.fromkeys(_pairs(run)))
        else:
            terms[run] = None
        if len(terms) >= MAX_QUERY_TERMS:
            break
    return list(terms)[:MAX_QUERY_TERMS]


def _split(text: str) -> list[tuple[str, bool]]:
    """Words and runs of unspaced scripts, normalised, each with whether it is such a run."""
    if text.isascii():
        return [(word[:MAX_TERM_CHARS], False) for word in _ASCII_WORD.findall(text.lower())]
    split = []
    for match in _runs().finditer(_normalise(text)):
        if match[1]:
            split.append((match[1], True))
        else:
            split.append((_ARABIC_ARTICLE.sub("", match[0])[:MAX_TERM_CHARS], False))
    return split


def _normalise(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_LETTERS)
    without_accents = _ACCENTS.sub("", unicodedata.normalize("NFD", folded))
    return _WRAPPED_LINE.sub("", unicodedata.normalize("NFKC", without_accents))


def _pairs(run: str) -> list[str]:
    return [first + second for first, second in itertools.pairwise(run)]
