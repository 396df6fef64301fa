"""Reading single keywords of a JSON Schema: the right type, within bounds, or a RequestError that names their path."""

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import NoReturn, TypeVar

from lfm.errors import RequestError

MAX_NUMBER = 10**19  # beyond it no client reads integers back, and floating point cannot tell neighbours apart
MAX_FRACTION_DIGITS = 14  # of a number with a fraction: with one digit more, neighbours are still exact
MAX_SHOWN_CHARS = 80

_T = TypeVar("_T")


def fail(path: str, problem: str) -> NoReturn:
    """Refuse a schema. `problem` completes the sentence that begins with the path, without its full stop."""
    raise RequestError(f"{path} {problem}.", param=path, code="invalid_schema")


def child(path: str, key: str) -> str:
    """The path of a member of an object."""
    if key.isidentifier() or key.startswith("$"):
        return f"{path}.{key[:MAX_SHOWN_CHARS]}"
    return f"{path}[{shown(key)}]"


def shown(value: object) -> str:
    """A value as a short piece of a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 3]}..."


def typed(value: object, kind: type[_T], path: str) -> _T:
    """`value`, which must be a str, list or dict."""
    if not isinstance(value, kind):
        names: dict[type, str] = {str: "a string", list: "an array", dict: "an object"}
        fail(path, f"is {shown(value)}. Allowed: {names[kind]}")
    return value


def listed(raw: Mapping[str, object], keyword: str, path: str) -> list[object]:
    """The array under a keyword; empty if the keyword is missing."""
    return typed(raw.get(keyword, []), list, child(path, keyword))


def count(raw: Mapping[str, object], keyword: str, path: str) -> int | None:
    """The whole number under a keyword; None if it is missing."""
    value = raw.get(keyword)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    fail(child(path, keyword), f"is {shown(value)}. Allowed: a whole number from 0 on")


def counts(raw: Mapping[str, object], low: str, high: str, path: str) -> tuple[int, int | None]:
    """Two keywords that bound a count, which must leave room between them."""
    least, most = count(raw, low, path) or 0, count(raw, high, path)
    if most is not None and least > most:
        fail(child(path, low), f"is {least}, above {high}={most}")
    return least, most


def decimal(value: object, path: str) -> Decimal:
    """A number of the schema, exactly as it is written."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        fail(path, f"is {shown(value)}. Allowed: a number")
    if abs(value) > MAX_NUMBER:
        fail(path, f"is beyond {MAX_NUMBER:.0e}, where numbers are not exact. Leave it out")
    exact = Decimal(repr(value)) + 0  # -0 is 0
    if exact != exact.to_integral_value() and len(f"{abs(exact):f}") - 1 > MAX_FRACTION_DIGITS:
        fail(path, f"has more than {MAX_FRACTION_DIGITS} digits. Round it")
    return exact
