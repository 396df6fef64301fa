"""Endings that follow from what stands beside them: Korean particles, the French elision, Arabic counted nouns.

A template writes both forms, `{first/second}`, and `agree` keeps one:

- Korean, by the syllable before: `{은/는}`, the first form after a final consonant. `{으로/로}` knows final l.
- French, by the letter behind: `{de/d'}`, with its space or apostrophe, the second form before a vowel.
- Arabic, by the number before: `{ليال/ليلة}`, the first form from three to ten.
"""

import re
import unicodedata

_MARK = re.compile(r"\{([^{}/\"\n]+)/([^{}/\"\n]*)\}")
_FIRST_HANGUL, _LAST_HANGUL, _FINALS = 0xAC00, 0xD7A3, 28
_FINAL_L = 8
_DIGITS_WITH_FINAL, _DIGITS_WITH_L = "013678", "178"  # as Korean reads them
_LETTERS_WITH_FINAL, _LETTERS_WITH_L = "lmnr", "lr"  # by their Korean names
_FEW = range(3, 11)
_FRENCH = "de"


def agree(text: str) -> str:
    """`text` with one form of every mark. Marks are decided from the left, each by the text around it."""
    if "/" not in text or "{" not in text:
        return text
    return _MARK.sub(lambda match: _choose(match, text), text)


def _choose(match: re.Match[str], text: str) -> str:
    first, second = match.groups()
    if first == _FRENCH:
        return second if _is_vowel(text[match.end() : match.end() + 1]) else f"{first} "
    before = text[: match.start()]
    if "\u0600" <= first[0] <= "\u06ff":
        number = re.search(r"(\d+)\s*$", before)
        return first if number and int(number[1]) in _FEW else second
    has_final, is_l = _korean_final(before)
    return first if has_final and not (is_l and (first, second) == ("으로", "로")) else second


def _is_vowel(letter: str) -> bool:
    return unicodedata.normalize("NFD", letter)[:1].casefold() in tuple("aeiouœ")


def _korean_final(before: str) -> tuple[bool, bool]:
    """Whether what stands before ends in a consonant when it is read aloud, and whether that is an l."""
    last = next((char for char in reversed(before) if char.isalnum()), "")
    if last and _FIRST_HANGUL <= ord(last) <= _LAST_HANGUL:
        final = (ord(last) - _FIRST_HANGUL) % _FINALS
        return final != 0, final == _FINAL_L
    if last.isdigit():
        return last in _DIGITS_WITH_FINAL, last in _DIGITS_WITH_L
    return last.casefold() in tuple(_LETTERS_WITH_FINAL), last.casefold() in tuple(_LETTERS_WITH_L)
