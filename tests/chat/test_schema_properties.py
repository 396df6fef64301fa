"""Whatever a grammar lets a model write satisfies the schema, says an independent validator, and reads back."""

import json
import random

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.chat.grammar import AnswerFormat, answer_grammar, calls_grammar
from lfm.chat.grammar_calls import ToolGrammar
from lfm.chat.schema import read_schema
from lfm.chat.tool_calls import CallForm
from lfm.errors import RequestError
from tests.chat.grammar_walks import read_calls, text_of, tokenizer, walk
from tests.chat.schemas import BENCH, DEFINITIONS, JsonObject, as_document, schemas

CONTEXT = 32_768


def validator(schema: JsonObject) -> jsonschema.protocols.Validator:
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema)


def tool_schema(schema: JsonObject) -> JsonObject:
    """A tool with one argument of that schema, and another one."""
    inner = {key: value for key, value in schema.items() if key != "$defs"}
    return {
        "type": "object",
        "properties": {"value": inner, "times": {"type": "integer"}},
        "required": ["value"],
        "$defs": schema.get("$defs", {}),
    }


def call_spec(schema: JsonObject, form: CallForm):
    tool = ToolGrammar("f", read_schema(schema, param="p", max_tokens=CONTEXT))
    return calls_grammar([tool], special=tokenizer().special, form=form)


@settings(max_examples=80)
@given(schemas, st.sampled_from(["pythonic", "json"]), st.randoms(use_true_random=False))
def test_arguments_that_a_grammar_allows_satisfy_the_schema(
    schema: object, form: CallForm, choice: random.Random
) -> None:
    whole = tool_schema(as_document(schema))
    try:
        spec = call_spec(whole, form)
    except RequestError:
        return  # refused, and so not under-constrained
    ids = walk(spec, choice)
    if ids is None:
        return
    calls, text = read_calls(ids, cut=choice.randint(1, 30))
    assert text == ""
    assert calls
    for name, arguments in calls:
        assert name == "f"
        validator(whole).validate(json.loads(arguments))


@settings(max_examples=80)
@given(schemas, st.randoms(use_true_random=False))
def test_an_answer_that_a_grammar_allows_satisfies_the_schema(schema: object, choice: random.Random) -> None:
    whole = as_document(schema)
    try:
        spec = answer_grammar(AnswerFormat(schema=read_schema(whole, param="p", max_tokens=CONTEXT)))
    except RequestError:
        return
    ids = walk(spec, choice)
    if ids is not None:
        validator(whole).validate(json.loads(text_of(ids)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schema", BENCH, ids=range(len(BENCH)))
def test_common_schemas_are_supported_and_hold(schema: JsonObject, seed: int) -> None:
    spec = answer_grammar(AnswerFormat(schema=read_schema(schema, param="p", max_tokens=CONTEXT)))
    ids = walk(spec, random.Random(seed), patience=40)
    assert ids is not None
    validator(schema).validate(json.loads(text_of(ids)))


def test_most_random_schemas_are_not_refused() -> None:
    """The properties above would hold for a reader that refuses everything."""
    num_read = 0

    @settings(max_examples=60, database=None)
    @given(schemas)
    def count(schema: object) -> None:
        nonlocal num_read
        try:
            read_schema(as_document(schema), param="p", max_tokens=CONTEXT)
        except RequestError:
            return
        num_read += 1

    count()
    assert num_read > 40
    assert set(DEFINITIONS) == {"tree", "leaf"}
