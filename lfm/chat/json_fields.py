"""Reading decoded JSON whose shape nobody has checked: a value of the wrong type is a RequestError with its path."""

import json
import math
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from lfm.errors import RequestError

_T = TypeVar("_T")

_JSON_NAMES: Mapping[type, str] = {
    str: "a string",
    list: "an array",
    dict: "an object",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null or missing",
}


def typed(value: object, kind: type[_T], where: str) -> _T:
    """`value`, which must be of `kind`: str, list, dict or bool."""
    if not isinstance(value, kind):
        raise RequestError(f"{where} is {json_type(value)}. Allowed: {_JSON_NAMES[kind]}.", param=where)
    return value


def optional_text(value: object, where: str) -> str | None:
    return None if value is None else typed(value, str, where)


def check_strict(value: object, where: str) -> None:
    """`strict` changes nothing, since every schema is held to as a whole; its type is checked all the same."""
    if value is not None:
        typed(value, bool, f"{where}.strict")


def json_bytes(value: object, where: str) -> bytes:
    """The value as compact JSON. Raises RequestError for what is none, or none that UTF-8 can hold."""
    try:
        return msgspec.json.encode(value)
    except (UnicodeEncodeError, RecursionError, TypeError, ValueError, msgspec.MsgspecError) as error:
        raise RequestError(f"{where} is not plain JSON ({error}).", param=where) from error


def parse_arguments(text: str, where: str) -> object:
    """The arguments of a tool call, which travel as JSON in a string."""
    try:
        # Clients send "" for a call without arguments.
        return json.loads(text, parse_constant=_finite, parse_float=_finite) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON ({error}). Send a JSON object as a string.", param=where) from error


def _finite(text: str) -> float:
    """A number of JSON, which knows no NaN and no infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:80]} is no finite number")
    return value


def json_type(value: object) -> str:
    """What to call the type of a decoded JSON value in a message."""
    return _JSON_NAMES.get(type(value), type(value).__name__)
