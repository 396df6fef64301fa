"""Questions about regular expressions that trees alone do not answer: does this text match, can any text match all?

Thompson's automaton, followed with sets of states: linear in the text, never by backtracking. The search for a text
that satisfies several patterns at once follows all of them side by side, within a budget.
"""

from collections.abc import Collection, Iterator, Sequence

from lfm.chat.schema_chars import ANY_RANGES, Range, Ranges, difference, intersection
from lfm.chat.schema_nodes import SchemaError
from lfm.chat.schema_regex import Chars, Choice, Concat, Regex, Repeat

MAX_STATES = 5000
MAX_STEPS = 150_000

_State = tuple[int, ...]  # one state of each automaton, then one of the tree of excluded texts (-1: has left it)


class Work:
    """An amount of work that may be done, in edges looked at: some 0.3 s for all patterns of a request."""

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self._left = steps

    def spend(self, steps: int = 1) -> None:
        """Raise SchemaError if there was too much of it."""
        self._left -= steps
        if self._left < 0:
            raise SchemaError("has patterns and lengths that take too long to be checked against each other")


class Automaton:
    """One pattern's automaton. State 0 is the start, state 1 the only end."""

    def __init__(self, regex: Regex, work: Work) -> None:
        self._work = work
        self._empty_moves: list[list[int]] = [[], []]
        self._edges: list[list[tuple[Ranges, int]]] = [[], []]
        self._add(regex, 0, 1)
        self._closures: dict[int, frozenset[int]] = {}

    def _new_state(self) -> int:
        if len(self._edges) >= MAX_STATES:
            raise SchemaError(f"has a pattern of more than {MAX_STATES} characters with its counts written out")
        self._work.spend()
        self._edges.append([])
        self._empty_moves.append([])
        return len(self._edges) - 1

    def _add(self, regex: Regex, start: int, end: int) -> None:
        if isinstance(regex, Chars):
            self._edges[start].append((regex.ranges, end))
        elif isinstance(regex, Choice):
            for option in regex.options:
                self._add(option, start, end)
        elif isinstance(regex, Concat):
            for part in regex.parts:
                middle = self._new_state()
                self._add(part, start, middle)
                start = middle
            self._empty_moves[start].append(end)
        else:
            self._add_repeat(regex, start, end)

    def _add_repeat(self, regex: Repeat, start: int, end: int) -> None:
        for _ in range(regex.low):
            middle = self._new_state()
            self._add(regex.body, start, middle)
            start = middle
        if regex.high is None:
            loop = self._new_state()
            self._empty_moves[start].append(loop)
            self._add(regex.body, loop, loop)
            start = loop
        else:
            for _ in range(regex.high - regex.low):
                self._empty_moves[start].append(end)
                middle = self._new_state()
                self._add(regex.body, start, middle)
                start = middle
        self._empty_moves[start].append(end)

    def closure(self, state: int) -> frozenset[int]:
        """The state and those that it reaches without reading a character."""
        known = self._closures.get(state)
        if known is None:
            found, pending = {state}, [state]
            while pending:
                for target in self._empty_moves[pending.pop()]:
                    if target not in found:
                        found.add(target)
                        pending.append(target)
            known = self._closures[state] = frozenset(found)
        return known

    def is_end(self, state: int) -> bool:
        return 1 in self.closure(state)

    def edges(self, state: int) -> Iterator[tuple[Ranges, int]]:
        """What can be read next, and where it leads."""
        for reached in self.closure(state):
            yield from self._edges[reached]

    def matches(self, text: str, work: Work) -> bool:
        """Whether the whole text is in the language."""
        states = {0}
        for char in text:
            code = ord(char)
            edges = [edge for state in states for edge in self.edges(state)]
            work.spend(len(edges))
            states = {target for ranges, target in edges if any(low <= code <= high for low, high in ranges)}
            if not states:
                return False
        return any(map(self.is_end, states))


class _Excluded:
    """The texts that must not come out, as a tree of characters."""

    def __init__(self, texts: Collection[str]) -> None:
        self._children: list[dict[int, int]] = [{}]
        self._ends: set[int] = set()
        for text in texts:
            state = 0
            for char in text:
                state = self._children[state].setdefault(ord(char), len(self._children))
                if state == len(self._children):
                    self._children.append({})
            self._ends.add(state)

    def is_excluded(self, state: int) -> bool:
        return state in self._ends

    def moves(self, state: int, ranges: Ranges) -> Iterator[int]:
        """Where characters of `ranges` lead: into the tree, or out of it for good (-1)."""
        children = self._children[state] if state >= 0 else {}
        named: list[Range] = []
        for code, child in children.items():
            if any(low <= code <= high for low, high in ranges):
                named.append((code, code))
                yield child
        if not named or difference(ranges, tuple(sorted(named))):
            yield -1


def shortest_length(
    automata: Sequence[Automaton],
    work: Work,
    *,
    excluded: Collection[str] = (),
    low: int = 0,
    high: int | None = None,
) -> int | None:
    """Characters of the shortest text of `low` to `high` that all patterns accept and that is not excluded.

    None if there is no such text.
    """
    tree = _Excluded(excluded)
    layer: set[_State] = {(0,) * (len(automata) + 1)}
    seen: set[_State] = set(layer)
    length = 0
    while layer and (high is None or length <= high):
        if length >= low and any(_is_accepted(state, automata, tree) for state in layer):
            return length
        following: set[_State] = set()
        for state in layer:
            following.update(_moves(state, automata, tree, work))
        # From `low` on, a state met before cannot lead to a shorter text.
        layer = following - seen if length >= low else following
        seen = seen | layer if length >= low else set(following)
        length += 1
    return None


def _is_accepted(state: _State, automata: Sequence[Automaton], tree: _Excluded) -> bool:
    return not tree.is_excluded(state[-1]) and all(
        automaton.is_end(one) for automaton, one in zip(automata, state, strict=False)
    )


def _moves(state: _State, automata: Sequence[Automaton], tree: _Excluded, work: Work) -> Iterator[_State]:
    partial: list[tuple[Ranges, _State]] = [(ANY_RANGES, ())]
    for automaton, one in zip(automata, state, strict=False):
        edges = list(automaton.edges(one))
        work.spend(1 + len(edges) * len(partial))
        partial = [
            (common, (*reached, target))
            for ranges, reached in partial
            for allowed, target in edges
            if (common := intersection(ranges, allowed))
        ]
    for ranges, reached in partial:
        for target in tree.moves(state[-1], ranges):
            yield (*reached, target)
