"""Numbers as terminals: plain decimal notation within bounds, of a size that every JSON reader keeps.

A bound is a regular expression over all numbers on one side of it, and the shape of numbers is another one; together
they are an intersection. Numbers with a fraction have at most 15 digits in all: so many stay apart as 64-bit floating
point, so that what is above an excluded bound in text is above it for every reader.
"""

import json
from decimal import Decimal

from lfm.chat.schema_nodes import Number

MAX_DIGITS = 18  # of integers without a bound: they fit into 64 bits with a sign
EXACT_DIGITS = 15

INTEGER = rf"/0|-?[1-9][0-9]{{0,{MAX_DIGITS - 1}}}/"
NUMBER = rf"/-?(?:0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})(?:\.[0-9]{{1,{EXACT_DIGITS}}})?(?:[eE][+-]?[0-9]{{1,2}})?/"
_FRACTION = r"(?:\.[0-9]+)?"


def number_source(node: Number) -> str:
    """The source of a number: a terminal's, or a `%json` rule's for multiples, which only the library can count."""
    if node.choices is not None:
        return f"/{'|'.join(_escaped(json.dumps(value)) for value in node.choices)}/"
    if node.multiple_of not in (None, 1):
        return _multiple_source(node)
    if node.low is None and node.high is None:
        return INTEGER if node.is_integer else NUMBER
    parts = [_shape(node)]
    if node.low is not None:
        parts.append(_from(node.low, is_integer=node.is_integer, excludes=node.excludes_low))
    if node.high is not None:
        parts.append(_to(node.high, is_integer=node.is_integer, excludes=node.excludes_high))
    return " & ".join(f"/{part}/" for part in parts)


def _escaped(text: str) -> str:
    return text.replace(".", r"\.").replace("+", r"\+")


def _multiple_source(node: Number) -> str:
    limit = 10**MAX_DIGITS
    schema = {
        "type": "integer",
        "multipleOf": node.multiple_of,
        "minimum": int(node.low) if node.low is not None else -limit,
        "maximum": int(node.high) if node.high is not None else limit,
        "x-guidance": {"whitespace_flexible": False},
    }
    return f"%json {json.dumps(schema)}"


def _shape(node: Number) -> str:
    """Integers of so many digits as the bounds need; numbers with fewer digits after the point the more are before."""
    bounds = [bound for bound in (node.low, node.high) if bound is not None]
    most = max(MAX_DIGITS, *(len(str(int(abs(bound)))) for bound in bounds))
    if node.is_integer:
        return rf"0|-?[1-9][0-9]{{0,{most - 1}}}"
    options = [rf"0(?:\.[0-9]{{1,{EXACT_DIGITS}}})?"]
    for num_digits in range(1, EXACT_DIGITS):
        options.append(rf"[1-9][0-9]{{{num_digits - 1}}}(?:\.[0-9]{{1,{EXACT_DIGITS - num_digits}}})?")
    options.append(rf"[1-9][0-9]{{{EXACT_DIGITS - 1},{most - 1}}}")
    return f"-?(?:{'|'.join(options)})"


def _from(bound: Decimal, *, is_integer: bool, excludes: bool) -> str:
    """Numbers that are not below the bound."""
    if bound >= 0:
        return _magnitudes_from(bound, is_integer=is_integer, excludes=excludes)
    return f"[0-9].*|-(?:{_magnitudes_to(-bound, is_integer=is_integer, excludes=excludes)})"


def _to(bound: Decimal, *, is_integer: bool, excludes: bool) -> str:
    """Numbers that are not above the bound."""
    if bound < 0 or (bound == 0 and excludes):
        return f"-(?:{_magnitudes_from(-bound, is_integer=is_integer, excludes=excludes)})"
    return f"-.*|{_magnitudes_to(bound, is_integer=is_integer, excludes=excludes)}"


def _magnitudes_from(bound: Decimal, *, is_integer: bool, excludes: bool) -> str:
    """Numbers without a sign that are at least `bound`, which is not negative."""
    whole, fraction = _digits(bound)
    if is_integer:
        return _integers_from(int(whole) + excludes)
    options = [f"(?:{_integers_from(int(whole) + 1)}){_FRACTION}"]
    options += [rf"{whole}\.{tail}" for tail in _larger_digits(fraction)]
    if excludes:
        options.append(rf"{whole}\.{fraction}[0-9]*[1-9]")
    else:
        options.append(rf"{whole}\.{fraction}[0-9]*" if fraction else f"{whole}{_FRACTION}")
    return "|".join(options)


def _magnitudes_to(bound: Decimal, *, is_integer: bool, excludes: bool) -> str:
    """Numbers without a sign that are at most `bound`, which is not negative (nor 0, if excluded)."""
    whole, fraction = _digits(bound)
    if is_integer:
        return _integers_to(int(whole) - excludes)
    options = [f"(?:{_integers_to(int(whole) - 1)}){_FRACTION}"] if int(whole) else []
    options += [rf"{whole}\.{tail}" for tail in _smaller_digits(fraction)]
    if fraction:
        options.append(whole)
    if not excludes:
        options.append(rf"{whole}\.{fraction}0*" if fraction else rf"{whole}(?:\.0+)?")
    return "|".join(options)


def _digits(bound: Decimal) -> tuple[str, str]:
    whole, _, fraction = f"{bound:f}".partition(".")
    return whole, fraction.rstrip("0")


def _larger_digits(fraction: str) -> list[str]:
    """Digits after the point that differ from `fraction` upwards."""
    return [
        f"{fraction[:index]}{_digit_range(int(digit) + 1, 9)}[0-9]*"
        for index, digit in enumerate(fraction)
        if digit != "9"
    ]


def _smaller_digits(fraction: str) -> list[str]:
    """Digits after the point that differ from `fraction` downwards, or end before it does."""
    shorter = [fraction[:index] for index in range(1, len(fraction))]
    return shorter + [
        f"{fraction[:index]}{_digit_range(0, int(digit) - 1)}[0-9]*"
        for index, digit in enumerate(fraction)
        if digit != "0"
    ]


def _digit_range(low: int, high: int) -> str:
    return str(low) if low == high else f"[{low}-{high}]"


def _integers_from(low: int) -> str:
    """Integers of at least `low` >= 0."""
    if low == 0:
        return "0|[1-9][0-9]*"
    text = str(low)
    options = [text, f"[1-9][0-9]{{{len(text)},}}"]
    for index, digit in enumerate(text):
        if digit != "9":
            options.append(f"{text[:index]}{_digit_range(int(digit) + 1, 9)}{_any_digits(len(text) - index - 1)}")
    return "|".join(options)


def _integers_to(high: int) -> str:
    """Integers from 0 to `high` >= 0."""
    text = str(high)
    options = ["0", text]
    if len(text) > 1:
        options.append(f"[1-9][0-9]{{0,{len(text) - 2}}}")
    for index, digit in enumerate(text):
        least = 1 if index == 0 else 0
        if int(digit) > least:
            options.append(f"{text[:index]}{_digit_range(least, int(digit) - 1)}{_any_digits(len(text) - index - 1)}")
    return "|".join(options)


def _any_digits(count: int) -> str:
    return f"[0-9]{{{count}}}" if count else ""
