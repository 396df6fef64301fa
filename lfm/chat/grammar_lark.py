"""Writing a Lark grammar in llguidance's dialect: rules and terminals that share a name when they share a body.

An expression is a tuple of items: `Literal` text, and grammar source such as names and groups. Neighbouring literals
become one, so that the matcher can force them as a whole and has fewer lexemes to tell apart.
"""

from collections.abc import Callable, Sequence
from json.encoder import encode_basestring

from lfm.chat.schema_nodes import SchemaError
from lfm.chat.schema_texts import Texts

MAX_GRAMMAR_CHARS = 4 * 1024 * 1024
MEMBERS_PER_RULE = 16
MAX_COUNTED = 64  # the library's rules carry so many bits

_FIRST, _AFTER = "\x01", "\x02"  # stand for rule names in bodies; no grammar source holds a control character


class Literal(str):
    """Text that stands in the grammar as itself."""

    __slots__ = ()


Expr = tuple[str, ...]

SEPARATOR: Expr = (Literal(", "),)


def seq(*parts: Expr) -> Expr:
    """One after the other."""
    items: list[str] = []
    for part in parts:
        for item in part:
            if isinstance(item, Literal) and items and isinstance(items[-1], Literal):
                items[-1] = Literal(items[-1] + item)
            else:
                items.append(item)
    return tuple(items)


def lit(text: str) -> Expr:
    """Exactly this text."""
    return (Literal(text),) if text else ()


def alt(options: Sequence[Expr]) -> Expr:
    """Any of the options."""
    sources = list(dict.fromkeys(map(source, options)))
    return options[0] if len(sources) == 1 else (f"({' | '.join(sources)})",)


def maybe(expr: Expr) -> Expr:
    """The expression or nothing."""
    return (f"({source(expr)})?",) if expr else ()


def repeat(expr: Expr, low: int, high: int | None) -> Expr:
    """`low` to `high` times; `high` None: without a limit."""
    if high == 0 or not expr:
        return ()
    if (low, high) == (1, 1):
        return expr
    counted = f"{{{low},{'' if high is None else high}}}"
    return (f"({source(expr)}){ {(0, None): '*', (1, None): '+', (0, 1): '?'}.get((low, high), counted) }",)


def separated(item: Expr, low: int, high: int | None) -> Expr:
    """`low` to `high` items with separators between them."""
    if high == 0 or not item:
        return ()
    body = seq(item, repeat(seq(SEPARATOR, item), max(0, low - 1), None if high is None else high - 1))
    return body if low else maybe(body)


def source(expr: Expr) -> str:
    """The expression as grammar text."""
    return " ".join([_quoted(item) if isinstance(item, Literal) else item for item in expr]) or '""'


def _quoted(text: str) -> str:
    """A literal of the library: a JSON string, but it does not take DEL as it is."""
    return encode_basestring(text).replace("\x7f", "\\u007f")


class GrammarWriter:
    """Collects the rules of one grammar."""

    def __init__(self) -> None:
        self.texts = Texts()  # bounds the work on patterns for all of the grammar
        self._lines: list[str] = []
        self._names: dict[str, str] = {}
        self._pending: list[tuple[str, Callable[[], Expr]]] = []
        self._num_chars = 0

    def rule(self, body: Expr) -> Expr:
        """A rule of this body, if it is more than a literal or a name."""
        is_single = not body or (len(body) == 1 and (isinstance(body[0], Literal) or body[0].isalnum()))
        return body if is_single else self._named("r", source(body))

    def terminal(self, body: str) -> Expr:
        """A terminal of this source: what the lexer sees as one piece."""
        return self._named("T", body)

    def embedded(self, body: str) -> Expr:
        """A rule of this source: another kind of grammar within this one."""
        return self._named("r", body)

    def shared(self, key: str, make: Callable[[], Expr]) -> Expr:
        """The rule of that key, whose body is made at the end of the grammar: it may contain itself."""
        if key not in self._names:
            self._names[key] = f"d{len(self._names)}"
            self._pending.append((self._names[key], make))
        return (self._names[key],)

    def in_order(
        self, members: Sequence[tuple[Expr, bool]], *, others: Expr, most_others: int | None, end: Expr
    ) -> Expr:
        """Members in their order, those that are not required perhaps left out, then others, then `end`."""
        last = seq(repeat(seq(SEPARATOR, others), 0, most_others) if others else (), end)
        num_leading = next((index for index, (_, is_required) in enumerate(members) if is_required), len(members))
        following = [
            seq(SEPARATOR, member) if is_required else maybe(seq(SEPARATOR, member)) for member, is_required in members
        ]
        rest = seq(*following[num_leading + 1 :], last)
        if num_leading == 0:
            return seq(members[0][0], rest)
        # What follows each of the members that the object may begin with. Those share rules, none of them long, and no
        # rule is many rules deep: the library compiles rules within rules.
        firsts = [seq(members[num_leading][0], rest)] if num_leading < len(members) else []
        tail = self.rule(seq(following[num_leading], rest) if num_leading < len(members) else last)
        for index in range(num_leading - 1, -1, -1):
            firsts.append(seq(members[index][0], tail))
            tail = seq(following[index], tail)
            if index % MEMBERS_PER_RULE == 0:
                tail = self.rule(tail)
        if num_leading == len(members):
            firsts += [seq(separated(others, 1, most_others), end)] if others and most_others != 0 else []
            firsts.append(end)
        return alt(firsts)

    def any_order(
        self, pieces: Sequence[Expr], *, num_required: int, counts: tuple[int, int], end: Expr, extra: Expr = ()
    ) -> Expr:
        """One or more pieces in any order with ", " between them, each at most once, and then `end`.

        The first `num_required` pieces must be among them; `counts` bounds how many of them there are; `extra` may come
        any number of times besides. Raises SchemaError for more pieces than can be told apart.
        """
        if len(pieces) > MAX_COUNTED:
            raise SchemaError(f"counts more than {MAX_COUNTED} members")
        low, high = counts
        required, optional = f"[0:{num_required}]", f"[{num_required}:{len(pieces)}]"
        num_optional = min(high, len(pieces)) - num_required
        if num_optional == 0:
            pieces = pieces[:num_required]
        # Nothing may be written that leaves no room for a required piece, and no comma with nothing to follow.
        is_limited = 0 < num_optional < len(pieces) - num_required
        room = f"bit_count_lt({optional}, {num_optional})" if num_optional else ""
        optional_condition = [room] if is_limited else []
        first = [
            f"{source(piece)} {_AFTER}::set_bit({bit})"
            + _condition([f"bit_clear({bit})", *(optional_condition if bit >= num_required else [])])
            for bit, piece in enumerate(pieces)
        ]
        missing = [f"not(is_ones({required}))"] if num_required else []
        more = [] if extra else [_any_of([*missing, *([room] if room else [])])]
        enough = [f"is_ones({required})"] if num_required else []
        enough += [f"bit_count_ge([0:{len(pieces)}], {low})"] if low > num_required else []
        first += [f"{source(extra)} {_AFTER}::_"] if extra else []
        after = f'{source(end)}{_condition(enough)} | ", " {_FIRST}::_{_condition(more)}'
        return (f"{self._pair(' | '.join(first), after)}::0x0",)

    def text(self, start: Expr) -> str:
        """The whole grammar. Raises SchemaError if it is too large."""
        while self._pending:
            name, make = self._pending.pop()
            self._add(f"{name}: {source(make())}")
        return "\n".join(["%llguidance {}", f"start: {source(start)}", *self._lines, ""])

    def _named(self, prefix: str, body: str) -> Expr:
        key = prefix + body
        if key not in self._names:
            self._names[key] = f"{prefix}{len(self._names)}"
            self._add(f"{self._names[key]}: {body}")
        return (self._names[key],)

    def _pair(self, first: str, after: str) -> str:
        """The name of the first of two parametric rules that mention each other."""
        key = f"{first}\n{after}"
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = f"p{len(self._names)}"
            for suffix, body in (("", first), ("a", after)):
                self._add(f"{name}{suffix}::_: {body.replace(_FIRST, name).replace(_AFTER, f'{name}a')}")
        return name

    def _add(self, line: str) -> None:
        self._num_chars += len(line)
        if self._num_chars > MAX_GRAMMAR_CHARS:
            raise SchemaError(f"makes a grammar of more than {MAX_GRAMMAR_CHARS} characters")
        self._lines.append(line)


def _condition(conditions: Sequence[str]) -> str:
    """The guard of an alternative that needs all of the conditions."""
    if not conditions:
        return ""
    joined = conditions[0] if len(conditions) == 1 else f"and({', '.join(conditions)})"
    return f" %if {joined}"


def _any_of(conditions: Sequence[str]) -> str:
    return conditions[0] if len(conditions) == 1 else f"or({', '.join(conditions)})"
