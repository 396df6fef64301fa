"""What a docstring says about a function and its arguments, in Google's, NumPy's or Sphinx's layout."""

import inspect
import re
from typing import NamedTuple

_ARGUMENTS = {"args", "arguments", "parameters", "params", "keyword args", "keyword arguments", "other parameters"}
_OTHERS = {"returns", "return", "yields", "raises", "example", "examples", "note", "notes", "see also", "references"}
_OTHERS |= {"attributes", "warning", "warnings", "todo"}
_UNDERLINE = re.compile(r"-{3,}\s*")
_GOOGLE_ENTRY = re.compile(r"(\s*)\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:(?:\s+(.*)|)$")
_NUMPY_ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?::.*)?$")
_SPHINX_ENTRY = re.compile(r":(?:param|parameter|arg|argument)\s+(?:[^:]*\s)?\*{0,2}(\w+)\s*:\s*(.*)$")
_SPHINX_FIELD = re.compile(r":[a-z]+(?:\s[^:]*)?:")


class Docstring(NamedTuple):
    """The text before the first section, and a line for each argument that is described."""

    summary: str
    arguments: dict[str, str]


def parse_docstring(text: str | None) -> Docstring:
    """Read a docstring. What has none of the known layouts is all summary."""
    reader = _Reader()
    lines = inspect.cleandoc(text or "").splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=False):
        reader.read(line, following)
    arguments = {name: " ".join(" ".join(pieces).split()) for name, pieces in reader.arguments.items()}
    return Docstring("\n".join(reader.summary).strip(), arguments)


class _Reader:
    """Where in a docstring the next line belongs."""

    def __init__(self) -> None:
        self.summary: list[str] = []
        self.arguments: dict[str, list[str]] = {}
        self._target: list[str] | None = self.summary  # None: a section that says nothing about arguments
        self._entry: re.Pattern[str] | None = None  # within a section of arguments: how an entry begins
        self._indent: int | None = None  # of the entries of a section in Google's layout

    def read(self, line: str, following: str) -> None:
        heading = line.rstrip().removesuffix(":").lower()
        is_underlined = _UNDERLINE.fullmatch(following) is not None
        if heading in _ARGUMENTS | _OTHERS and (is_underlined or line.rstrip().endswith(":")):
            self._target, self._indent = None, None
            layout = _NUMPY_ENTRY if is_underlined else _GOOGLE_ENTRY
            self._entry = layout if heading in _ARGUMENTS else None
        elif field := _SPHINX_ENTRY.match(line):
            self._begin(field[1], field[2])
        elif _SPHINX_FIELD.match(line):
            self._target, self._entry = None, None
        elif self._target is self.summary:
            self.summary.append(line)
        elif not self._begins_entry(line) and self._target is not None:
            self._target.append(line.strip())

    def _begins_entry(self, line: str) -> bool:
        entry = self._entry.match(line) if self._entry is not None else None
        if entry is None:
            return False
        if self._entry is _NUMPY_ENTRY:
            self._begin(entry[1], "")
            return True
        if self._indent is None:
            self._indent = len(entry[1])
        if len(entry[1]) > self._indent:  # a deeper line continues the entry above it, though it has a colon
            return False
        self._begin(entry[2], entry[3] or "")
        return True

    def _begin(self, name: str, text: str) -> None:
        self._target = self.arguments.setdefault(name, [text])
