"""What is left of a JSON Schema once it is read: a small tree of types, from which the grammars are written.

A node stands for a set of JSON values. Nodes are immutable; recursion goes through `Ref` only, so every node is a tree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from lfm.chat.schema_regex import Regex


class SchemaError(ValueError):
    """A schema that no grammar can hold. The message completes a sentence that begins with the schema's path."""


@dataclass(frozen=True, slots=True)
class Anything:
    """Every JSON value."""


@dataclass(frozen=True, slots=True)
class Null:
    """null."""


@dataclass(frozen=True, slots=True)
class Boolean:
    """One of the given truth values."""

    values: frozenset[bool] = frozenset((True, False))


@dataclass(frozen=True, slots=True)
class Number:
    """A number between two bounds, each with whether it is excluded; or, with `choices`, one of those."""

    is_integer: bool = False
    low: Decimal | None = None
    high: Decimal | None = None
    excludes_low: bool = False
    excludes_high: bool = False
    multiple_of: int | None = None
    choices: tuple[int | float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A string; or, with `choices`, one of those (the other fields then say nothing more)."""

    min_length: int = 0
    max_length: int | None = None
    patterns: tuple[Regex, ...] = ()
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Array:
    """`prefix` items by position, then items of one kind (`Union(())`: none)."""

    items: "Node"
    prefix: tuple["Node", ...] = ()
    min_items: int = 0
    max_items: int | None = None
    is_unique: bool = False


@dataclass(frozen=True, slots=True)
class Property:
    name: str
    value: "Node"
    is_required: bool


@dataclass(frozen=True, slots=True)
class Object:
    """An object. `additional` None: the schema says nothing of other names, so none are generated beside declared ones.

    `patterns` are values by pattern of the name; `names` constrains every name that is not declared.
    `is_open` tells an object that declares nothing at all from one that declares no property.
    """

    properties: tuple[Property, ...] = ()
    additional: "Node | None" = None
    patterns: tuple[tuple[Regex, "Node"], ...] = ()
    names: Text | None = None
    min_properties: int = 0
    max_properties: int | None = None
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class Union:
    """Any of the options; no options: no value at all."""

    options: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Ref:
    """The definition of that name."""

    name: str


Node = Anything | Null | Boolean | Number | Text | Array | Object | Union | Ref

ANYTHING = Anything()
NOTHING = Union(())
PLAIN_TEXT = Text()
FREE_OBJECT = Object(is_open=True)
FREE_ARRAY = Array(ANYTHING)
ALL_KINDS: tuple[Node, ...] = (Null(), Boolean(), Number(), PLAIN_TEXT, FREE_ARRAY, FREE_OBJECT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """A schema that has instances, all of which a grammar can write.

    `path` is where it stands in the request. `notes` name what it says but no grammar enforces, because the
    specification calls it an annotation.
    """

    path: str
    root: Node
    definitions: Mapping[str, Node]
    notes: tuple[str, ...] = ()


def union_of(options: "list[Node]") -> Node:
    """One node for several: unions are flattened, repeated options left out."""
    if len(options) == 1:
        return options[0]
    flat: dict[Node, None] = {}
    for option in options:
        flat.update(dict.fromkeys(option.options if isinstance(option, Union) else (option,)))
    return next(iter(flat)) if len(flat) == 1 else Union(tuple(flat))


def generated_additional(node: Object) -> Node:
    """What values of undeclared names may be when an object is written."""
    if node.additional is not None:
        return node.additional
    return ANYTHING if node.is_open else NOTHING
