"""The tables that conversations are made from, and the rule that keeps train and test apart.

Phrases, and what else is a hand-written list, are split by place: of four entries the fourth is for tests, of a shorter
list the last. Names and other strings are split by a hash of the string itself, so that the same string is on the same
side in whatever language or table it turns up; made-up ones are drawn until one falls on the right side.
"""

import functools
import hashlib
import tomllib
from collections.abc import Sequence
from importlib import resources
from typing import Any, Literal, TypeVar

Split = Literal["train", "test"]
LANGUAGES = ("en", "ar", "zh", "fr", "de", "ja", "ko", "es", "pt")
_CITY_COLUMNS = ("en", "de", "fr", "es", "pt", "ar", "zh", "ja", "ko")
_EVERY = 4
_TEST_BYTES = 64  # of 256: a quarter of all strings

Item = TypeVar("Item")


def part_of(items: Sequence[Item], split: Split) -> list[Item]:
    """The entries of a list that belong to a split; both are never empty."""
    assert len(items) >= 2, f"a list of {len(items)} cannot be split: {items}"
    last = len(items) - 1
    is_test = [i % _EVERY == _EVERY - 1 if len(items) >= _EVERY else i == last for i in range(len(items))]
    return [item for item, test in zip(items, is_test, strict=True) if test == (split == "test")]


def split_of(text: str) -> Split:
    """Which split a string belongs to. Capitals do not matter."""
    return "test" if hashlib.sha256(text.casefold().encode()).digest()[0] < _TEST_BYTES else "train"


@functools.cache
def world() -> dict[str, Any]:
    """The table of what all languages share."""
    return _read("world")


@functools.cache
def language_table(language: str) -> dict[str, Any]:
    """The table of one language; see tables/en.toml for its parts."""
    return _read(language)


@functools.cache
def cities(language: str, split: Split) -> tuple[str, ...]:
    """Names of cities in a language. A city is on one side, whatever a language calls it."""
    column = _CITY_COLUMNS.index(language)
    rows = [line.split("|") for line in world()["cities"].strip().splitlines()]
    return tuple(row[column] for row in rows if split_of(row[0]) == split)


@functools.cache
def words(language: str, key: str, split: Split) -> tuple[str, ...]:
    """The words of a space-separated entry of a language's table, by hash."""
    return tuple(word for word in language_table(language)[key].split() if split_of(word) == split)


@functools.cache
def shared_words(key: str) -> tuple[str, ...]:
    """The words of a space-separated entry of the world's table. They are on both sides: codes, not names."""
    return tuple(world()[key].split())


def _read(name: str) -> dict[str, Any]:
    path = resources.files("lfm.train.synthetic").joinpath("tables", f"{name}.toml")
    return tomllib.loads(path.read_text(encoding="utf-8"))
