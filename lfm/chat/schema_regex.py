"""Regular expressions of a JSON Schema: our own reading of them, as plain trees over sets of characters.

The dialect is the part of ECMA-262 that every validator reads alike; what it leaves out is refused by name, such as
look-around, back-references and flags. The language of the result is that of the whole text: "search" semantics and
anchors are resolved here. Nothing is ever matched by backtracking, so no pattern can take exponential time.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from lfm.chat.schema_chars import (
    ANY_RANGES,
    CLASSES,
    MAX_CODE_POINT,
    NEWLINES,
    CharSet,
    Ranges,
    complement,
    intersection,
    single,
    union,
)

MAX_GROUP_DEPTH = 32
MAX_PATTERN_CHARS = 4096
MAX_REPEAT = 100_000
# Characters of the pattern with every counted repetition written out. The library's lexer fails beyond such sizes.
MAX_POSITIONS = 20_000


class RegexError(ValueError):
    """The pattern cannot be used. The message names the construct and what to write instead."""


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of `ranges`."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Concat:
    parts: tuple["Regex", ...]


@dataclass(frozen=True, slots=True)
class Choice:
    options: tuple["Regex", ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`low` to `high` times `body`; `high` None: without a limit."""

    body: "Regex"
    low: int
    high: int | None


Regex = Chars | Concat | Choice | Repeat


@dataclass(frozen=True, slots=True)
class _Anchor:
    is_start: bool


_Parsed = Chars | Concat | Choice | Repeat | _Anchor

_CONTROL_ESCAPES = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D, "0": 0x00}

ANY_TEXT = Repeat(Chars(ANY_RANGES), 0, None)


@lru_cache(maxsize=256)
def parse_regex(pattern: str) -> Regex:
    """The language of all texts in which `pattern` is found. Raises RegexError for what cannot be generated from."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise RegexError(f"it has {len(pattern)} characters; at most {MAX_PATTERN_CHARS} are allowed")
    if any("\ud800" <= char <= "\udfff" for char in pattern):
        raise RegexError("it holds a lone surrogate")
    regex = _whole_text(_Parser(pattern).parse())
    if num_positions(regex) > MAX_POSITIONS:
        raise RegexError(f"its counted repetitions stand for more than {MAX_POSITIONS} characters; use smaller counts")
    if min_length(regex) is None:
        raise RegexError("no text matches it")
    return regex


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> _Parsed:
        parsed = self._choice()
        if self._at < len(self._text):
            raise RegexError(f"it has an unmatched ) at character {self._at}")
        return parsed

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise RegexError("it ends in the middle of a construct")
        self._at += 1
        return self._text[self._at - 1]

    def _choice(self) -> _Parsed:
        options = [self._concat()]
        while self._peek() == "|":
            self._at += 1
            options.append(self._concat())
        return options[0] if len(options) == 1 else Choice(tuple(options))  # type: ignore[arg-type]  # anchors go later

    def _concat(self) -> _Parsed:
        parts: list[_Parsed] = []
        while self._peek() and self._peek() not in "|)":
            part = self._quantified(self._atom())
            parts.extend(part.parts if isinstance(part, Concat) else (part,))
        return parts[0] if len(parts) == 1 else Concat(tuple(parts))  # type: ignore[arg-type]  # anchors go later

    def _atom(self) -> _Parsed:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return Chars(self._char_class())
        if char == "\\":
            return Chars(self._escape(in_class=False).for_all)
        if char == ".":
            return Chars(complement(NEWLINES))
        if char in "^$":
            return _Anchor(char == "^")
        if char in "*+?":
            raise RegexError(f"{char} at character {self._at - 1} repeats nothing")
        return Chars(((ord(char), ord(char)),))

    def _group(self) -> _Parsed:
        if self._peek() == "?":
            self._group_kind()
        self._depth += 1
        if self._depth > MAX_GROUP_DEPTH:
            raise RegexError(f"its groups are nested more than {MAX_GROUP_DEPTH} deep")
        inner = self._choice()
        self._depth -= 1
        if self._next() != ")":
            raise RegexError("a ( is not closed")
        return inner

    def _group_kind(self) -> None:
        rest = self._text[self._at :]
        if rest.startswith("?:"):
            self._at += 2
            return
        named = re.match(r"\?P?<[A-Za-z_]\w*>", rest)
        if named:
            self._at += named.end()
            return
        if rest.startswith(("?=", "?!", "?<=", "?<!")):
            raise RegexError("look-around cannot be generated from; write the pattern without it")
        raise RegexError(f"the group ({rest[:3]} is not supported; use ( ) or (?: )")

    def _quantified(self, atom: _Parsed) -> _Parsed:
        count = self._quantifier()
        if count is None:
            return atom
        if _has_anchor(atom):
            raise RegexError("an anchor cannot be repeated")
        if self._quantifier() is not None:
            raise RegexError("two repetitions follow each other; use a group")
        return _repeated(atom, *count)

    def _quantifier(self) -> tuple[int, int | None] | None:
        char = self._peek()
        if char and char in "*+?":
            self._at += 1
            count: tuple[int, int | None] = {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        elif match := re.compile(r"\{(\d+)(,?)(\d*)\}").match(self._text, self._at):
            self._at = match.end()
            low, high = int(match[1]), int(match[3]) if match[3] else None
            count = (low, high if match[2] else low)
        elif self._text.startswith("{,", self._at):
            raise RegexError("{, has two meanings in two dialects; write {0,")
        else:
            return None
        if self._peek() == "?":
            self._at += 1  # a lazy repetition is the same language
        elif self._peek() == "+":
            raise RegexError("possessive repetition is not supported")
        if max(count[0], count[1] or 0) > MAX_REPEAT:
            raise RegexError(f"a count is above {MAX_REPEAT}")
        if count[1] is not None and count[1] < count[0]:
            raise RegexError(f"the counts {{{count[0]},{count[1]}}} contradict each other")
        return count

    def _char_class(self) -> Ranges:
        is_inverted = self._peek() == "^"
        self._at += is_inverted
        if self._peek() == "]":
            raise RegexError("an empty class [] has two meanings in two dialects")
        sets: list[CharSet] = []
        while (char := self._next()) != "]":
            first = self._class_item(char)
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                first = _class_range(first, self._class_item(self._next()))
            sets.append(first)
        joined = CharSet(union(*(one.for_all for one in sets)), union(*(one.for_some for one in sets)))
        return joined.inverted().for_all if is_inverted else intersection(joined.for_all, ANY_RANGES)

    def _class_item(self, char: str) -> CharSet:
        if char == "\\":
            return self._escape(in_class=True)
        if char == "[" and self._peek() in (":", "=", "."):
            raise RegexError("POSIX classes are not supported; write the characters")
        return single(ord(char))

    def _escape(self, *, in_class: bool) -> CharSet:
        char = self._next()
        if char.lower() in CLASSES:
            found = CLASSES[char.lower()]
            return found.inverted() if char.isupper() else found
        if char in _CONTROL_ESCAPES and not (char == "0" and self._peek().isdigit()):
            return single(_CONTROL_ESCAPES[char])
        if char in "xu":
            return single(self._code_point(char))
        if char == "c" and re.match("[A-Za-z]", self._peek()):
            return single(ord(self._next()) % 32)
        if char == "b" and in_class:
            return single(0x08)
        if char.isalnum():
            raise RegexError(f"\\{char} is not supported")
        return single(ord(char))

    def _code_point(self, kind: str) -> int:
        match = re.compile(r"\{([0-9a-fA-F]{1,6})\}|([0-9a-fA-F]{4})" if kind == "u" else r"()([0-9a-fA-F]{2})").match(
            self._text, self._at
        )
        if match is None:
            raise RegexError(f"\\{kind} is not followed by its hexadecimal digits")
        self._at = match.end()
        value = int(match[1] or match[2], 16)
        if 0xD800 <= value <= 0xDBFF and (
            low := re.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})").match(self._text, self._at)
        ):
            self._at = low.end()
            return 0x10000 + (value - 0xD800) * 0x400 + int(low[1], 16) - 0xDC00
        if 0xD800 <= value <= 0xDFFF or value > MAX_CODE_POINT:
            raise RegexError(f"\\{kind} names U+{value:04X}, which is no character")
        return value


def _class_range(first: CharSet, last: CharSet) -> CharSet:
    (low, other), (high, another) = first.for_some[0], last.for_some[-1]
    if low != other or high != another or len(first.for_some) > 1 or len(last.for_some) > 1:
        raise RegexError("a class like \\d cannot be the end of a range")
    if high < low:
        raise RegexError(f"the range U+{low:04X}-U+{high:04X} is the wrong way round")
    return CharSet(((low, high),), ((low, high),))


def _repeated(body: _Parsed, low: int, high: int | None) -> _Parsed:
    """`body` repeated. Nested repetitions that mean one become one: (a+)+ is a+."""
    assert not isinstance(body, _Anchor)
    if (low, high) == (1, 1):
        return body
    if isinstance(body, Repeat) and body.low <= 1 and (body.high is None or body.high >= 1):
        if body.high is None or high is None:
            return Repeat(body.body, body.low * low, 0 if high == 0 else None)
        return Repeat(body.body, body.low * low, body.high * high)
    return Repeat(body, low, high)


def _has_anchor(node: _Parsed) -> bool:
    if isinstance(node, Concat):
        return any(map(_has_anchor, node.parts))
    if isinstance(node, Choice):
        return any(map(_has_anchor, node.options))
    return isinstance(node, _Anchor)


def _whole_text(node: _Parsed) -> Regex:
    """Resolve anchors at the ends: where there is none, any text may stand before or after."""
    if isinstance(node, Choice):
        return Choice(tuple(map(_whole_text, node.options)))
    parts: list[_Parsed] = list(node.parts) if isinstance(node, Concat) else [node]
    is_open_before = is_open_after = True
    while parts and isinstance(parts[0], _Anchor) and parts[0].is_start:
        is_open_before = False
        del parts[0]
    while parts and isinstance(parts[-1], _Anchor) and not parts[-1].is_start:
        is_open_after = False
        del parts[-1]
    for end in (0, -1):
        if parts and isinstance(parts[end], Choice) and _has_anchor(parts[end]):
            return _distributed(parts, end, is_open_before=is_open_before, is_open_after=is_open_after)
    if any(map(_has_anchor, parts)):
        raise RegexError("^ and $ are supported at the ends of the pattern and of its alternatives only")
    before, after = (ANY_TEXT,) * is_open_before, (ANY_TEXT,) * is_open_after
    return Concat((*before, *parts, *after))  # type: ignore[arg-type]  # no anchor is left


def _distributed(parts: list[_Parsed], end: int, *, is_open_before: bool, is_open_after: bool) -> Regex:
    """Alternatives with anchors, written out: (^a|b)c is ^ac|bc."""
    group = parts[end]
    assert isinstance(group, Choice)
    before = () if is_open_before else (_Anchor(True),)
    after = () if is_open_after else (_Anchor(False),)
    options = []
    for option in group.options:
        inner = option.parts if isinstance(option, Concat) else (option,)
        whole = (*inner, *parts[1:]) if end == 0 else (*parts[:-1], *inner)
        options.append(_whole_text(Concat((*before, *whole, *after))))  # type: ignore[arg-type]  # resolved right here
    return Choice(tuple(options))


def min_length(regex: Regex) -> int | None:
    """Characters of the shortest text; None if there is none."""
    if isinstance(regex, Chars):
        return 1 if regex.ranges else None
    if isinstance(regex, Choice):
        return min((n for n in map(min_length, regex.options) if n is not None), default=None)
    if isinstance(regex, Repeat):
        shortest = min_length(regex.body)
        return (shortest or 0) * regex.low if shortest is not None or regex.low == 0 else None
    lengths = list(map(min_length, regex.parts))
    return None if None in lengths else sum(n for n in lengths if n is not None)


def num_positions(regex: Regex) -> int:
    """Characters with counted repetitions written out; a repeated single character counts once per possible repeat."""
    if isinstance(regex, Chars):
        return 1
    if isinstance(regex, Repeat):
        return num_positions(regex.body) * max(1, regex.low, regex.high or 0)
    return sum(map(num_positions, regex.options if isinstance(regex, Choice) else regex.parts))
