"""Intersection of schema nodes: what `allOf`, `$ref` with siblings and keywords beside `anyOf` mean together.

Where an exact intersection cannot be written, the schemas are refused (SchemaError); the result is never wider than it.
Definitions are read only when something needs them, so recursive schemas can be merged too.
"""

import math
from collections.abc import Callable
from decimal import Decimal

from lfm.chat import schema_nodes as nodes
from lfm.chat.schema_fields import MAX_FRACTION_DIGITS
from lfm.chat.schema_nodes import (
    ANYTHING,
    NOTHING,
    Array,
    Boolean,
    Node,
    Null,
    Number,
    Object,
    Property,
    Ref,
    SchemaError,
    Text,
    Union,
)
from lfm.chat.schema_regex import Regex
from lfm.chat.schema_texts import Texts

MAX_OPTIONS = 1000
MAX_MERGED_DEFINITIONS = 2000
MAX_CHAIN = 64  # definitions that must be known before the first of a chain is


class Definitions:
    """Nodes by name, each made when it is first asked for. `Ref` nodes name them."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self._makers: dict[str, Callable[[], Node]] = {}
        self._made: dict[str, Node] = {}
        self._in_progress: list[str] = []
        self._merged: dict[tuple[Node, Node], Ref] = {}

    def declare(self, name: str, make: Callable[[], Node]) -> Ref:
        """A reference to the node that `make` will return; the first maker of a name counts."""
        self._makers.setdefault(name, make)
        return Ref(name)

    def resolve(self, node: Node) -> Node:
        """The node that references lead to. Raises SchemaError if they lead back before any value is known."""
        chain = set()
        while isinstance(node, Ref):
            if node.name in chain:
                raise SchemaError("refers to itself before it allows any value")
            chain.add(node.name)
            node = self._get(node.name)
        return node

    def _get(self, name: str) -> Node:
        if name not in self._made:
            if name in self._in_progress:
                raise SchemaError("refers to itself before it allows any value")
            if len(self._in_progress) >= MAX_CHAIN:
                raise SchemaError(f"is a chain of more than {MAX_CHAIN} references")
            self._in_progress.append(name)
            self._made[name] = self._makers[name]()
            self._in_progress.pop()
        return self._made[name]

    def all(self) -> dict[str, Node]:
        """Every definition, made now if nothing asked for it before."""
        while len(self._made) < len(self._makers):
            for name in list(self._makers):
                self._get(name)
        return self._made

    def intersect(self, left: Node, right: Node) -> Node:
        """The values that both nodes allow."""
        if left == right or isinstance(right, nodes.Anything):
            return left
        if isinstance(left, nodes.Anything):
            return right
        if isinstance(left, Ref) or isinstance(right, Ref):
            return self._intersect_later(left, right)
        if isinstance(left, Union) or isinstance(right, Union):
            return self._intersect_options(left, right)
        return self._intersect_kinds(left, right)

    def _intersect_later(self, left: Node, right: Node) -> Ref:
        key = (left, right)
        if key not in self._merged:
            if len(self._merged) >= MAX_MERGED_DEFINITIONS:
                raise SchemaError(f"combines more than {MAX_MERGED_DEFINITIONS} pairs of schemas")
            make = lambda: self.intersect(self.resolve(left), self.resolve(right))  # noqa: E731
            self._merged[key] = self.declare(f"merged {len(self._merged)}", make)
        return self._merged[key]

    def _intersect_options(self, left: Node, right: Node) -> Node:
        lefts = left.options if isinstance(left, Union) else (left,)
        rights = right.options if isinstance(right, Union) else (right,)
        if len(lefts) * len(rights) > MAX_OPTIONS**2:
            raise SchemaError(f"combines {len(lefts)} with {len(rights)} alternatives")
        found = nodes.union_of([self.intersect(one, other) for one in lefts for other in rights])
        if isinstance(found, Union) and len(found.options) > MAX_OPTIONS:
            raise SchemaError(f"has more than {MAX_OPTIONS} alternatives")
        return found

    def _intersect_kinds(self, left: Node, right: Node) -> Node:
        if isinstance(left, Null) and isinstance(right, Null):
            return left
        if isinstance(left, Boolean) and isinstance(right, Boolean):
            both = left.values & right.values
            return Boolean(both) if both else NOTHING
        if isinstance(left, Number) and isinstance(right, Number):
            return _intersect_numbers(left, right)
        if isinstance(left, Text) and isinstance(right, Text):
            return self.texts.intersect(left, right)
        if isinstance(left, Array) and isinstance(right, Array):
            return self._intersect_arrays(left, right)
        if isinstance(left, Object) and isinstance(right, Object):
            return self._intersect_objects(left, right)
        return NOTHING

    def _intersect_arrays(self, left: Array, right: Array) -> Node:
        limits = [limit for limit in (left.max_items, right.max_items) if limit is not None]
        length = max(len(left.prefix), len(right.prefix))
        if length and (left.is_unique or right.is_unique):
            raise SchemaError("combines uniqueItems with items by position")
        prefix = tuple(self.intersect(_item(left, i), _item(right, i)) for i in range(length))
        return array_node(
            Array(
                self.intersect(left.items, right.items),
                prefix,
                min_items=max(left.min_items, right.min_items),
                max_items=min(limits, default=None),
                is_unique=left.is_unique or right.is_unique,
            )
        )

    def _intersect_objects(self, left: Object, right: Object) -> Node:
        limits = [limit for limit in (left.max_properties, right.max_properties) if limit is not None]
        names = left.names or right.names
        if left.names and right.names:
            both = self.texts.intersect(left.names, right.names)
            names = both if isinstance(both, Text) else Text(choices=())
        return object_node(
            Object(
                properties=self._intersect_properties(left, right),
                additional=self._intersect_additional(left, right),
                patterns=self._only_patterns(left, right),
                names=names,
                min_properties=max(left.min_properties, right.min_properties),
                max_properties=min(limits, default=None),
                is_open=left.is_open and right.is_open,
            )
        )

    def _intersect_properties(self, left: Object, right: Object) -> tuple[Property, ...]:
        of_right = {one.name: one for one in right.properties}
        found = []
        for one in left.properties:
            other = of_right.pop(one.name, None)
            value = self.undeclared(right, one.name) if other is None else other.value
            is_required = one.is_required or (other is not None and other.is_required)
            found.append(Property(one.name, self.intersect(one.value, value), is_required))
        for other in of_right.values():
            value = self.intersect(self.undeclared(left, other.name), other.value)
            found.append(Property(other.name, value, other.is_required))
        return tuple(found)

    def _intersect_additional(self, left: Object, right: Object) -> Node | None:
        if left.additional is None or right.additional is None:
            return right.additional if left.additional is None else left.additional
        return self.intersect(left.additional, right.additional)

    def _only_patterns(self, left: Object, right: Object) -> tuple[tuple[Regex, Node], ...]:
        if not left.patterns and not right.patterns:
            return ()
        other = right if left.patterns else left
        if other.patterns or other.additional is not None:
            raise SchemaError("combines patternProperties with patternProperties or additionalProperties of another")
        return left.patterns or right.patterns

    def undeclared(self, node: Object, name: str) -> Node:
        """What an object schema says of the value of a name that it does not declare."""
        if node.names is not None and not self.texts.accepted(node.names, [name]):
            return NOTHING
        found: Node = ANYTHING
        is_matched = False
        for pattern, value in node.patterns:
            if self.texts.matches(pattern, name):
                found, is_matched = self.intersect(found, value), True
        return found if is_matched or node.additional is None else node.additional


def _item(node: Array, index: int) -> Node:
    return node.prefix[index] if index < len(node.prefix) else node.items


def array_node(node: Array) -> Node:
    """The array, shortened to the items that exist; NOTHING if that leaves too few."""
    for index, item in enumerate(node.prefix):
        if item == NOTHING:
            node = Array(NOTHING, node.prefix[:index], node.min_items, node.max_items, node.is_unique)
            break
    longest = len(node.prefix) if node.items == NOTHING else math.inf
    if node.min_items > min(longest, math.inf if node.max_items is None else node.max_items):
        return NOTHING
    return node


def object_node(node: Object) -> Node:
    """The object; NOTHING if a required property has no value or the counts contradict each other."""
    if any(one.is_required and one.value == NOTHING for one in node.properties):
        return NOTHING
    num_required = sum(one.is_required for one in node.properties)
    if node.max_properties is not None and max(num_required, node.min_properties) > node.max_properties:
        return NOTHING
    return node


def _intersect_numbers(left: Number, right: Number) -> Node:
    if left.choices is not None or right.choices is not None:
        listed, other = (left, right) if left.choices is not None else (right, left)
        assert listed.choices is not None
        return number_node(Number(choices=tuple(value for value in listed.choices if accepts_number(other, value))))
    low, excludes_low = _tighter(left.low, left.excludes_low, right.low, right.excludes_low, sign=1)
    high, excludes_high = _tighter(left.high, left.excludes_high, right.high, right.excludes_high, sign=-1)
    factors = [one.multiple_of for one in (left, right) if one.multiple_of is not None]
    return number_node(
        Number(
            is_integer=left.is_integer or right.is_integer,
            low=low,
            high=high,
            excludes_low=excludes_low,
            excludes_high=excludes_high,
            multiple_of=math.lcm(*factors) if factors else None,
        )
    )


def _tighter(
    left: Decimal | None, excludes_left: bool, right: Decimal | None, excludes_right: bool, *, sign: int
) -> tuple[Decimal | None, bool]:
    """The stronger of two lower (sign 1) or upper (sign -1) bounds."""
    if left is None or right is None:
        return (right, excludes_right) if left is None else (left, excludes_left)
    if left == right:
        return left, excludes_left or excludes_right
    return (left, excludes_left) if (left > right) == (sign > 0) else (right, excludes_right)


def number_node(node: Number) -> Node:
    """The number, with integer bounds rounded inwards; NOTHING if no number fits."""
    if node.choices is not None:
        return node if node.choices else NOTHING
    if node.is_integer or node.multiple_of is not None:
        node = _with_integer_bounds(node)
    if node.low is None or node.high is None:
        return node
    if node.low > node.high or (node.low == node.high and (node.excludes_low or node.excludes_high)):
        return NOTHING
    first = math.floor(node.low) + 1 if node.excludes_low else math.ceil(node.low)
    is_narrow = first > node.high or (first == node.high and node.excludes_high)
    if is_narrow and not node.is_integer and num_digits(node.low) > MAX_FRACTION_DIGITS:
        raise SchemaError("has bounds so close that floating-point numbers between them are not exact")
    return node


def num_digits(number: Decimal) -> int:
    """Digits before the point and significant ones after it."""
    whole, _, fraction = f"{abs(number):f}".partition(".")
    return len(whole) + len(fraction.rstrip("0"))


def _with_integer_bounds(node: Number) -> Number:
    step = node.multiple_of or 1
    low, high = node.low, node.high
    if low is not None:
        least = math.floor(low) + 1 if node.excludes_low else math.ceil(low)
        low = Decimal(-(-least // step) * step)
    if high is not None:
        most = math.ceil(high) - 1 if node.excludes_high else math.floor(high)
        high = Decimal(most // step * step)
    return Number(is_integer=True, low=low, high=high, multiple_of=node.multiple_of)


def accepts_number(node: Number, value: int | float) -> bool:
    """Whether the number schema allows this value."""
    if node.choices is not None:
        return value in node.choices
    exact = Decimal(repr(value))
    if node.low is not None and (exact < node.low or (node.excludes_low and exact == node.low)):
        return False
    if node.high is not None and (exact > node.high or (node.excludes_high and exact == node.high)):
        return False
    is_whole = isinstance(value, int) or value.is_integer()
    return (is_whole or not node.is_integer) and (
        node.multiple_of is None or (is_whole and int(value) % node.multiple_of == 0)
    )
