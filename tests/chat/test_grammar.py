"""What grammars of calls and answers allow and forbid, written out text by text, and where they begin and end."""

import json
import random

import pytest

from lfm.chat.grammar import AnswerFormat, answer_grammar, calls_grammar
from lfm.chat.grammar_calls import ToolGrammar
from lfm.chat.grammar_formats import parse_answer_format
from lfm.chat.schema import read_schema
from lfm.chat.schema_regex import parse_regex
from lfm.chat.tokenizer import SpecialTokens
from lfm.chat.tool_calls import CallForm
from lfm.errors import RequestError
from lfm.protocol import GrammarSpec
from tests.chat.grammar_walks import allowed_ids, grammars, read_calls, tokenizer, walk

SPECIAL = tokenizer().special
CONTEXT = 32_768
FLAG = {"type": "boolean"}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "it's"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "options": {
            "type": "object",
            "properties": {"lang": {"type": ["string", "null"]}, "wind": {"type": "boolean"}},
            "required": ["lang"],
        },
    },
    "required": ["city", "unit"],
}


def tool(name: str, schema: object = None) -> ToolGrammar:
    return ToolGrammar(name, None if schema is None else read_schema(schema, param=name, max_tokens=CONTEXT))


TOOLS = [
    tool("get_weather", WEATHER),
    tool("now"),
    tool("files.find", {"type": "object", "properties": {"from": {"type": "string"}, "is there": {"type": "boolean"}}}),
    tool("note", {"type": "object"}),
]


def accepts(spec: GrammarSpec, text: str, *, is_block: bool = True, is_whole: bool = True) -> bool:
    """Whether the grammar allows the text, as a block of calls or as it is, and a stop token after it."""
    ids = tokenizer().encode(text)
    if is_block:
        ids = [SPECIAL.tool_call_start, *ids, *([SPECIAL.tool_call_end] if is_whole else [])]
    matcher = grammars().matcher(spec)
    return all(map(matcher.accept, ids)) and (not is_whole or SPECIAL.im_end in allowed_ids(matcher))


def weather(form: CallForm = "pythonic", *, is_parallel: bool = True) -> GrammarSpec:
    return calls_grammar(TOOLS, special=SPECIAL, form=form, is_parallel=is_parallel)


@pytest.mark.parametrize(
    "text",
    [
        '[get_weather(city="Bern", unit="celsius")]',
        "[get_weather(unit='celsius', city='Bern')]",
        '[get_weather(unit="it\'s", city="")]',
        "[get_weather(unit='it\\'s', city=\"\\u00e9 \\n \\x41 \\\"\")]",
        '[get_weather(days=14, city="Z\u00fcrich", unit="celsius")]',
        '[get_weather(city="x", unit="celsius", options={"lang": None, "wind": True})]',
        "[get_weather(city=\"x\", unit=\"celsius\", options={'lang': null, 'wind': false})]",
        "[now(), now()]",
        '[now(), get_weather(city="x", unit="celsius"), files.find(from="a")]',
        '[files.find(**{"is there": True})]',
        '[files.find(**{"is there": True}, from="x")]',
        "[files.find()]",
        '[note(a=1, b_2=[1.5, "x", {"y": None}], c=-0.5e3)]',
        "[note()]",
    ],
)
def test_pythonic_calls_as_the_model_writes_them_are_allowed(text: str) -> None:
    assert accepts(weather(), text)


@pytest.mark.parametrize(
    "text",
    [
        '[get_weather(city="Bern")]',  # a required argument is missing
        '[get_weather(city="Bern", unit="kelvin")]',
        '[get_weather(city="Bern", unit="celsius", city="Bern")]',
        '[get_weather(city="Bern", unit="celsius", humidity=1)]',
        '[get_weather(city=7, unit="celsius")]',
        '[get_weather(city="a\nb", unit="celsius")]',
        '[get_weather(city="\\ud800", unit="celsius")]',
        '[get_weather(city="x", unit="celsius", days=0)]',
        '[get_weather(city="x", unit="celsius", days=07)]',
        '[get_weather(city="x", unit="celsius", days=15)]',
        '[get_weather(city="x", unit="celsius", days=1.0)]',
        '[get_weather(city="x", unit="celsius", options={"wind": True})]',
        '[get_weather(city="x", unit="celsius",)]',
        '[get_weather("Bern", "celsius")]',
        "[tomorrow()]",
        "[now()",
        "now()",
        "[]",
        "[now(),now()]",
        "[now()] and more",
        '[{"name": "now", "arguments": {}}]',
    ],
)
def test_calls_that_break_the_schema_are_not_allowed(text: str) -> None:
    assert not accepts(weather(), text)


def test_the_json_form_has_its_own_grammar() -> None:
    spec = weather("json")
    arguments = '{"city": "Bern", "unit": "celsius", "options": {"lang": null}}'
    assert accepts(spec, f'[{{"name": "get_weather", "arguments": {arguments}}}, {{"name": "now", "arguments": {{}}}}]')
    assert accepts(spec, '[{"name": "note", "arguments": {"any name": [true]}}]')
    assert not accepts(spec, '[{"name": "get_weather", "arguments": {"city": "Bern"}}]')
    assert not accepts(spec, '[{"name": "later", "arguments": {}}]')
    assert not accepts(spec, "[now()]")


@pytest.mark.parametrize("form", ["pythonic", "json"])
def test_without_parallel_calls_a_block_has_one(form: CallForm) -> None:
    for seed in range(5):
        ids = walk(weather(form, is_parallel=False), random.Random(seed))
        assert ids is not None
        assert len(read_calls(ids)[0]) == 1


def test_a_block_holds_at_most_128_calls() -> None:
    spec = calls_grammar([tool("f")], special=SPECIAL)
    assert accepts(spec, "[" + ", ".join(["f()"] * 128) + "]")
    assert not accepts(spec, "[" + ", ".join(["f()"] * 129) + "]")


def test_auto_is_free_until_the_block_opens_and_ends_with_it() -> None:
    spec = weather()
    assert spec.trigger_id == SPECIAL.tool_call_start
    matcher = grammars().matcher(spec)
    for token_id in tokenizer().encode("Let me look: [not_a_call("):
        assert not matcher.needs_mask
        assert matcher.accept(token_id)
    assert matcher.accept(SPECIAL.tool_call_start)
    assert matcher.needs_mask
    for token_id in [*tokenizer().encode("[now()]"), SPECIAL.tool_call_end]:
        assert matcher.accept(token_id)
    assert matcher.is_finished
    assert set(allowed_ids(matcher)) == set(tokenizer().stop_token_ids)  # no echo, no second block


def test_required_forces_the_token_that_opens_a_block() -> None:
    spec = calls_grammar(TOOLS, special=SPECIAL, is_required=True)
    assert spec.trigger_id is None
    assert allowed_ids(grammars().matcher(spec)) == [SPECIAL.tool_call_start]


def test_a_single_tool_is_forced_up_to_its_first_choice() -> None:
    spec = calls_grammar([TOOLS[0]], special=SPECIAL, form="json", is_required=True)
    forced = grammars().matcher(spec).take_forced()
    assert forced[0] == SPECIAL.tool_call_start
    text = '[{"name": "get_weather", "arguments": {"city": "'
    assert forced[1:] == tokenizer().encode(text)


def test_tools_and_a_response_format_make_either_a_call_or_an_answer() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    answer = AnswerFormat(schema=read_schema(schema, param="p", max_tokens=CONTEXT))
    either = calls_grammar(TOOLS, special=SPECIAL, answer=answer)
    assert either.trigger_id is None
    assert accepts(either, "[now()]")
    assert accepts(either, '{"a": 1}', is_block=False)
    assert not accepts(either, "hello", is_block=False, is_whole=False)
    assert not accepts(either, "[now()]", is_block=False, is_whole=False)
    only_calls = calls_grammar(TOOLS, special=SPECIAL, answer=answer, is_required=True)
    assert not accepts(only_calls, '{"a": 1}', is_block=False, is_whole=False)


def test_tools_and_a_lark_grammar_keep_their_names_apart() -> None:
    """What the client calls its rules and terminals, and what it ignores, is no matter of ours."""
    lark = 'start: T1 ("+" T1)* | r2 d0?\nT1: /[0-9]+/\nr2: "["\nd0: "yes"\nanswer: "x"\n%ignore " "\n'
    answer, _ = parse_answer_format({"type": "grammar", "grammar": lark}, max_tokens=CONTEXT)
    either = calls_grammar(TOOLS, special=SPECIAL, answer=answer)
    assert either.trigger_id is None
    for text in ("1", "1 + 23", "[", "[yes"):
        assert accepts(either, text, is_block=False), text
    for text in ("1+", "+", "x", "[now()]", "["):
        is_block = text == "["
        assert not accepts(either, text, is_block=is_block), text
    assert accepts(either, "[now()]")
    assert not accepts(either, "[now( )]", is_whole=False), "what the client ignores, it ignores in its answer"
    only_calls = calls_grammar(TOOLS, special=SPECIAL, answer=answer, is_required=True)
    assert not accepts(only_calls, "1", is_block=False, is_whole=False)


@pytest.mark.parametrize("char", ["\x00", "\x1f", "\x7f", "\x85", "\u2028", "\ufeff", "\uffff", "\U0001f600"])
@pytest.mark.parametrize("form", ["pythonic", "json"])
def test_any_character_may_stand_in_names_and_choices(char: str, form: CallForm) -> None:
    raw = {"type": "object", "properties": {char: {"enum": [char, f"{char}-", 1]}}, "required": [char]}
    schema = read_schema(raw, param="p", max_tokens=CONTEXT)
    spec = calls_grammar([ToolGrammar("f", schema)], special=SPECIAL, form=form)
    ids = walk(spec, random.Random(1))
    assert ids is not None
    calls, _ = read_calls(ids)
    for _, arguments in calls:
        assert json.loads(arguments)[char] in (char, f"{char}-", 1)


@pytest.mark.parametrize("form", ["pythonic", "json"])
def test_a_count_that_no_grammar_keeps_is_refused_with_the_path_of_its_schema(form: CallForm) -> None:
    counted = {"type": "object", "minProperties": 3}
    many = {"type": "object", "properties": {f"k{i}": FLAG for i in range(70)}, "minProperties": 2}
    for raw in (counted, many, {"type": "object", "properties": {"a": counted}}):
        schema = read_schema(raw, param="tools[3].parameters", max_tokens=CONTEXT)
        with pytest.raises(RequestError) as caught:
            calls_grammar([*TOOLS, ToolGrammar("f", schema)], special=SPECIAL, form=form)
        assert caught.value.param == "tools[3].parameters"
        with pytest.raises(RequestError) as caught:
            answer_grammar(AnswerFormat(schema=schema))
        assert caught.value.param == "tools[3].parameters"
        with pytest.raises(RequestError) as caught:
            calls_grammar(TOOLS, special=SPECIAL, form=form, answer=AnswerFormat(schema=schema))
        assert caught.value.param == "tools[3].parameters"


def test_a_model_without_call_tokens_cannot_have_tools() -> None:
    with pytest.raises(RequestError) as caught:
        calls_grammar(TOOLS, special=SpecialTokens(bos=1, im_start=6, im_end=7))
    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ("{}", True),
        ('{"a":1}', True),
        ('{"a": [1, {"b": null}], "c": "x\\n"}', True),
        ('{\n  "a": 1,\n  "b": [\n    true\n  ]\n}', True),
        ('{"\\ud83d\\ude00": -1.5e3}', True),
        ("[1]", False),
        ('{"a": 01}', False),
        ('{"a": NaN}', False),
        ('{"a": "\n"}', False),
        ("{'a': 1}", False),
        ('{"a": 1}}', False),
        ('{"a":          1}', False),  # no endless white space
    ],
)
def test_a_json_object_of_any_shape(text: str, is_allowed: bool) -> None:
    assert accepts(answer_grammar(AnswerFormat()), text, is_block=False) is is_allowed


def test_a_regular_expression_holds_the_whole_answer() -> None:
    answer, notes = parse_answer_format({"type": "regex", "pattern": "(yes|no)[!.]?"}, max_tokens=CONTEXT)
    assert answer == AnswerFormat(regex=parse_regex("^(?:(yes|no)[!.]?)$"))
    assert notes == ()
    spec = answer_grammar(answer)
    assert accepts(spec, "yes!", is_block=False)
    assert accepts(spec, "no", is_block=False)
    assert not accepts(spec, "maybe", is_block=False)
    assert not accepts(spec, "yes!!", is_block=False)


def test_a_lark_grammar_holds_the_answer() -> None:
    lark = '%llguidance {}\nstart: "<" NAME ">" // a comment with <|im_end|>\nNAME: /[a-z<]+/\n%ignore /[ ]/'
    answer, _ = parse_answer_format({"type": "grammar", "grammar": lark}, max_tokens=CONTEXT)
    assert answer is not None
    spec = answer_grammar(answer)
    assert accepts(spec, "<abc>", is_block=False)
    assert not accepts(spec, "<ABC>", is_block=False, is_whole=False)


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("json", "response_format"),
        ({"type": "xml"}, "response_format.type"),
        ({}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "x" * 65, "schema": {}}}, "response_format.json_schema.name"),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}},
            "response_format.json_schema.schema.not",
        ),
        ({"type": "json_object", "schema": {"type": "thing"}}, "response_format.schema.type"),
        ({"type": "regex"}, "response_format.pattern"),
        ({"type": "regex", "pattern": "a)|(b"}, "response_format.pattern"),
        ({"type": "regex", "pattern": "(?=a)"}, "response_format.pattern"),
        ({"type": "grammar", "grammar": 7}, "response_format.grammar"),
        ({"type": "grammar", "grammar": "start: <|im_end|>"}, "response_format.grammar"),
        ({"type": "grammar", "grammar": "start: <[10]>"}, "response_format.grammar"),
        (
            {"type": "grammar", "grammar": 'start: %json {"type": "array", "minItems": 999999}'},
            "response_format.grammar",
        ),
        ({"type": "grammar", "grammar": "start: @other"}, "response_format.grammar"),
        # What the library reads as two expressions with something between them must not look like one to us.
        ({"type": "grammar", "grammar": "start: /a\n/ <[10]> /b\n/"}, "response_format.grammar"),
        ({"type": "grammar", "grammar": "start: /a\n/ %json {} /b\n/"}, "response_format.grammar"),
        ({"type": "grammar", "grammar": 'start: "a\n" <[10]> "b\n"'}, "response_format.grammar"),
        ({"type": "grammar", "grammar": "start: /*a/ <[10]> /b/"}, "response_format.grammar"),
        ({"type": "grammar", "grammar": "start[max_tokens=3]: /a+/"}, "response_format.grammar"),
        ({"type": "grammar", "grammar": "start: /" + "a" * 70_000 + "/"}, "response_format.grammar"),
        ({"type": "grammar", "grammar": 'start: "\ud800"'}, "response_format.grammar"),
    ],
)
def test_a_response_format_that_cannot_be_held_is_refused_by_path(value: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_answer_format(value, max_tokens=CONTEXT)
    assert caught.value.param == param


def test_what_we_take_for_text_of_a_lark_grammar_is_text_to_the_library() -> None:
    """No token and no reference that the library sees may get past our search for them, whatever stands around it."""
    choice = random.Random(7)
    complaints = []

    def quoted() -> str:
        quote = choice.choice(['"', "/", "#", "//"])
        return quote + "".join(choice.choices('a\n\\"/#*[|\r\u2028', k=choice.randint(1, 3))) + quote

    for _ in range(4000):
        text = f"start: {quoted()} {choice.choice(['<|unknown|>', '@unknown'])} {quoted()}"
        try:
            answer, _ = parse_answer_format({"type": "grammar", "grammar": text}, max_tokens=CONTEXT)
        except RequestError:
            continue
        assert answer is not None
        try:
            grammars().matcher(answer_grammar(answer))
            complaints.append("")
        except RequestError as error:
            complaints.append(error.message)
    assert not [one for one in complaints if "unknown special token" in one or "unknown grammar" in one]
    assert complaints.count("") > 50


def test_a_text_that_looks_like_another_kind_of_grammar_stays_lark() -> None:
    """The library also takes JSON; with it a client could bring a schema past our reading of it."""
    smuggled = '{"grammars": [{"json_schema": {"type": "array", "minItems": 1000000}}]}'
    answer, _ = parse_answer_format({"type": "grammar", "grammar": smuggled}, max_tokens=CONTEXT)
    assert answer is not None
    with pytest.raises(RequestError):
        grammars().matcher(answer_grammar(answer))


def test_plain_text_needs_no_grammar() -> None:
    assert parse_answer_format(None, max_tokens=CONTEXT) == (None, ())
    assert parse_answer_format({"type": "text"}, max_tokens=CONTEXT) == (None, ())


@pytest.mark.parametrize("count", [1, 40, 65, 400])
@pytest.mark.parametrize("form", ["pythonic", "json"])
def test_objects_of_many_optional_members_are_written(count: int, form: CallForm) -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "boolean"} for i in range(count)}}
    spec = calls_grammar([tool("f", schema)], special=SPECIAL, form=form)
    last = count - 1
    if form == "json":
        assert accepts(spec, '[{"name": "f", "arguments": {}}]')
        assert accepts(spec, f'[{{"name": "f", "arguments": {{"p{last}": true}}}}]')
        assert accepts(
            spec,
            f'[{{"name": "f", "arguments": {{"p0": true{f", {chr(34)}p{last}{chr(34)}: true" if last else ""}}}}}]',
        )
        assert not accepts(spec, '[{"name": "f", "arguments": {"p0": true, "p0": true}}]')
    else:
        assert accepts(spec, "[f()]")
        assert accepts(spec, f"[f(p{last}=True)]")
        assert not accepts(spec, "[f(p0=True, p0=True)]")


def test_counted_members_leave_room_for_the_required_ones() -> None:
    """Found by random walks: an optional member used up the count, and the required one had no room any more."""
    schema = {"type": "object", "properties": {"a": FLAG, "b": FLAG}, "required": ["b"], "maxProperties": 1}
    for form in ("pythonic", "json"):
        spec = calls_grammar([tool("f", schema)], special=SPECIAL, form=form)
        for seed in range(5):
            assert walk(spec, random.Random(seed), patience=10) is not None
