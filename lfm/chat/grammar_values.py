"""Values of a schema as grammar expressions: as JSON, or as LFM2 writes arguments, in Python's words or JSON's.

JSON has one form here, that of json.dumps: ", " and ": ", members in the schema's order. So most of what is no content
is forced, and costs no step of the model. In Python form either quote will do, and True or true.
"""

from typing import Literal as OneOf
from typing import NoReturn

from lfm.chat.grammar_lark import MAX_COUNTED, SEPARATOR, Expr, GrammarWriter, alt, lit, maybe, repeat, separated, seq
from lfm.chat.grammar_names import name_source, other_names
from lfm.chat.grammar_numbers import number_source
from lfm.chat.grammar_strings import quoted_text, string_source
from lfm.chat.schema_fields import fail
from lfm.chat.schema_nodes import (
    ALL_KINDS,
    NOTHING,
    Anything,
    Array,
    Boolean,
    Node,
    Null,
    Number,
    Object,
    Ref,
    Schema,
    Text,
    Union,
)
from lfm.chat.schema_unique import single_values

Style = OneOf["json", "python"]

MAX_LITERALS = 8  # so many choices cost less as literals than as one terminal


class ValueWriter:
    """Writes values of one schema into a grammar."""

    def __init__(self, grammar: GrammarWriter, *, style: Style, schema: Schema, key: str) -> None:
        self.grammar = grammar
        self.style: Style = style
        self._definitions = schema.definitions
        self._key = key
        self._path = schema.path

    def fail(self, problem: str) -> NoReturn:
        """Refuse the schema. Raises RequestError with its path."""
        fail(self._path, problem)

    def resolve(self, node: Node) -> Node:
        """The node that references lead to."""
        while isinstance(node, Ref):
            node = self._definitions[node.name]
        return node

    def value(self, node: Node) -> Expr:
        """The expression of a value. Raises RequestError for counts that no grammar can keep."""
        if isinstance(node, Ref):
            target = node
            return self.grammar.shared(f"{self._key} {node.name}", lambda: self.value(self._definitions[target.name]))
        if isinstance(node, Anything):
            return self.grammar.shared(f"any {self.style}", lambda: alt([self.value(kind) for kind in ALL_KINDS]))
        if isinstance(node, Union):
            return self.grammar.rule(alt([self.value(option) for option in node.options]))
        if isinstance(node, Null):
            return self._word("null", "None")
        if isinstance(node, Boolean):
            return alt([self._word(str(value).lower(), str(value)) for value in sorted(node.values, reverse=True)])
        if isinstance(node, Number):
            text = number_source(node)
            return self.grammar.embedded(text) if text.startswith("%json") else self.grammar.terminal(text)
        if isinstance(node, Text):
            return self._text(node)
        return self._array(node) if isinstance(node, Array) else self.object(node)

    def _word(self, json_word: str, python_word: str) -> Expr:
        return lit(json_word) if self.style == "json" else self.grammar.terminal(f"/{python_word}|{json_word}/")

    def _text(self, node: Text) -> Expr:
        if node.choices is not None and len(node.choices) <= MAX_LITERALS:
            quotes = '"' if self.style == "json" else "\"'"
            return alt([lit(quoted_text(text, quote)) for quote in quotes for text in node.choices])
        return self.grammar.terminal(string_source(node, is_json=self.style == "json"))

    # -- arrays --------------------------------------------------------------------------------------------------------

    def _array(self, node: Array) -> Expr:
        if node.is_unique:
            return self._unique_array(node)
        items = [self.value(item) for item in node.prefix[: node.max_items]]
        most = None if node.max_items is None else node.max_items - len(items)
        rest: Expr = () if node.items == NOTHING or most == 0 else self.value(node.items)
        if not items:
            return self.grammar.rule(seq(lit("["), separated(rest, node.min_items, most), lit("]")))
        tail = repeat(seq(SEPARATOR, rest), max(0, node.min_items - len(items)), most) if rest else ()
        for index in range(len(items) - 1, -1, -1):
            following = seq(SEPARATOR if index else (), items[index], tail)
            tail = following if index < node.min_items else maybe(following)
        return self.grammar.rule(seq(lit("["), tail, lit("]")))

    def _unique_array(self, node: Array) -> Expr:
        values = single_values(node.items, self.resolve)
        assert values is not None, "the schema was checked"
        most = len(values) if node.max_items is None else min(node.max_items, len(values))
        if most == 0:
            return lit("[]")
        filled = self.grammar.any_order(
            [self.value(value) for value in values], num_required=0, counts=(node.min_items, most), end=lit("]")
        )
        empty = [lit("[]")] if node.min_items == 0 else []
        return self.grammar.rule(alt([*empty, seq(lit("["), filled)]))

    # -- objects -------------------------------------------------------------------------------------------------------

    def object(self, node: Object) -> Expr:
        """An object in braces."""
        members = [
            (self._member(one.name, one.value), one.is_required) for one in node.properties if one.value != NOTHING
        ]
        others = self._other_members(node)
        num_required = sum(is_required for _, is_required in members)
        most = None if node.max_properties is None else node.max_properties - len(members)
        if most is not None and most <= 0:
            others = ()
        if not members:
            if node.min_properties > (1 if others else 0):
                self.fail("asks for a minimum of properties whose names a grammar cannot keep apart")
            return self.grammar.rule(seq(lit("{"), separated(others, node.min_properties, most), lit("}")))
        if node.min_properties > num_required or (most is not None and most < 0):
            return self._counted_object(node, members, others)
        body = self.grammar.in_order(members, others=others, most_others=most, end=lit("}"))
        return self.grammar.rule(seq(lit("{"), body))

    def _member(self, name: str, value: Node) -> Expr:
        if self.style == "json":
            return seq(lit(f"{quoted_text(name, chr(34))}: "), self.value(value))
        key = alt([lit(f"{quoted_text(name, quote)}: ") for quote in "\"'"])
        return seq(key, self.value(value))

    def _other_members(self, node: Object) -> Expr:
        """One member of a name that is not declared; empty if there is none."""
        options = []
        for names, value in other_names(node, self.grammar.texts):
            key = self.grammar.terminal(name_source(names, is_json=self.style == "json"))
            options.append(seq(key, lit(": "), self.value(value)))
        return self.grammar.rule(alt(options)) if options else ()

    def _counted_object(self, node: Object, members: list[tuple[Expr, bool]], others: Expr) -> Expr:
        """Members in any order, so that they can be counted."""
        if len(members) > MAX_COUNTED:
            self.fail(f"counts more than {MAX_COUNTED} members")
        if others:
            self.fail("asks for a minimum of properties and allows others, whose names cannot be kept apart")
        members = sorted(members, key=lambda member: not member[1])
        most = len(members) if node.max_properties is None else min(node.max_properties, len(members))
        num_required = sum(is_required for _, is_required in members)
        filled = self.grammar.any_order(
            [member for member, _ in members],
            num_required=num_required,
            counts=(node.min_properties, most),
            end=lit("}"),
        )
        empty = [lit("{}")] if not num_required and not node.min_properties else []
        return self.grammar.rule(alt([*empty, seq(lit("{"), filled)]))
