"""The keywords of strings and numbers, and constants, as nodes."""

from collections.abc import Mapping, Sequence
from decimal import Decimal

from lfm.chat.schema_fields import child, counts, decimal, fail, shown, typed
from lfm.chat.schema_formats import FORMATS, INTEGER_FORMATS
from lfm.chat.schema_merge import number_node
from lfm.chat.schema_nodes import NOTHING, Array, Boolean, Node, Null, Number, Object, Property, Text, union_of
from lfm.chat.schema_regex import Regex, RegexError, parse_regex
from lfm.chat.schema_texts import Texts
from lfm.protocol import MAX_SCHEMA_DEPTH

MAX_MULTIPLE = 10**9


def read_text(raw: Mapping[str, object], path: str, texts: Texts, *, max_chars: int) -> Node:
    """A string. Raises SchemaError if its patterns are too large to be checked against its length."""
    low, high = counts(raw, "minLength", "maxLength", path)
    if low > max_chars:
        fail(child(path, "minLength"), f"is {low}: no answer that long fits into the context")
    patterns: list[Regex] = []
    if "pattern" in raw:
        patterns.append(read_pattern(raw["pattern"], child(path, "pattern")))
    name = raw.get("format")
    if isinstance(name, str) and name in FORMATS:
        patterns.append(parse_regex(FORMATS[name]))
    node = texts.node(Text(low, high, tuple(patterns)))
    if node == NOTHING:
        fail(child(path, "pattern"), "has no match of the length, format and pattern that are asked for")
    return node


def read_pattern(value: object, path: str) -> Regex:
    """A regular expression of the schema."""
    pattern = typed(value, str, path)
    try:
        return parse_regex(pattern)
    except RegexError as error:
        fail(path, f"is {shown(pattern)}, which cannot be used: {error}")


def read_number(raw: Mapping[str, object], path: str, *, is_integer: bool) -> Node:
    """A number between its bounds."""
    low, excludes_low = _bound(raw, "minimum", "exclusiveMinimum", path, is_low=True)
    high, excludes_high = _bound(raw, "maximum", "exclusiveMaximum", path, is_low=False)
    multiple = _multiple(raw["multipleOf"], child(path, "multipleOf")) if "multipleOf" in raw else None
    name = raw.get("format")
    if is_integer and isinstance(name, str) and name in INTEGER_FORMATS:
        least, most = map(Decimal, INTEGER_FORMATS[name])
        if low is None or low < least:
            low, excludes_low = least, False
        if high is None or high > most:
            high, excludes_high = most, False
    node = number_node(Number(is_integer, low, high, excludes_low, excludes_high, multiple))
    if node == NOTHING:
        fail(child(path, "minimum"), "and the other bounds contradict each other: no number lies between them")
    return node


def _bound(
    raw: Mapping[str, object], keyword: str, exclusive: str, path: str, *, is_low: bool
) -> tuple[Decimal | None, bool]:
    """The stronger of two bounds, and whether it is excluded. Draft 4 writes `exclusiveMinimum: true`."""
    inclusive = decimal(raw[keyword], child(path, keyword)) if keyword in raw else None
    if raw.get(exclusive, False) is False:
        return inclusive, False
    if raw[exclusive] is True:
        bound = inclusive
    else:
        bound = decimal(raw[exclusive], child(path, exclusive))
        if inclusive is not None and (inclusive > bound if is_low else inclusive < bound):
            return inclusive, False
    return bound, bound is not None


def _multiple(value: object, path: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_MULTIPLE:
        fail(path, f"is {shown(value)}. Allowed: a whole number from 1 to {MAX_MULTIPLE}")
    return value


def is_enforced_format(name: object, kinds: Sequence[str]) -> bool:
    """Whether a format narrows what is generated for one of the types."""
    if not isinstance(name, str):
        return False
    return ("string" in kinds and name in FORMATS) or ("integer" in kinds and name in INTEGER_FORMATS)


def literals(values: Sequence[object], path: str) -> Node:
    """The node of exactly these values."""
    texts = tuple(dict.fromkeys(value for value in values if isinstance(value, str)))
    numbers: dict[int | float, None] = {}
    for value in values:
        if isinstance(value, int | float) and not isinstance(value, bool):
            decimal(value, path)
            numbers[value] = None
    truths = frozenset(value for value in values if isinstance(value, bool))
    found: list[Node] = [Text(choices=texts)] if texts else []
    found += [Number(choices=tuple(numbers))] if numbers else []
    found += [Boolean(truths)] if truths else []
    found += [Null()] if any(value is None for value in values) else []
    found += [_composite(value, path, 1) for value in values if isinstance(value, list | dict)]
    return union_of(found)


def _composite(value: object, path: str, depth: int) -> Node:
    """An array or object constant, as the type that only it has."""
    if depth > MAX_SCHEMA_DEPTH:
        fail(path, f"holds a value nested deeper than the {MAX_SCHEMA_DEPTH} levels that are allowed")
    if isinstance(value, list):
        prefix = tuple(_composite(item, path, depth + 1) for item in value)
        return Array(NOTHING, prefix, min_items=len(prefix), max_items=len(prefix))
    if isinstance(value, dict):
        members = [(name, _composite(item, path, depth + 1)) for name, item in value.items()]
        return Object(tuple(Property(name, node, True) for name, node in members), additional=NOTHING)
    return literals([value], path)
