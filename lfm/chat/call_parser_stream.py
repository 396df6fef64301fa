"""A block of tool calls as it is written, character by character: calls in either form to names and JSON arguments.

This reads what the grammar guarantees, and passes every piece of an argument on as soon as it is certain; it is the
same for every way of cutting the text. What deviates ends it (`is_broken`). Nothing is ever evaluated.

    [f(city="Bern", days=[1, 2])]                          as LFM2 was trained
    [{"name": "f", "arguments": {"city": "Bern"}}]         on request
"""

import json
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass

WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
SIMPLE_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "\\": "\\", '"': '"', "'": "'", "/": "/"}
HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
REPLACEMENT = "\ufffd"
SPACE = " \t\r\n"
PLAIN_RUN = re.compile(r"""[^"'\\\x00-\x1f\ud800-\udfff]+""")  # the same in a string of any kind
MAX_DEPTH = 100
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")

Reading = Generator[None, str, str]  # takes a character at a time, and returns the first one that is not its own


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of one call: `arguments` pieces of one index, joined, are a JSON object. The first has the `name`."""

    index: int
    id: str
    name: str | None
    arguments: str


class _BrokenError(Exception):
    """The text is no block of calls."""


class CallStream:
    """Reads one block, from its opening bracket on.

    Args:
        make_id: makes the id of each call.
        first_index: the index of the block's first call.
    """

    def __init__(self, *, make_id: Callable[[], str], first_index: int = 0) -> None:
        self.is_broken = False
        self.is_complete = False
        self.num_calls = 0
        self._make_id = make_id
        self.first_index = first_index
        self._id = ""
        self._name: str | None = None
        self._pieces: list[str] = []
        self._deltas: list[CallDelta] = []
        self._depth = 0
        self._is_plain = False  # within a string, and nothing is pending: most characters stand for themselves
        self._reading = self._block()
        next(self._reading)

    def push(self, text: str) -> list[CallDelta]:
        """The deltas that this further text makes certain: at most one for each call that it touches."""
        at = 0
        while at < len(text) and not self.is_broken:
            if self._is_plain and (run := PLAIN_RUN.match(text, at)):
                self._emit(run[0])
                at = run.end()
                continue
            try:
                self._reading.send(text[at])
            except (_BrokenError, StopIteration):
                self.is_broken = True
            at += 1
        self._flush()
        deltas, self._deltas = self._deltas, []
        return deltas

    def _flush(self) -> None:
        if self._pieces or self._name is not None:
            index = self.first_index + self.num_calls - 1
            self._deltas.append(CallDelta(index, self._id, self._name, "".join(self._pieces)))
            self._pieces, self._name = [], None

    def _begin_call(self, name: str) -> None:
        self._flush()
        self.num_calls += 1
        self._id, self._name = self._make_id(), name

    def _emit(self, text: str) -> None:
        self._pieces.append(text)

    # -- the block -----------------------------------------------------------------------------------------------------

    def _block(self) -> Reading:
        _expect((yield from _next()), "[")
        while True:
            char = yield from _next()
            char = yield from self._json_call() if char == "{" else self._pythonic_call(char)
            if char in SPACE:
                char = yield from _next()
            if char == "]":
                break
            _expect(char, ",")
        self.is_complete = True
        while True:
            char = yield
            if char not in SPACE:
                raise _BrokenError

    def _pythonic_call(self, char: str) -> Reading:
        name = ""
        while char.isalnum() or (char and char in "_.-"):
            name += char
            char = yield
        if not name or char != "(":
            raise _BrokenError
        self._begin_call(name)
        self._emit("{")
        yield from self._separated(self._argument, closing=")")
        self._emit("}")
        return (yield)

    def _argument(self, char: str) -> Reading:
        if char == "*":
            _expect((yield), "*")
            _expect((yield from _next()), "{")
            yield from self._separated(self._member, closing="}")
            return (yield)
        name = ""
        while char.isalnum() or (char and char in "_.$@-"):
            name += char
            char = yield
        if not name or char != "=":
            raise _BrokenError
        self._emit(f"{json.dumps(name, ensure_ascii=False)}: ")
        return (yield from self._value((yield from _next())))

    # -- values in Python's or JSON's words ----------------------------------------------------------------------------

    def _value(self, char: str) -> Reading:
        if char in ('"', "'"):
            return (yield from self._string(char))
        if char.isdigit() or char == "-":
            return (yield from self._number(char))
        if char.isalpha():
            return (yield from self._word(char))
        if char not in ("[", "{"):
            raise _BrokenError
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _BrokenError
        self._emit(char)
        read, closing = (self._member, "}") if char == "{" else (self._value, "]")
        self._emit((yield from self._separated(read, closing=closing)))
        self._depth -= 1
        return (yield)

    def _member(self, char: str) -> Reading:
        if char not in ('"', "'"):
            raise _BrokenError
        char = yield from self._string(char)
        if char in SPACE:
            char = yield from _next()
        _expect(char, ":")
        self._emit(": ")
        return (yield from self._value((yield from _next())))

    def _separated(self, read: Callable[[str], Reading], *, closing: str) -> Reading:
        """What `read` takes, with commas between, up to and with the closing character, which is returned."""
        char = yield from _next()
        is_first = True
        while char != closing:
            if not is_first:
                _expect(char, ",")
                self._emit(", ")
                char = yield from _next()
            char = yield from read(char)
            if char in SPACE:
                char = yield from _next()
            is_first = False
        return char

    def _number(self, char: str) -> Reading:
        text = ""
        while char in "+-.eE0123456789":
            text += char
            self._emit(char)
            char = yield
        if not NUMBER.fullmatch(text):
            raise _BrokenError
        return char

    def _word(self, char: str) -> Reading:
        text = ""
        while char.isalpha():
            text += char
            char = yield
        if text not in WORDS:
            raise _BrokenError
        self._emit(WORDS[text])
        return char

    def _string(self, quote: str) -> Reading:
        self._emit('"')
        high = 0  # the first half of a surrogate pair, until its second half comes
        while True:
            self._is_plain = not high
            char = yield
            self._is_plain = False
            if char == quote:
                break
            code = ord(char)
            if char == "\\":
                code = yield from self._escape()
            if high and 0xDC00 <= code <= 0xDFFF:
                code = 0x10000 + (high - 0xD800) * 0x400 + code - 0xDC00
                high = 0
            elif high:
                self._emit(REPLACEMENT)
                high = 0
            if 0xD800 <= code <= 0xDBFF:
                high = code
            else:
                self._emit(_json_char(code))
        self._emit((REPLACEMENT if high else "") + '"')
        return (yield)

    def _escape(self) -> Generator[None, str, int]:
        char = yield
        if char in SIMPLE_ESCAPES:
            return ord(SIMPLE_ESCAPES[char])
        digits = ""
        for _ in range(HEX_DIGITS.get(char, 0)):
            digits += yield
        if not re.fullmatch("[0-9a-fA-F]+", digits) or int(digits, 16) > 0x10FFFF:
            raise _BrokenError
        return int(digits, 16)

    # -- JSON form -----------------------------------------------------------------------------------------------------

    def _json_call(self) -> Reading:
        name = ""
        for expected in ("name", "arguments"):
            if expected == "arguments":
                _expect((yield from _next()), ",")
            if (yield from self._plain_string()) != expected:
                raise _BrokenError
            _expect((yield from _next()), ":")
            if expected == "name":
                name = yield from self._plain_string()
        self._begin_call(name)
        _expect((yield from _next()), "{")
        yield from self._copy_object()
        _expect((yield from _next()), "}")
        return (yield)

    def _plain_string(self) -> Generator[None, str, str]:
        """A string without escapes, as names are."""
        _expect((yield from _next()), '"')
        text = ""
        while (char := (yield)) != '"':
            if char == "\\" or char < " ":
                raise _BrokenError
            text += char
        return text

    def _copy_object(self) -> Generator[None, str, None]:
        """JSON as it stands, to the brace that closes the object."""
        self._emit("{")
        depth, in_string = 1, False
        while depth:
            self._is_plain = in_string
            char = yield
            self._is_plain = False
            self._emit(char)
            if in_string:
                if char == "\\":
                    self._emit((yield))
                in_string = char != '"'
            elif char == '"':
                in_string = True
            elif char in "{[":
                depth += 1
            elif char in "}]":
                depth -= 1


def _next() -> Reading:
    """The next character that is no white space."""
    while True:
        char = yield
        if char not in SPACE:
            return char


def _expect(char: str, expected: str) -> None:
    if char != expected:
        raise _BrokenError


def _json_char(code: int) -> str:
    if 0xDC00 <= code <= 0xDFFF:
        return REPLACEMENT
    char = chr(code)
    return char if char >= " " and char not in '"\\' else json.dumps(char)[1:-1]
