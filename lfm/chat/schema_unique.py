"""`uniqueItems`: a grammar cannot compare items, but it can use each value of a short list at most once."""

from collections.abc import Callable
from dataclasses import replace

from lfm.chat.schema_merge import Definitions
from lfm.chat.schema_nodes import NOTHING, Array, Boolean, Node, Null, Number, SchemaError, Text, Union

MAX_UNIQUE_VALUES = 64  # one bit each in the grammar's rules


def check_unique(node: Array, definitions: Definitions) -> Node:
    """The array, if its items can be kept apart; NOTHING if there are fewer than it must have."""
    if node.max_items is not None and node.max_items <= 1:
        return replace(node, is_unique=False)
    values = None if node.prefix else single_values(node.items, definitions.resolve)
    if values is None:
        raise SchemaError(
            f"is supported for items that are one of at most {MAX_UNIQUE_VALUES} strings, numbers or booleans"
        )
    return node if node.min_items <= len(values) else NOTHING


def single_values(node: Node, resolve: Callable[[Node], Node]) -> list[Node] | None:
    """One node for each value of a short list of scalars; None if the values are no such list."""
    found: list[Node] = []
    resolved = resolve(node)
    for option in map(resolve, resolved.options if isinstance(resolved, Union) else (resolved,)):
        if isinstance(option, Text | Number) and option.choices is not None:
            kind = type(option)
            found += [kind(choices=(value,)) for value in option.choices]  # type: ignore[arg-type]  # of its own kind
        elif isinstance(option, Boolean):
            found += [Boolean(frozenset((value,))) for value in sorted(option.values)]
        elif isinstance(option, Null):
            found.append(option)
        else:
            return None
        if len(found) > MAX_UNIQUE_VALUES:
            return None
    return found
