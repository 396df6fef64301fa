"""The block of tool calls as a grammar, in both forms, from the token that opens it to the one that closes it.

    pythonic   [get_weather(city="Bern", days=3), now()]
    json       [{"name": "get_weather", "arguments": {"city": "Bern", "days": 3}}, {"name": "now", "arguments": {}}]

Arguments of a Pythonic call come in any order, as the model writes them, all required ones among them and none twice.
An argument whose name is no word comes in `**{"its name": 1}`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lfm.chat.grammar_lark import MAX_COUNTED, SEPARATOR, Expr, GrammarWriter, alt, lit, repeat, separated, seq
from lfm.chat.grammar_names import keyword_source, other_names
from lfm.chat.grammar_values import ValueWriter
from lfm.chat.schema_nodes import FREE_OBJECT, NOTHING, Anything, Node, Object, Ref, Schema, SchemaError, Union
from lfm.chat.tool_calls import is_keyword

MAX_CALLS = 128  # of one answer; without a limit a model that repeats itself would only stop at max_tokens


@dataclass(frozen=True, slots=True)
class ToolGrammar:
    """One tool as far as grammars know it. `parameters` None: it takes no arguments."""

    name: str
    parameters: Schema | None


def call_block(grammar: GrammarWriter, tools: Sequence[ToolGrammar], *, is_json: bool, is_parallel: bool) -> Expr:
    """The list of calls in brackets, without the control tokens around it."""
    calls = [_call(grammar, tool, is_json=is_json) for tool in tools]
    call = grammar.rule(alt(calls)) if len(calls) > 1 else calls[0]
    more = repeat(seq(SEPARATOR, call), 0, MAX_CALLS - 1) if is_parallel else ()
    return seq(lit("["), call, more, lit("]"))


def _call(grammar: GrammarWriter, tool: ToolGrammar, *, is_json: bool) -> Expr:
    head = lit(f'{{"name": "{tool.name}", "arguments": ' if is_json else f"{tool.name}(")
    if tool.parameters is None:
        return seq(head, lit("{}}" if is_json else ")"))
    writer = ValueWriter(grammar, style="json" if is_json else "python", schema=tool.parameters, key=tool.name)
    try:
        if is_json:
            arguments = [writer.object(node) for node in argument_objects(tool.parameters)]
            return grammar.rule(seq(head, alt(arguments), lit("}")))
        return grammar.rule(seq(head, alt([_arguments(writer, node) for node in argument_objects(tool.parameters)])))
    except SchemaError as error:
        writer.fail(str(error))


def argument_objects(schema: Schema) -> list[Object]:
    """The kinds of objects that the arguments may be: one, unless the schema has alternatives."""
    found: dict[Object, None] = {}
    pending: list[Node] = [schema.root]
    seen: set[str] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, Ref) and node.name not in seen:
            seen.add(node.name)
            pending.append(schema.definitions[node.name])
        elif isinstance(node, Union):
            pending += reversed(node.options)
        elif isinstance(node, Object):
            found[node] = None
        elif isinstance(node, Anything):
            found[FREE_OBJECT] = None
    return list(found)


def _arguments(writer: ValueWriter, node: Object) -> Expr:
    """The arguments of one call and its closing parenthesis."""
    members = [one for one in node.properties if one.value != NOTHING]
    pieces = [
        (seq(lit(f"{one.name}="), writer.value(one.value)), one.is_required) for one in members if is_keyword(one.name)
    ]
    odd = tuple(one for one in members if not is_keyword(one.name))
    if odd:
        if node.min_properties or node.max_properties is not None:
            writer.fail("counts properties whose names are no words")
        inner = writer.object(Object(odd, additional=NOTHING))
        pieces.append((seq(lit("**"), inner), any(one.is_required for one in odd)))
    pieces.sort(key=lambda piece: not piece[1])
    return _in_any_order(writer, pieces, _other_arguments(writer, node), node)


def _other_arguments(writer: ValueWriter, node: Object) -> Expr:
    """One argument of a name that is not declared; empty if there is none."""
    options = [
        seq(writer.grammar.terminal(keyword_source(names)), writer.value(value))
        for names, value in other_names(node, writer.grammar.texts, are_keywords=True)
    ]
    return writer.grammar.rule(alt(options)) if options else ()


def _in_any_order(writer: ValueWriter, pieces: list[tuple[Expr, bool]], others: Expr, node: Object) -> Expr:
    """The pieces, required ones first in the list, between the parentheses of a call."""
    grammar = writer.grammar
    end = lit(")")
    low, high = node.min_properties, node.max_properties
    if low > max(len(pieces), 1 if others else 0):
        writer.fail("asks for a minimum of properties whose names a grammar cannot keep apart")
    if not pieces:
        return seq(separated(others, low, high), end)
    if high is not None:
        others = ()  # they would have to be counted too
    num_required = sum(is_required for _, is_required in pieces)
    most = len(pieces) if high is None else min(high, len(pieces))
    is_counted = low > num_required or most < len(pieces)
    if len(pieces) > MAX_COUNTED and not is_counted:
        return grammar.in_order(pieces, others=others, most_others=None, end=end)
    if most == 0:
        return end
    counts = (low, most)
    filled = grammar.any_order(
        [one for one, _ in pieces], num_required=num_required, counts=counts, end=end, extra=others
    )
    return filled if num_required or low else alt([filled, end])
