"""`oneOf`: alternatives of which exactly one may match. A grammar writes one of them; this makes sure no other matches.

Alternatives are apart if a property that one of them requires cannot have the same value in both. Else each gives up a
property that the other requires, which nobody misses; where there is none, the schema is refused.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from lfm.chat.schema_merge import Definitions, accepts_number, object_node
from lfm.chat.schema_nodes import (
    NOTHING,
    Anything,
    Array,
    Boolean,
    Node,
    Number,
    Object,
    Property,
    SchemaError,
    Text,
    Union,
    union_of,
)
from lfm.chat.schema_texts import Texts

MAX_DEPTH = 4  # how deep two alternatives are compared


def one_of(options: Sequence[Node], definitions: Definitions) -> Node:
    """A union in which no value of one option is one of another. Raises SchemaError if that cannot be shown."""
    groups = [_alternatives(option, definitions) for option in options]
    for first, second in combinations(range(len(groups)), 2):
        for i in range(len(groups[first])):
            for j in range(len(groups[second])):
                groups[first][i], groups[second][j] = _apart(groups[first][i], groups[second][j], definitions)
    return union_of([node for group in groups for node in group])


def _alternatives(node: Node, definitions: Definitions) -> list[Node]:
    resolved = definitions.resolve(node)
    if not isinstance(resolved, Union):
        return [resolved]
    return [inner for option in resolved.options for inner in _alternatives(option, definitions)]


def _apart(left: Node, right: Node, definitions: Definitions) -> tuple[Node, Node]:
    if is_disjoint(left, right, definitions):
        return left, right
    if isinstance(left, Object) and isinstance(right, Object):
        fewer = _without_required_of(right, left)
        other = _without_required_of(left, right)
        if fewer is not None and other is not None:
            return fewer, other
    raise SchemaError("has alternatives that can match at once; use anyOf, or tell them apart by a required const")


def _without_required_of(other: Object, node: Object) -> Node | None:
    """`node` as it must be written so that it never satisfies `other`; None if no property tells them apart."""
    required = {one.name for one in node.properties if one.is_required}
    for one in other.properties:
        if one.is_required and one.name not in required:
            others = [mine for mine in node.properties if mine.name != one.name]
            return object_node(replace(node, properties=(*others, Property(one.name, NOTHING, is_required=False))))
    return None


def is_disjoint(left: Node, right: Node, definitions: Definitions, depth: int = MAX_DEPTH) -> bool:
    """Whether certainly no value is in both. False means "not known"."""
    left, right = definitions.resolve(left), definitions.resolve(right)
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Union):
            return all(is_disjoint(option, other, definitions, depth) for option in one.options)
    if isinstance(left, Anything) or isinstance(right, Anything) or depth == 0:
        return False
    if type(left) is not type(right):
        return True
    if isinstance(left, Boolean) and isinstance(right, Boolean):
        return not left.values & right.values
    if isinstance(left, Number) and isinstance(right, Number):
        return _disjoint_numbers(left, right)
    if isinstance(left, Text) and isinstance(right, Text):
        return _disjoint_texts(left, right, definitions.texts)
    if isinstance(left, Array) and isinstance(right, Array):
        return _disjoint_arrays(left, right, definitions, depth)
    if isinstance(left, Object) and isinstance(right, Object):
        return _disjoint_objects(left, right, definitions, depth)
    return False


def _disjoint_numbers(left: Number, right: Number) -> bool:
    for one, other in ((left, right), (right, left)):
        if one.choices is not None:
            return not any(accepts_number(other, value) for value in one.choices)
        if one.high is not None and other.low is not None:
            is_excluded = one.excludes_high or other.excludes_low
            if one.high < other.low or (one.high == other.low and is_excluded):
                return True
    return False


def _disjoint_texts(left: Text, right: Text, texts: Texts) -> bool:
    for one, other in ((left, right), (right, left)):
        if one.choices is not None and (other.choices is not None or not other.patterns):
            return not texts.accepted(other, one.choices)
        if one.max_length is not None and one.max_length < other.min_length and not other.patterns:
            return True
    return False  # formats are asserted by few validators, and dialects differ on what else a pattern matches


def _disjoint_arrays(left: Array, right: Array, definitions: Definitions, depth: int) -> bool:
    for one, other in ((left, right), (right, left)):
        if one.max_items is not None and one.max_items < other.min_items:
            return True
        if one.items == NOTHING and len(one.prefix) < other.min_items:
            return True
    num_common = min(max(left.min_items, right.min_items), max(len(left.prefix), len(right.prefix)) + 1)
    return any(
        is_disjoint(_item(left, index), _item(right, index), definitions, depth - 1) for index in range(num_common)
    )


def _item(node: Array, index: int) -> Node:
    return node.prefix[index] if index < len(node.prefix) else node.items


def _disjoint_objects(left: Object, right: Object, definitions: Definitions, depth: int) -> bool:
    """Some property that one of them requires has no value that both allow."""
    of_right = {one.name: one for one in right.properties}
    for one in left.properties:
        other = of_right.get(one.name)
        if other is None or not (one.is_required or other.is_required):
            continue
        if is_disjoint(one.value, other.value, definitions, depth - 1):
            return True
    return False
