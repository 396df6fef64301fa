"""The tools of a request: definitions, choices and forms that are honoured, and those refused by their path."""

import pytest

from lfm.chat.grammar_formats import AnswerFormats, parse_answer_format
from lfm.chat.grammar_tools import (
    ANTHROPIC_TOOLS,
    MAX_SPECS,
    ToolChoice,
    ToolSet,
    ToolSets,
    call_form,
    parse_tool_choice,
)
from lfm.chat.messages import Message
from lfm.errors import RequestError
from tests.chat.grammar_walks import allowed_ids, grammars, tokenizer

CONTEXT = 32_768
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def function(name: object, parameters: object = None) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "description": "D", "parameters": parameters}}


def read(*tools: object) -> ToolSet:
    return ToolSets(max_tokens=CONTEXT).read(list(tools))


def test_definitions_become_the_bare_objects_that_the_model_was_trained_on() -> None:
    tools = read(function("a", CITY), {"name": "b"}, {"type": "function", "name": "c", "strict": True})
    assert tools.definitions == [{"name": "a", "description": "D", "parameters": CITY}, {"name": "b"}, {"name": "c"}]
    assert tools.names == ("a", "b", "c")
    assert tools.notes == ()


@pytest.mark.parametrize(
    "name", ["get weather", "", "f(x)", "a" * 129, "caf\u00e9", "a/b", "<|im_end|>", "f\n", 7, None]
)
def test_a_name_that_cannot_be_called_is_refused(name: object) -> None:
    with pytest.raises(RequestError) as caught:
        read(function("fine"), function(name))
    assert caught.value.param == "tools[1].function.name"


@pytest.mark.parametrize("name", ["a", "get-weather", "grocery.orderIngredients", "mcp__server__tool", "2fa", "class"])
def test_names_as_clients_use_them_are_accepted(name: str) -> None:
    assert read(function(name)).names == (name,)


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ("f", "tools[0]"),
        ({"type": "custom", "name": "f"}, "tools[0].type"),
        ({"type": "function", "function": "f"}, "tools[0].function"),
        (function("f", "{}"), "tools[0].function.parameters"),
        (function("f", {"type": "string"}), "tools[0].function.parameters"),
        (function("f", {"type": "array", "items": {}}), "tools[0].function.parameters"),
        (function("f", {"properties": {"a": {"not": {}}}}), "tools[0].function.parameters.properties.a.not"),
        ({"name": "f", "parameters": {"type": "object", "required": 1}}, "tools[0].parameters.required"),
        ({"name": "f", "description": 1}, "tools[0].description"),
        (function("f", {"x": "\ud800"}), "tools"),
    ],
)  # fmt: skip
def test_a_broken_definition_is_refused_under_its_path(tool: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(tool)
    assert caught.value.param == param


def test_tools_in_anthropics_form_have_their_schema_in_another_field() -> None:
    shelf = ToolSets(max_tokens=CONTEXT)
    raw = [{"name": "a", "description": "D", "input_schema": CITY}, {"type": "custom", "name": "b", "input_schema": {}}]
    tools = shelf.read(raw, syntax=ANTHROPIC_TOOLS)
    assert tools.definitions[0] == {"name": "a", "description": "D", "parameters": CITY}
    assert tools.names == ("a", "b")
    with pytest.raises(RequestError) as caught:
        shelf.read([{"name": "a", "input_schema": {"type": "array"}}], syntax=ANTHROPIC_TOOLS)
    assert caught.value.param == "tools[0].input_schema"
    for raw, param in (([{"type": "web_search_20250305", "name": "web_search"}], "tools[0].type"),):
        with pytest.raises(RequestError) as caught:
            shelf.read(raw, syntax=ANTHROPIC_TOOLS)
        assert caught.value.param == param


def test_duplicates_and_too_many_tools_are_refused() -> None:
    with pytest.raises(RequestError, match="used twice"):
        read(function("f"), function("f"))
    with pytest.raises(RequestError, match="512"):
        read(*[function(f"f{i}") for i in range(513)])
    wide = {"type": "object", "properties": {"a": {"type": "string", "description": "x" * 60_000}}}
    with pytest.raises(RequestError, match="1048576"):
        read(*[function(f"f{i}", wide) for i in range(18)])
    with pytest.raises(RequestError, match="65536"):
        read(function("f", {**wide, "title": "x" * 6_000}))


def test_strict_is_a_boolean_though_it_changes_nothing() -> None:
    for strict in (True, False, None):
        read({"type": "function", "function": {"name": "f", "strict": strict}})
    with pytest.raises(RequestError, match="Allowed: a boolean") as caught:
        read({"type": "function", "function": {"name": "f", "strict": "yes"}})
    assert caught.value.param == "tools[0].function.strict"
    with pytest.raises(RequestError) as caught:
        parse_answer_format(
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": 1}}, max_tokens=100
        )
    assert caught.value.param == "response_format.json_schema.strict"


def test_parameters_that_say_nothing_mean_no_arguments() -> None:
    tools = read({"name": "a"}, {"name": "b", "parameters": {}}, {"name": "c", "parameters": None})
    text = tools.grammar(ToolChoice(), special=tokenizer().special).text
    assert all(f'"{name}()"' in text for name in "abc")


def test_the_same_tools_are_read_once_and_old_ones_are_forgotten() -> None:
    shelf = ToolSets(max_tokens=CONTEXT, max_bytes=2000)
    first = shelf.read([function("a", CITY)])
    assert shelf.read([function("a", CITY)]) is first
    spec = first.grammar(ToolChoice(), special=tokenizer().special)
    assert first.grammar(ToolChoice(), special=tokenizer().special) is spec
    for index in range(30):
        shelf.read([function(f"b{index}", CITY)])
    assert shelf.read([function("a", CITY)]) is not first


def test_the_same_answer_format_is_read_once_and_makes_the_same_grammar_with_tools() -> None:
    shelf, tools = AnswerFormats(max_tokens=CONTEXT, max_bytes=2000), read(function("a", CITY))
    value = {"type": "json_schema", "schema": {**CITY, "x-note": 1}}
    first, notes = shelf.read(value)
    assert shelf.read(dict(value)) == (first, notes)
    assert shelf.read(value)[0] is first
    assert len(notes) == 1
    specs = [tools.grammar(ToolChoice(), special=tokenizer().special, answer=shelf.read(value)[0]) for _ in range(2)]
    assert specs[0] is specs[1]
    assert tools.grammar(ToolChoice(), special=tokenizer().special) != specs[0]
    for index in range(60):
        other, _ = shelf.read({"type": "regex", "pattern": f"a{{{index}}}"})
        assert tools.grammar(ToolChoice(), special=tokenizer().special, answer=other) != specs[0]
    assert len(tools._specs) == MAX_SPECS
    assert shelf.read(value)[0] is not first
    with pytest.raises(RequestError) as caught:
        shelf.read({"type": "regex", "pattern": "("}, param="text.format")
    assert caught.value.param == "text.format.pattern"


@pytest.mark.parametrize(
    ("value", "choice"),
    [
        (None, ToolChoice("auto")),
        ("auto", ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "function": {"name": "a"}}, ToolChoice("required", frozenset("a"))),
        ({"type": "function", "name": "b"}, ToolChoice("required", frozenset("b"))),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"function": {"name": "a"}}]}},
            ToolChoice("auto", frozenset("a")),
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "a"}, {"name": "b"}]},
            ToolChoice("required", frozenset("ab")),
        ),
    ],
)  # fmt: skip
def test_every_form_of_tool_choice_is_read(value: object, choice: ToolChoice) -> None:
    assert parse_tool_choice(value, ["a", "b"]) == choice


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("any", "tool_choice"),
        (7, "tool_choice"),
        ({"type": "custom"}, "tool_choice.type"),
        ({"type": "function", "function": {"name": "z"}}, "tool_choice.function.name"),
        ({"type": "function", "function": {}}, "tool_choice.function.name"),
        ({"type": "function", "name": "z"}, "tool_choice.name"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "never", "tools": []}}, "tool_choice.allowed_tools.mode"),
        ({"type": "allowed_tools", "allowed_tools": {"tools": []}}, "tool_choice.allowed_tools.tools"),
        ({"type": "allowed_tools", "tools": [{"name": "z"}]}, "tool_choice.tools[0].name"),
    ],
)
def test_a_tool_choice_that_cannot_be_honoured_is_refused(value: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_tool_choice(value, ["a", "b"])
    assert caught.value.param == param


def test_without_tools_nothing_can_be_required() -> None:
    assert parse_tool_choice("auto", []) == ToolChoice("none")
    with pytest.raises(RequestError):
        parse_tool_choice("required", [])


def test_a_choice_of_tools_narrows_the_grammar_and_not_the_prompt() -> None:
    tools = read(function("first"), function("second"))
    spec = tools.grammar(ToolChoice("required", frozenset(["second"])), special=tokenizer().special)
    assert "second()" in spec.text
    assert "first" not in spec.text
    assert allowed_ids(grammars().matcher(spec)) == [tokenizer().special.tool_call_start]
    assert len(tools.definitions) == 2


def test_the_form_of_calls_follows_the_request_then_the_system_prompt() -> None:
    asks = [
        Message(role="system", content="Be brief. Output function calls as JSON."),
        Message(role="user", content="x"),
    ]
    assert call_form(asks) == "json"
    assert call_form(asks, "pythonic") == "pythonic"
    assert call_form([Message(role="user", content="Output function calls as JSON")]) == "pythonic"
    assert call_form([], "json") == "json"
    with pytest.raises(RequestError):
        call_form([], "xml")
