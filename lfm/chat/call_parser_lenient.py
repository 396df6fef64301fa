"""A whole block of tool calls from a model that no grammar held: whatever can be read for certain, the rest as text.

The slips are those that were observed: raw newlines in strings, quotes inside quotes, `07`, tuples, `**{...}`,
f-strings, keyword arguments that are Python keywords, a missing bracket. Own recursive descent; nothing is ever
evaluated. What has two readings, or none, stays text: one bad call does not take its siblings along.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lfm.chat.call_parser_stream import HEX_DIGITS, MAX_DEPTH, REPLACEMENT, SIMPLE_ESCAPES

NAME = re.compile(r"[A-Za-z0-9_.-]+")
KEYWORD = re.compile(r"[\w$@.-]+")
SPACE = re.compile(r"\s*")
STRING_START = re.compile(r"([A-Za-z]{0,2})('''|\"\"\"|'|\")")
NUMBER = re.compile(
    r"([+-]?)\s*(0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|(?:[0-9][0-9_]*)?\.?[0-9_]*(?:[eE][+-]?[0-9]+)?)([jJ]?)"
)
WORD = re.compile(r"[A-Za-z_]\w*")
CLOSING_QUOTE = re.compile(r"""['"](?=\s*[,)\]}:])""")
WORDS: dict[str, object] = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
MORE_ESCAPES = {"a": "\a", "v": "\v", "\n": ""}
MAX_REQUOTINGS = 400  # attempts for one block
MAX_REQUOTED_CHARS = 8192
MAX_INTEGER_DIGITS = 400


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One call; `arguments` is a JSON object as text."""

    name: str
    arguments: str


class _ParseError(Exception):
    """The text cannot be read here."""


def parse_block(text: str) -> list[ParsedCall | str]:
    """The calls of a block, in order, with the text of what is no call between them. Never raises."""
    text = text.strip()
    body = text.removeprefix("[").strip() if text.startswith("[") else text
    if not body or body == "]":
        return []
    try:
        return _parse_json(text) if body.startswith("{") else _parse_pythonic(body)
    except (_ParseError, RecursionError):
        return [text]


# -- JSON form ---------------------------------------------------------------------------------------------------------


def _parse_json(text: str) -> list[ParsedCall | str]:
    decoder = json.JSONDecoder(strict=False)
    try:
        value, end = decoder.raw_decode(text)
    except ValueError:
        return [text]
    if text[end:].strip():
        return [text]
    items = value if isinstance(value, list) else [value]
    return [_json_call(item) or json.dumps(item, ensure_ascii=False) for item in items]


def _json_call(item: object) -> ParsedCall | None:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not NAME.fullmatch(item["name"]):
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, strict=False)
        except ValueError:
            return None
    return ParsedCall(item["name"], _to_json(arguments)) if isinstance(arguments, dict) else None


# -- Pythonic form -----------------------------------------------------------------------------------------------------


def _parse_pythonic(body: str) -> list[ParsedCall | str]:
    found: list[ParsedCall | str] = []
    at = 0
    attempts = iter(range(MAX_REQUOTINGS))
    while at < len(body):
        call, end = _parse_call(body, at, attempts)
        found.append(body[at:end].strip() if call is None else call)
        at = _after_separator(body, end)
    return found


def _after_separator(body: str, at: int) -> int:
    at = _skip(body, at)
    for char in ",]":
        if body[at : at + 1] == char:
            at = _skip(body, at + 1)
    return at


def _parse_call(body: str, at: int, attempts: Iterator[int]) -> tuple[ParsedCall | None, int]:
    """The call that begins here and where it ends; None with the end of what cannot be read."""
    reader = _Reader(body)
    try:
        return reader.call(at)
    except _ParseError:
        pass
    requoted = _requoted(body, at, reader.strings, attempts)
    return requoted if requoted is not None else (None, _end_of_broken(body, at))


def _requoted(
    body: str, at: int, strings: Sequence[tuple[int, int]], attempts: Iterator[int]
) -> tuple[ParsedCall, int] | None:
    """The call with one of its strings ending at a later quote, if exactly one way of doing so can be read."""
    found: dict[ParsedCall, int] = {}
    ends = [match.start() for match in CLOSING_QUOTE.finditer(body, at, at + MAX_REQUOTED_CHARS)]
    for start, content in strings:
        for end in ends:
            if end < content or body[end] != body[content - 1]:
                continue
            if next(attempts, None) is None:
                return None
            try:
                call, call_end = _Reader(body, ends={start: end}).call(at)
            except _ParseError:
                continue
            found[call] = call_end
            if len(found) > 1:
                return None
    return next(iter(found.items()), None)


def _end_of_broken(body: str, at: int) -> int:
    """Where the call that cannot be read probably ends: at the parenthesis that closes its first one. After `at`."""
    depth, quote = 0, ""
    for index in range(at, len(body)):
        char = body[index]
        if quote:
            if char == quote and body[index - 1] != "\\":
                quote = ""
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth <= 0:
                return max(index + (depth == 0), at + 1)
    return len(body)


class _Reader:
    """Reads one call. `ends` says of strings, by where they start, at which quote they end.

    `strings` collects where strings start, and where their content does.
    """

    def __init__(self, text: str, *, ends: dict[int, int] | None = None) -> None:
        self.strings: list[tuple[int, int]] = []
        self._text = text
        self._ends = ends or {}
        self._depth = 0

    def call(self, at: int) -> tuple[ParsedCall, int]:
        name = NAME.match(self._text, at)
        if name is None:
            raise _ParseError
        at = self._expect("(", _skip(self._text, name.end()))
        arguments: dict[str, object] = {}
        while not self._is(")", at):
            at = self._argument(at, arguments)
            at = self._comma(at, ")")
        return ParsedCall(name[0], _to_json(arguments)), at + 1

    def _argument(self, at: int, arguments: dict[str, object]) -> int:
        if self._text.startswith("**", at):
            value, at = self._value(_skip(self._text, at + 2))
            if not isinstance(value, dict):
                raise _ParseError
            arguments.update(value)
            return at
        name = KEYWORD.match(self._text, at)
        if name is None:
            raise _ParseError
        at = self._expect("=", _skip(self._text, name.end()))  # without one it is positional: nobody knows its name
        arguments[name[0]], at = self._value(at)
        return at

    def _is(self, char: str, at: int) -> bool:
        return self._text[at : at + 1] == char

    def _expect(self, char: str, at: int) -> int:
        if not self._is(char, at):
            raise _ParseError
        return _skip(self._text, at + 1)

    def _comma(self, at: int, closing: str) -> int:
        """Past a comma, which may be missing before the closing bracket only."""
        at = _skip(self._text, at)
        return at if self._is(closing, at) else self._expect(",", at)

    def _value(self, at: int) -> tuple[object, int]:
        self._depth += 1
        if self._depth > MAX_DEPTH or at >= len(self._text):
            raise _ParseError
        value: object
        if STRING_START.match(self._text, at):
            value, at = self._strings(at)
        elif self._text[at] in "[(":
            value, at = self._items(at)
        elif self._text[at] == "{":
            value, at = self._braces(at)
        elif word := WORD.match(self._text, at):
            if word[0] not in WORDS:
                raise _ParseError
            value, at = WORDS[word[0]], word.end()
        else:
            value, at = self._number(at)
        self._depth -= 1
        return value, _skip(self._text, at)

    def _items(self, at: int) -> tuple[object, int]:
        """A list, a tuple, or a value in parentheses."""
        is_tuple = self._text[at] == "("
        closing = ")" if is_tuple else "]"
        at = _skip(self._text, at + 1)
        items: list[object] = []
        has_comma = False
        while not self._is(closing, at):
            value, at = self._value(at)
            items.append(value)
            has_comma = has_comma or self._is(",", at)
            at = self._comma(at, closing)
        return items[0] if is_tuple and len(items) == 1 and not has_comma else items, at + 1

    def _braces(self, at: int) -> tuple[object, int]:
        """A dictionary, or a set as a list."""
        at = _skip(self._text, at + 1)
        items: list[object] = []
        members: dict[str, object] = {}
        while not self._is("}", at):
            value, at = self._value(at)
            if self._is(":", at):
                members[_member_name(value)], at = self._value(_skip(self._text, at + 1))
            else:
                items.append(value)
            at = self._comma(at, "}")
        if items and members:
            raise _ParseError
        return items or members, at + 1

    def _number(self, at: int) -> tuple[object, int]:
        match = NUMBER.match(self._text, at)
        if match is None or not any(char.isdigit() for char in match[2]) or match[3]:
            raise _ParseError
        digits = match[2].replace("_", "")
        if len(digits) > MAX_INTEGER_DIGITS:
            raise _ParseError
        try:
            if digits[:2].lower() in ("0x", "0o", "0b"):
                number: int | float = int(digits, 0)
            else:
                number = int(digits) if digits.isdigit() else float(digits)
        except ValueError:
            raise _ParseError from None
        if number == math.inf:
            raise _ParseError
        return -number if match[1] == "-" else number, match.end()

    def _strings(self, at: int) -> tuple[str, int]:
        """A string, or several side by side, which are one."""
        pieces = []
        while match := STRING_START.match(self._text, at):
            piece, at = self._string(match)
            pieces.append(piece)
            at = _skip(self._text, at)
        return "".join(pieces), at

    def _string(self, match: re.Match[str]) -> tuple[str, int]:
        prefix, quote = match[1].lower(), match[2]
        if prefix not in ("", "r", "u", "f", "fr", "rf"):
            raise _ParseError  # bytes are no JSON
        start, at = match.start(), match.end()
        self.strings.append((start, at))
        end = self._ends[start] if start in self._ends else self._closing_quote(at, quote)
        content = self._text[at:end]
        if "f" in prefix and ("{" in content or "}" in content):
            raise _ParseError  # only its program knows what it means
        return content if "r" in prefix else _unescaped(content), end + len(quote)

    def _closing_quote(self, at: int, quote: str) -> int:
        while at < len(self._text):
            if self._text[at] == "\\":
                at += 2
            elif self._text.startswith(quote, at):
                return at
            else:
                at += 1
        raise _ParseError


def _skip(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return match.end() if match else at


def _member_name(value: object) -> str:
    """A dictionary key as JSON has it."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    raise _ParseError


def _unescaped(content: str) -> str:
    """The text of a string literal. Escapes that neither Python nor JSON knows stay as they are."""
    return _ESCAPE.sub(_escaped_char, content)


_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|(?s:.))")


def _escaped_char(match: re.Match[str]) -> str:
    escape = match[0][1:]
    if len(escape) > 1 and escape[0] in HEX_DIGITS:
        code = int(escape[1:], 16)
        return chr(code) if code <= 0x10FFFF else REPLACEMENT
    if escape[0] in "01234567":
        return chr(int(escape, 8))
    return SIMPLE_ESCAPES.get(escape, MORE_ESCAPES.get(escape, match[0]))


def _to_json(value: object) -> str:
    """JSON text without lone surrogates: halves that belong together are joined, others replaced."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
