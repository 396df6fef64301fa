"""The grammar of one request's output, from its tools, its tool choice and its response format.

Policy around a block of tool calls:
- `auto`: the model writes freely; once it opens a block, the grammar holds to the block's end. With a response format,
  the output is a valid block or a valid answer from the first token on.
- `required`, a named tool, `allowed_tools` of mode "required": the output is a block.
- After the block only the end of the turn is allowed. The model was seen to repeat the call as text there.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from lfm.chat.grammar_calls import ToolGrammar, call_block
from lfm.chat.grammar_lark import Expr, GrammarWriter, alt, lit, repeat, seq
from lfm.chat.grammar_numbers import NUMBER
from lfm.chat.grammar_strings import JSON_STRING, regex_source
from lfm.chat.grammar_values import ValueWriter
from lfm.chat.schema_nodes import Schema, SchemaError
from lfm.chat.schema_regex import Regex
from lfm.chat.tokenizer import SpecialTokens
from lfm.chat.tool_calls import CallForm
from lfm.errors import RequestError
from lfm.protocol import GrammarSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """What an answer must be, by one of: a schema, a regular expression for the whole of it, a Lark grammar.

    None of them: any JSON object.
    """

    schema: Schema | None = None
    regex: Regex | None = None
    lark: str | None = None


def calls_grammar(
    tools: Sequence[ToolGrammar],
    *,
    special: SpecialTokens,
    form: CallForm = "pythonic",
    is_parallel: bool = True,
    is_required: bool = False,
    answer: AnswerFormat | None = None,
) -> GrammarSpec:
    """The grammar of calls of these tools, which must not be empty.

    Args:
        is_parallel: whether one block may hold several calls.
        is_required: there must be a block; else it holds once the model opens one, or writes `answer` instead.

    Raises RequestError with param "tools" for what no grammar can hold, and for a model without tool call tokens.
    """
    start_id, end_id = special.tool_call_start, special.tool_call_end
    if start_id is None or end_id is None:
        raise RequestError("tools cannot be used: this model has no tool call tokens. Remove them.", param="tools")
    grammar = GrammarWriter()
    try:
        block = call_block(grammar, tools, is_json=form == "json", is_parallel=is_parallel)
        start = seq((f"<[{start_id}]>",), block, (f"<[{end_id}]>",))
        if answer is not None and not is_required:
            start = alt([start, ("@answer",) if answer.lark is not None else _answer(grammar, answer)])
        text = grammar.text(start)
    except SchemaError as error:
        raise RequestError(f"tools: the schema {error}.", param="tools", code="invalid_schema") from None
    if answer is not None and answer.lark is not None and not is_required:
        text = _with_lark(text, answer.lark)
    is_lazy = not is_required and answer is None
    return GrammarSpec(text=text, trigger_id=start_id if is_lazy else None)


def _with_lark(text: str, lark: str) -> str:
    """A grammar that refers to another one as @answer. The library keeps the rules and the lexers of the two apart."""
    return json.dumps({"grammars": [{"lark_grammar": text}, {"name": "answer", "lark_grammar": lark}]})


def answer_grammar(answer: AnswerFormat) -> GrammarSpec:
    """The grammar of an answer alone. Raises RequestError with param "response_format"."""
    if answer.lark is not None:
        return GrammarSpec(text=answer.lark)
    grammar = GrammarWriter()
    try:
        return GrammarSpec(text=grammar.text(_answer(grammar, answer)))
    except SchemaError as error:
        raise RequestError(
            f"response_format: the schema {error}.", param="response_format", code="invalid_schema"
        ) from None


def _answer(grammar: GrammarWriter, answer: AnswerFormat) -> Expr:
    if answer.regex is not None:
        return grammar.terminal(f"/{regex_source(answer.regex, '')}/")
    if answer.schema is None:
        return _any_object(grammar)
    return ValueWriter(grammar, style="json", schema=answer.schema, key="answer").value(answer.schema.root)


def _any_object(grammar: GrammarWriter) -> Expr:
    """Any JSON object, as people lay it out: on one line, or a member a line, indented."""
    space = r"(?: |\n[ \t]{0,64})?"
    begin_object, end_object = grammar.terminal(rf"/\{{{space}/"), grammar.terminal(rf"/{space}\}}/")
    begin_array, end_array = grammar.terminal(rf"/\[{space}/"), grammar.terminal(rf"/{space}\]/")
    comma, colon = grammar.terminal(f"/,{space}/"), grammar.terminal("/: ?/")
    string, number = grammar.terminal(JSON_STRING), grammar.terminal(NUMBER)

    def list_of(item: Expr) -> Expr:
        return seq(item, repeat(seq(comma, item), 0, None))

    def any_value() -> Expr:
        array = alt([seq(begin_array, list_of(value), end_array), lit("[]")])
        return alt([string, number, lit("true"), lit("false"), lit("null"), an_object, array])

    def any_object() -> Expr:
        return alt([seq(begin_object, list_of(seq(string, colon, value)), end_object), lit("{}")])

    value = grammar.shared("json value", any_value)
    an_object = grammar.shared("json object", any_object)
    return an_object
