"""The tables that conversations are made from, and the rule that keeps train and test apart.

Phrases, and what else is a hand-written list, are split by place: of four entries the fourth is for tests, of a shorter
list the last. Names and other strings are split by a hash of the string itself, so that the same string is on the same
side in whatever language or table it turns up; made-up ones are drawn until one falls on the right side. What stands
in tables/more is for training alone.
"""

import functools
import hashlib
import re
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any, Literal, TypeVar, cast

Split = Literal["train", "test"]
LANGUAGES = ("en", "ar", "zh", "fr", "de", "ja", "ko", "es", "pt")
_CITY_COLUMNS = ("en", "de", "fr", "es", "pt", "ar", "zh", "ja", "ko")
_EVERY = 4
_TEST_BYTES = 64  # of 256: a quarter of all strings
_WORD = re.compile(r"[^\W\d_]{3,}")

Item = TypeVar("Item")


class Phrases(list[str]):
    """A list of a table, and what more there is of it for training alone."""

    more: tuple[str, ...] = ()


def part_of(items: Sequence[Item], split: Split) -> list[Item]:
    """The entries of a list that belong to a split; both are never empty."""
    assert len(items) >= 2, f"a list of {len(items)} cannot be split: {items}"
    last = len(items) - 1
    is_test = [i % _EVERY == _EVERY - 1 if len(items) >= _EVERY else i == last for i in range(len(items))]
    part = [item for item, test in zip(items, is_test, strict=True) if test == (split == "test")]
    if split == "train" and isinstance(items, Phrases):
        part += cast("tuple[Item, ...]", items.more)
    return part


def split_of(text: str) -> Split:
    """Which split a string belongs to. Capitals do not matter."""
    return "test" if hashlib.sha256(text.casefold().encode()).digest()[0] < _TEST_BYTES else "train"


@functools.cache
def world() -> dict[str, Any]:
    """The table of what all languages share."""
    return _with_more(_read("world"), _read("more/world"))


@functools.cache
def language_table(language: str) -> dict[str, Any]:
    """The table of one language; see tables/en.toml for its parts."""
    return _with_more(_read(language), _read(f"more/{language}"))


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


@functools.cache
def common_words(language: str) -> tuple[str, ...]:
    """The words of all phrases of a language, for training: names are made of them too. Chinese and Japanese, which
    have no spaces, give what stands between two signs."""
    text = " ".join(_strings(language_table(language)))
    found = dict.fromkeys(_WORD.findall(re.sub(r"\{.*?\}", " ", text)))
    return tuple(word for word in found if split_of(word) == "train")


@functools.cache
def listed_for_tests(language: str) -> frozenset[str]:
    """Names that are split by their place in a list and not by their hash, those that are for tests."""
    table = language_table(language)
    return frozenset(name.casefold() for key in ("rooms", "cuisines") for name in part_of(table[key], "test"))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    else:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _with_more(table: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The table with the phrases of `more` added to its lists. A KeyError is a mistake in a table."""
    merged = dict(table)
    for key, value in more.items():
        if isinstance(value, dict):
            merged[key] = _with_more(table[key], value)
        else:
            merged[key] = Phrases(table[key])
            merged[key].more = tuple(value)
    return merged


def _read(name: str) -> dict[str, Any]:
    path = resources.files("lfm.train.synthetic").joinpath("tables", f"{name}.toml")
    return tomllib.loads(path.read_text(encoding="utf-8"))
