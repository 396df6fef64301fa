"""Strings as terminals: in JSON's quotes, or in either of Python's, with every character a form that reads back."""

from collections.abc import Collection
from functools import lru_cache

from lfm.chat.schema_chars import ANY_RANGES, Ranges, difference, intersection
from lfm.chat.schema_nodes import PLAIN_TEXT, Text
from lfm.chat.schema_regex import Chars, Choice, Concat, Regex, min_length

HEX = "[0-9a-fA-F]"
# \uXXXX for any character but half of a surrogate pair, and both halves together.
UNICODE_ESCAPE = rf"u(?:[0-9a-cA-CefEF]{HEX}{{3}}|[dD](?:[0-7]{HEX}{{2}}|[89abAB]{HEX}{{2}}\\u[dD][c-fC-F]{HEX}{{2}}))"
JSON_CHAR = rf'(?:[^"\\\x00-\x1F]|\\(?:["\\\/bfnrt]|{UNICODE_ESCAPE}))'
PYTHON_ESCAPE = rf"""\\(?:["'\\bfnrt]|x{HEX}{{2}}|{UNICODE_ESCAPE})"""
PYTHON_CHAR = {
    '"': rf'(?:[^"\\\x00-\x1F]|{PYTHON_ESCAPE})',
    "'": rf"(?:[^'\\\x00-\x1F]|{PYTHON_ESCAPE})",
}
JSON_STRING = f'/"{JSON_CHAR}*"/'
PYTHON_STRING = " | ".join(f"/{quote}{char}*{quote}/" for quote, char in PYTHON_CHAR.items())

_CONTROLS: Ranges = ((0x00, 0x1F),)
_SHORT_ESCAPES = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r"}


def string_source(node: Text, *, is_json: bool, excluded: Collection[str] = (), avoided: Collection[Regex] = ()) -> str:
    """The terminal of a string in quotes. Texts of `excluded` and those that match `avoided` cannot be spelled."""
    if node == PLAIN_TEXT and not excluded and not avoided:
        return JSON_STRING if is_json else PYTHON_STRING
    quotes = '"' if is_json else "\"'"
    return " | ".join(_quoted(node, quote, is_json=is_json, excluded=excluded, avoided=avoided) for quote in quotes)


def _quoted(node: Text, quote: str, *, is_json: bool, excluded: Collection[str], avoided: Collection[Regex]) -> str:
    if node.choices is not None:
        texts = "|".join(encoded_text(text, quote) for text in node.choices)
        parts = [f"/{quote}{f'(?:{texts})' if len(node.choices) > 1 else texts}{quote}/"]
    else:
        parts = _free_parts(node, quote, is_json=is_json, is_canonical=bool(excluded or avoided))
    if excluded:
        parts.append(f"~/{quote}(?:{'|'.join(encoded_text(text, quote) for text in excluded)}){quote}/")
    parts += [f"~/{quote}{regex_source(pattern, quote)}{quote}/" for pattern in avoided]
    return " & ".join(parts)


def _free_parts(node: Text, quote: str, *, is_json: bool, is_canonical: bool) -> list[str]:
    parts = [f"/{quote}{regex_source(pattern, quote)}{quote}/" for pattern in node.patterns]
    shortest = max((min_length(pattern) or 0 for pattern in node.patterns), default=0)
    if not parts or node.min_length > shortest or node.max_length is not None:
        # Where some texts must not be spelled, every text must have one spelling only.
        char = encoded_ranges(ANY_RANGES, quote) if is_canonical else JSON_CHAR if is_json else PYTHON_CHAR[quote]
        parts.append(f"/{quote}{char}{counted(node.min_length, node.max_length)}{quote}/")
    return parts


def counted(low: int, high: int | None) -> str:
    """The repetition of a regular expression."""
    if high is None:
        return {0: "*", 1: "+"}.get(low, f"{{{low},}}")
    return {(0, 1): "?", (1, 1): ""}.get((low, high), f"{{{low},{high}}}")


def regex_source(regex: Regex, quote: str) -> str:
    """A pattern as the library writes it; with a quote, over the escaped characters of a string in those quotes."""
    if isinstance(regex, Chars):
        return encoded_ranges(regex.ranges, quote)
    if isinstance(regex, Concat):
        return "".join(regex_source(part, quote) for part in regex.parts)
    if isinstance(regex, Choice):
        return f"(?:{'|'.join(regex_source(option, quote) for option in regex.options)})"
    body = regex_source(regex.body, quote)
    is_atom = isinstance(regex.body, Chars | Choice)
    return f"{body if is_atom else f'(?:{body})'}{counted(regex.low, regex.high)}"


@lru_cache(maxsize=1024)
def encoded_ranges(ranges: Ranges, quote: str) -> str:
    """One character of a set; with a quote, in the one escaped form that it has in a string in those quotes."""
    if not quote:
        return _class(ranges)
    special: Ranges = tuple(sorted([*_CONTROLS, (ord(quote), ord(quote)), (0x5C, 0x5C)]))
    raw = difference(ranges, special)
    options = [_class(raw)] if raw else []
    escaped = [code for low, high in intersection(ranges, special) for code in range(low, high + 1)]
    simple = "".join(_SHORT_ESCAPES.get(code) or f"\\{chr(code)}" for code in escaped if _is_short(code))
    if simple:
        options.append(rf"\\[{simple}]")
    codes = [f"{code:02x}" for code in escaped if not _is_short(code)]
    if codes:
        options.append(rf"\\u00(?:{'|'.join(codes)})")
    return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"


def _is_short(code: int) -> bool:
    return code in _SHORT_ESCAPES or code > 0x1F


def _class(ranges: Ranges) -> str:
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _char(ranges[0][0])
    return f"[{''.join(_char(low) if low == high else f'{_char(low)}-{_char(high)}' for low, high in ranges)}]"


@lru_cache(maxsize=1024)
def _char(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\x{{{code:X}}}"


@lru_cache(maxsize=8192)
def encoded_text(text: str, quote: str) -> str:
    """A text as the source of a regular expression, escaped as in a string in those quotes."""
    return "".join(
        char if char.isascii() and char.isalnum() else encoded_ranges(((ord(char), ord(char)),), quote) for char in text
    )


def quoted_text(text: str, quote: str) -> str:
    """A text as a string in those quotes, in its one canonical form."""
    if not text.isidentifier():  # what needs no escapes, as most names
        text = "".join([_written(ord(char), quote) for char in text])
    return f"{quote}{text}{quote}"


def _written(code: int, quote: str) -> str:
    if code in _SHORT_ESCAPES:
        return f"\\{_SHORT_ESCAPES[code]}"
    if code <= 0x1F:
        return f"\\u{code:04x}"
    return f"\\{chr(code)}" if chr(code) in (quote, "\\") else chr(code)
