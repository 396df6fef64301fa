"""The front door for JSON Schemas: read, bounded, free of contradictions and of recursion without an end.

A schema that passes has instances, the shortest of which fits into the context. Whatever the grammars cannot enforce is
refused with the path of the keyword (HTTP 400), or noted where the specification calls it an annotation.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from lfm.chat.json_fields import json_bytes
from lfm.chat.schema_fields import fail
from lfm.chat.schema_merge import array_node, object_node
from lfm.chat.schema_nodes import (
    NOTHING,
    Array,
    Node,
    Number,
    Object,
    Property,
    Ref,
    Schema,
    SchemaError,
    Text,
    Union,
    generated_additional,
    union_of,
)
from lfm.chat.schema_reader import SchemaReader
from lfm.chat.schema_texts import Texts
from lfm.chat.schema_unique import single_values
from lfm.protocol import MAX_SCHEMA_BYTES

# Structured text has some 3 to 4 bytes a token, whatever the tokenizer: what needs more cannot finish in the context.
BYTES_PER_TOKEN = 4
MEMBER_BYTES = 8  # of the shortest property of an undeclared name
UNKNOWN = float("inf")

Resolve = Callable[[Node], Node]


def schema_bytes(raw: object, *, param: str) -> int:
    """Bytes of a schema as compact JSON. Raises RequestError if it is too large, or no JSON that UTF-8 can hold."""
    num_bytes = len(json_bytes(raw, param))
    if num_bytes > MAX_SCHEMA_BYTES:
        fail(param, f"has {num_bytes} bytes. Allowed: at most {MAX_SCHEMA_BYTES}")
    return num_bytes


def read_schema(raw: object, *, param: str, max_tokens: int, texts: Texts | None = None) -> Schema:
    """Read a JSON Schema.

    Args:
        texts: shared by the schemas of one request, so that all their patterns together are bounded.
        param: where the schema stands in the request, for messages.
        max_tokens: the longest answer that the context allows.

    Raises RequestError with the path of the first keyword that cannot be honoured.
    """
    schema_bytes(raw, param=param)
    max_chars = max_tokens * BYTES_PER_TOKEN
    reader = SchemaReader(raw, texts or Texts(), param=param, max_chars=max_chars)
    try:
        root = reader.read_root()
        definitions = reader.definitions.all()
        sizes = _shortest_sizes(definitions, reader)
    except SchemaError as error:
        fail(param, str(error))
    except RecursionError:
        fail(param, "is nested too deeply")
    for name, path in reader.paths.items():
        if sizes[name] == UNKNOWN:
            fail(path, "has no finite instance: every value of it would have to contain another one")
        if sizes[name] > max_chars:
            fail(path, f"needs at least {sizes[name]:.0f} characters, more than fit into the context")
    dead = {name for name, size in sizes.items() if size == UNKNOWN}
    living = {
        name: _without_dead(node, dead, reader.definitions.resolve)
        for name, node in definitions.items()
        if name not in dead
    }
    return Schema(path=param, root=root, definitions=living, notes=tuple(reader.notes))


def _shortest_sizes(definitions: Mapping[str, Node], reader: SchemaReader) -> dict[str, float]:
    """Bytes of the shortest instance of each definition; UNKNOWN where there is none."""
    sizes = dict.fromkeys(definitions, UNKNOWN)
    users: dict[str, list[str]] = {name: [] for name in definitions}
    for name, node in definitions.items():
        for used in set(_references(node)):
            users[used].append(name)
    pending = dict.fromkeys(reversed(list(definitions)))
    while pending:
        name = next(iter(pending))
        del pending[name]
        size = _size(definitions[name], sizes, reader)
        if size < sizes[name]:
            sizes[name] = size
            pending.update(dict.fromkeys(users[name]))
    return sizes


def _references(node: Node) -> list[str]:
    if isinstance(node, Ref):
        return [node.name]
    return [name for inner in _children(node) for name in _references(inner)]


def _children(node: Node) -> list[Node]:
    if isinstance(node, Union):
        return list(node.options)
    if isinstance(node, Array):
        return [*node.prefix, node.items]
    if isinstance(node, Object):
        values = [one.value for one in node.properties] + [value for _, value in node.patterns]
        return values if node.additional is None else [*values, node.additional]
    return []


def _size(node: Node, sizes: Mapping[str, float], reader: SchemaReader) -> float:
    if isinstance(node, Ref):
        return sizes[node.name]
    if isinstance(node, Union):
        return min((_size(option, sizes, reader) for option in node.options), default=UNKNOWN)
    if isinstance(node, Text):
        return 2 + (node.min_length if node.choices is None else min(map(len, node.choices)))
    if isinstance(node, Number):
        return 1 if node.choices is None else min(len(repr(value)) for value in node.choices)
    if isinstance(node, Array):
        return _array_size(node, sizes, reader)
    return _object_size(node, sizes, reader) if isinstance(node, Object) else 4


def _array_size(node: Array, sizes: Mapping[str, float], reader: SchemaReader) -> float:
    if not _can_be_unique(node, reader.definitions.resolve):
        return UNKNOWN
    total = 2.0
    for item in node.prefix[: node.min_items]:
        total += _size(item, sizes, reader) + 2
    num_rest = node.min_items - len(node.prefix)
    return total + (num_rest * (_size(node.items, sizes, reader) + 2) if num_rest > 0 else 0)


def _object_size(node: Object, sizes: Mapping[str, float], reader: SchemaReader) -> float:
    members = [(one.is_required, len(one.name) + 6 + _size(one.value, sizes, reader)) for one in node.properties]
    total = 2 + sum(size for is_required, size in members if is_required)
    num_missing = node.min_properties - sum(is_required for is_required, _ in members)
    if num_missing <= 0:
        return total
    if not _has_enough_properties(node):
        return UNKNOWN
    others = sorted(size for is_required, size in members if not is_required and size < UNKNOWN)[:num_missing]
    return total + sum(others) + (num_missing - len(others)) * MEMBER_BYTES


def _without_dead(node: Node, dead: set[str], resolve: Resolve) -> Node:
    """The node without what can never be finished: alternatives, optional properties, items."""
    if isinstance(node, Ref):
        return NOTHING if node.name in dead else node
    if isinstance(node, Union):
        options = [_without_dead(option, dead, resolve) for option in node.options]
        return union_of([option for option in options if option != NOTHING])
    if isinstance(node, Array):
        if not _can_be_unique(node, resolve):
            return NOTHING
        prefix = tuple(_without_dead(item, dead, resolve) for item in node.prefix)
        return array_node(replace(node, items=_without_dead(node.items, dead, resolve), prefix=prefix))
    if not isinstance(node, Object):
        return node
    additional = node.additional
    found = replace(
        node,
        properties=tuple(
            Property(one.name, _without_dead(one.value, dead, resolve), one.is_required) for one in node.properties
        ),
        patterns=tuple((pattern, _without_dead(value, dead, resolve)) for pattern, value in node.patterns),
        additional=None if additional is None else _without_dead(additional, dead, resolve),
    )
    return object_node(found) if _has_enough_properties(found) else NOTHING


def _can_be_unique(node: Array, resolve: Resolve) -> bool:
    """Whether an array whose items must differ has as many different items as it needs."""
    if not node.is_unique:
        return True
    values = single_values(node.items, resolve)
    return values is not None and node.min_items <= len(values)


def _has_enough_properties(node: Object) -> bool:
    """Whether as many properties can be written as there must be."""
    num_possible = sum(one.value != NOTHING for one in node.properties)
    return node.min_properties <= num_possible or bool(node.patterns) or generated_additional(node) != NOTHING
