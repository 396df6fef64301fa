"""String schemas: which texts they allow, and whether there are any at all."""

from collections.abc import Collection, Sequence

from lfm.chat.schema_automaton import Automaton, Work, shortest_length
from lfm.chat.schema_nodes import NOTHING, Node, Text
from lfm.chat.schema_regex import Regex, min_length


class Texts:
    """Questions about string schemas, answered within one amount of work for all that a request sends.

    Every method raises SchemaError once that is used up: many patterns, or a few of the worst kind.
    """

    def __init__(self) -> None:
        self._work = Work()
        self._automata: dict[Regex, Automaton] = {}

    def node(self, node: Text, *, excluded: Collection[str] = ()) -> Node:
        """The string schema with its shortest length worked out; NOTHING if no text fits."""
        if node.choices is not None:
            return node if node.choices else NOTHING
        if node.max_length is not None and node.min_length > node.max_length:
            return NOTHING
        if not node.patterns:
            return node
        shortest = min_length(node.patterns[0])
        if len(node.patterns) > 1 or node.min_length or node.max_length is not None or excluded:
            automata = [self._automaton(pattern) for pattern in node.patterns]
            shortest = shortest_length(
                automata, self._work, excluded=excluded, low=node.min_length, high=node.max_length
            )
        return NOTHING if shortest is None else Text(shortest, node.max_length, node.patterns)

    def intersect(self, left: Text, right: Text) -> Node:
        """The strings that both allow."""
        if left.choices is not None or right.choices is not None:
            listed, other = (left, right) if left.choices is not None else (right, left)
            assert listed.choices is not None
            return self.node(Text(choices=tuple(self.accepted(other, listed.choices))))
        limits = [limit for limit in (left.max_length, right.max_length) if limit is not None]
        patterns = tuple(dict.fromkeys(left.patterns + right.patterns))
        return self.node(Text(max(left.min_length, right.min_length), min(limits, default=None), patterns))

    def accepted(self, node: Text, texts: Sequence[str]) -> list[str]:
        """Those of the texts that the schema allows."""
        if node.choices is not None:
            choices = frozenset(node.choices)
            return [text for text in texts if text in choices]
        longest = node.max_length
        found = [text for text in texts if node.min_length <= len(text) and (longest is None or len(text) <= longest)]
        for pattern in node.patterns:
            found = [text for text in found if self.matches(pattern, text)]
        return found

    def matches(self, pattern: Regex, text: str) -> bool:
        """Whether the whole text is in the pattern's language."""
        return self._automaton(pattern).matches(text, self._work)

    def _automaton(self, pattern: Regex) -> Automaton:
        if pattern not in self._automata:
            self._automata[pattern] = Automaton(pattern, self._work)
        return self._automata[pattern]
