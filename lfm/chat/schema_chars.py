"""Sets of characters, as ranges of code points, and what the class escapes of regular expressions stand for.

Dialects differ (is a Cyrillic letter a \\w?), so a class is two sets: what all of them accept, and what some of them
do. Generated text keeps to the first, also where a class is negated.
"""

from dataclasses import dataclass

Range = tuple[int, int]  # code points, both ends included
Ranges = tuple[Range, ...]  # sorted, disjoint, not adjacent

MAX_CODE_POINT = 0x10FFFF
SURROGATES: Ranges = ((0xD800, 0xDFFF),)  # no UTF-8 can express these


def union(*sets: Ranges) -> Ranges:
    """The code points of any of the sets."""
    merged: list[Range] = []
    for low, high in sorted(item for ranges in sets for item in ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def intersection(left: Ranges, right: Ranges) -> Ranges:
    """The code points in both sets."""
    found = []
    i = j = 0
    while i < len(left) and j < len(right):
        low, high = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if low <= high:
            found.append((low, high))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def complement(ranges: Ranges) -> Ranges:
    """Every code point that is not in the set, surrogates never: no UTF-8 can express those."""
    found, start = [], 0
    for low, high in union(ranges, SURROGATES):
        if start < low:
            found.append((start, low - 1))
        start = high + 1
    if start <= MAX_CODE_POINT:
        found.append((start, MAX_CODE_POINT))
    return tuple(found)


def difference(left: Ranges, right: Ranges) -> Ranges:
    return intersection(left, complement(right))


ANY_RANGES = complement(())

# For each class escape the characters that every dialect takes for members, and those that some dialect does.
_DIGITS: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = ((0x09, 0x0D), (0x20, 0x20))
_ASCII: Ranges = ((0x00, 0x7F),)
# Outside ASCII only this punctuation is no word character for anybody: the rest may be a letter or a number to Python.
_PLAIN_PUNCTUATION: Ranges = ((0x2010, 0x2027), (0x2030, 0x205E))
_WORD_FOR_SOME = union(_WORD, difference(complement(_ASCII), _PLAIN_PUNCTUATION))
_SPACE_FOR_SOME: Ranges = (
    (0x09, 0x0D),
    (0x1C, 0x20),
    (0x85, 0x85),
    (0xA0, 0xA0),
    (0x1680, 0x1680),
    (0x180E, 0x180E),
    (0x2000, 0x200A),
    (0x2028, 0x2029),
    (0x202F, 0x202F),
    (0x205F, 0x205F),
    (0x3000, 0x3000),
    (0xFEFF, 0xFEFF),
)
# Decimal digits of other scripts lie above U+0660; below, \D is safe. CJK and Hangul have none either.
_DIGIT_FOR_SOME = union(_DIGITS, ((0x660, 0x2FFF), (0xA000, 0xABFF), (0xD7A4, MAX_CODE_POINT)))
NEWLINES: Ranges = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))


@dataclass(frozen=True, slots=True)
class CharSet:
    """Characters that are members for every dialect, and for some dialect."""

    for_all: Ranges
    for_some: Ranges

    def inverted(self) -> "CharSet":
        return CharSet(complement(self.for_some), complement(self.for_all))


CLASSES = {
    "d": CharSet(_DIGITS, _DIGIT_FOR_SOME),
    "w": CharSet(_WORD, _WORD_FOR_SOME),
    "s": CharSet(_SPACE, _SPACE_FOR_SOME),
}


def single(code_point: int) -> CharSet:
    """One character, the same for every dialect."""
    ranges = ((code_point, code_point),)
    return CharSet(ranges, ranges)
