"""Tool calls out of text: every slip that was seen, any cutting of the stream, the way back from a rendered call."""

import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.chat.call_parser import CallReader, Piece
from lfm.chat.call_parser_lenient import ParsedCall, parse_block
from lfm.chat.call_parser_stream import CallDelta, CallStream
from lfm.chat.messages import ToolCall
from lfm.chat.tool_calls import render_calls, render_json_calls
from tests.chat.grammar_walks import join_pieces

Calls = list[tuple[str, object]]


def parse(block: str) -> tuple[Calls, list[str]]:
    """The calls of a block with decoded arguments, and the texts that are no calls."""
    found = parse_block(block)
    calls = [(one.name, json.loads(one.arguments)) for one in found if isinstance(one, ParsedCall)]
    return calls, [one for one in found if isinstance(one, str)]


def stream(block: str, cuts: list[int]) -> tuple[Calls, CallStream]:
    reader = CallStream(make_id=lambda: "call_1")
    deltas = [delta for piece in cut(block, cuts) for delta in reader.push(piece)]
    calls, _ = join_pieces([CallDelta(one.index, f"call_{one.index}", one.name, one.arguments) for one in deltas])
    return [(name, json.loads(arguments)) for name, arguments in calls], reader


def cut(text: str, cuts: list[int]) -> list[str]:
    """The text in pieces of the given lengths, over and over."""
    pieces = []
    while text:
        for length in cuts:
            pieces.append(text[:length])
            text = text[length:]
    return pieces


SLIPS = [
    ("brackets in a string", '[f(a="x]) [y(", b=1)]', {"a": "x]) [y(", "b": 1}),
    ("a raw newline, tab and NUL in a string", '[f(a="1\n2\t3\x004")]', {"a": "1\n2\t3\x004"}),
    ("a trailing backslash", r'[f(a="C:\temp\", b=1)]', {"a": "C:\temp\\", "b": 1}),
    ("quotes of the same kind in a string", "[f(command='sed -n '1,9p' f')]", {"command": "sed -n '1,9p' f"}),
    ("a leading zero", "[f(month=07, x=00)]", {"month": 7, "x": 0}),
    ("signs", "[f(a=-5, b=+3, c=- 1.5)]", {"a": -5, "b": 3, "c": -1.5}),
    ("odd numbers", "[f(a=.5, b=5., c=1_000, d=0x1F, e=1E2)]", {"a": 0.5, "b": 5.0, "c": 1000, "d": 31, "e": 100.0}),
    ("tuples and sets", "[f(a=(1, 2), b={3, 4}, c=(5), d=(6,))]", {"a": [1, 2], "b": [3, 4], "c": 5, "d": [6]}),
    ("keywords of Python as names", "[f(from=1, class='x', None=2)]", {"from": 1, "class": "x", "None": 2}),
    ("an f-string without placeholders", "[f(a=f'x', b=rf'\\d')]", {"a": "x", "b": "\\d"}),
    ("unpacking", '[f(**{"a": 1, "b c": 2}, d=3)]', {"a": 1, "b c": 2, "d": 3}),
    ("white space after the start marker", "  \n[f(a=1)]", {"a": 1}),
    ("white space everywhere", "[ f ( a = 1 , b = [ 2 , 3 ] ) ]", {"a": 1, "b": [2, 3]}),
    ("no white space at all", '[f(a=1,b=[2,3],c={"x":1})]', {"a": 1, "b": [2, 3], "c": {"x": 1}}),
    ("a missing bracket at the end", "[f(a=1)", {"a": 1}),
    ("no brackets", "f(a=1)", {"a": 1}),
    ("trailing commas", "[f(a=[1, 2,], b={'x': 1,},),]", {"a": [1, 2], "b": {"x": 1}}),
    ("JSON words", "[f(a=true, b=null, c=[false, None])]", {"a": True, "b": None, "c": [False, None]}),
    ("triple quotes", "[f(a='''it's \"x\"''')]", {"a": "it's \"x\""}),
    ("strings side by side", "[f(a='x' \"y\")]", {"a": "xy"}),
    ("escapes of both languages", r'[f(a="\x41\u00e9\U0001F600\/\'\101\q")]', {"a": "A\u00e9\U0001f600/'A\\q"}),
    ("a surrogate pair", r'[f(a="\ud83d\ude00")]', {"a": "\U0001f600"}),
    ("half a surrogate pair", r'[f(a="\ud83d!")]', {"a": "\ufffd!"}),
    ("keys that are no strings", "[f(a={1: 2, True: 3, None: 4})]", {"a": {"1": 2, "true": 3, "null": 4}}),
    ("JSON form", '[{"name": "f", "arguments": {"a": [1, {"b": null}]}}]', {"a": [1, {"b": None}]}),
    ("JSON form with text for arguments", r'[{"name": "f", "arguments": "{\"a\": 1}"}]', {"a": 1}),
    ("JSON form with parameters", '[{"name": "f", "parameters": {"a": 1}}]', {"a": 1}),
    ("JSON form of one call", '{"name": "f", "arguments": {}}', {}),
]  # fmt: skip


@pytest.mark.parametrize(("block", "arguments"), [slip[1:] for slip in SLIPS], ids=[slip[0] for slip in SLIPS])
def test_a_slip_that_has_one_meaning_is_read(block: str, arguments: dict[str, object]) -> None:
    assert parse(block) == ([("f", arguments)], [])


@pytest.mark.parametrize(
    ("block", "names", "texts"),
    [
        ("[f(1), g(a=2)]", ["g"], ["f(1)"]),  # positional: nobody knows the name
        ("[f(a=b'x'), g(a=2j), h(a=1)]", ["h"], ["f(a=b'x')", "g(a=2j)"]),  # no JSON
        ("[f(a=f'{x}'), g()]", ["g"], ["f(a=f'{x}')"]),
        ("[f(a=other), g()]", ["g"], ["f(a=other)"]),
        ("[f(a='it's', b='x')]", [], ["f(a='it's', b='x')]"]),  # two ways of reading it
        ("[f(a=1e999), g()]", ["g"], ["f(a=1e999)"]),
        ("[f(a=1)] thanks", ["f"], ["thanks"]),
        ("[f(a=1) g(b=2)]", ["f", "g"], []),
        ("let me see", [], ["let me see"]),
        ('[{"name": "f", "arguments": {}}, {"nome": "g"}]', ["f"], ['{"nome": "g"}']),
        ('[{"name": "f", "arguments": [1]}]', [], ['{"name": "f", "arguments": [1]}']),
        ('[{"name": "f", "argu', [], ['[{"name": "f", "argu']),
        ("[f(a=" + "[" * 5000 + "]" * 5000 + ")]", [], ["f(a=" + "[" * 5000 + "]" * 5000 + ")"]),
        ("[]", [], []),  # no call, and nothing to show
        ("", [], []),
        ("   [  ]", [], []),
    ],
)
def test_what_has_no_meaning_or_two_stays_text_and_keeps_its_siblings(
    block: str, names: list[str], texts: list[str]
) -> None:
    calls, left = parse(block)
    assert [name for name, _ in calls] == names
    assert left == texts


@pytest.mark.parametrize(
    "block",
    [
        "[f(a='" + "'1', " * 5000,
        "[f(" * 5000,
        "'" * 20_000,
        "[" + "f(x), " * 4000 + "]",
        "[f(a=" + "{" * 20_000,
        "(" * 9000,
        "[" + "f(a='x'y'), " * 2000,
    ],
)
def test_hostile_blocks_end_soon(block: str) -> None:
    started = time.process_time()
    parse(block)
    assert time.process_time() - started < 2


@given(st.text(alphabet="[](){}'\"\\=,:*f a1.-_bjxuN\n\u00e9", max_size=40))
def test_no_text_raises_and_calls_that_are_found_have_arguments(text: str) -> None:
    for block in (text, f"[f({text})]"):
        calls, _ = parse(block)
        assert all(isinstance(arguments, dict) for _, arguments in calls)
    reader = CallReader(is_constrained=True)
    pieces = [*reader.open(), *reader.push(text), *reader.finish()]
    assert {one.index for one in pieces if isinstance(one, CallDelta)} <= set(range(len(text)))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
argument_names = st.sampled_from(["a", "class", "x-y", "first name", "\u00e9", "", "a=b"])
calls = st.lists(
    st.builds(
        lambda name, arguments: ToolCall(name=name, arguments=arguments),
        st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True),
        st.dictionaries(argument_names, json_values, max_size=3),
    ),
    min_size=1,
    max_size=3,
)


def same(found: object, expected: object) -> bool:
    """Equality of JSON values: 1 is not True, and a float is a float."""
    if isinstance(expected, float):
        return isinstance(found, float) and math.copysign(1, found) == math.copysign(1, expected) and found == expected
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, dict):
        return isinstance(found, dict) and found.keys() == expected.keys() and all(
            same(found[key], value) for key, value in expected.items()
        )  # fmt: skip
    return type(found) is type(expected) and found == expected


@given(calls, st.lists(st.integers(1, 7), min_size=1, max_size=4), st.booleans())
def test_rendered_calls_read_back_as_what_they_were(made: list[ToolCall], cuts: list[int], is_json: bool) -> None:
    """Through both readers, and the streaming one in any pieces."""
    block = render_json_calls(made) if is_json else render_calls(made)
    expected = [(call.name, call.arguments) for call in made]
    whole, texts = parse(block)
    streamed, reader = stream(block, cuts)
    assert reader.is_complete
    assert not reader.is_broken
    assert texts == []
    for found in (whole, streamed):
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert all(same(value, wanted) for (_, value), (_, wanted) in zip(found, expected, strict=True))


def test_arguments_stream_as_they_are_written() -> None:
    reader = CallReader(is_constrained=True, make_id=iter(["call_a", "call_b"]).__next__)
    assert reader.push("One moment. ") == ["One moment. "]
    assert reader.open() == []
    assert reader.push("[get_wea") == []
    assert reader.push('ther(city="Be') == [CallDelta(0, "call_a", "get_weather", '{"city": "Be')]
    assert reader.push('rn", days=1') == [CallDelta(0, "call_a", None, 'rn", "days": 1')]
    assert reader.push("4), now(") == [CallDelta(0, "call_a", None, "4}"), CallDelta(1, "call_b", "now", "{")]
    assert reader.push(")]") == [CallDelta(1, "call_b", None, "}")]
    assert reader.close() == []
    assert reader.finish() == []
    assert reader.num_calls == 2


def test_the_json_form_streams_its_arguments_as_they_are() -> None:
    reader = CallReader(is_constrained=True, make_id=lambda: "call_a")
    reader.open()
    assert reader.push('[{"name": "f", "argu') == []
    assert reader.push('ments": {"a": "}\\"", ') == [CallDelta(0, "call_a", "f", '{"a": "}\\"", ')]
    assert reader.push('"b": [{}]}}]') == [CallDelta(0, "call_a", None, '"b": [{}]}')]


def test_an_escape_is_held_until_it_is_whole() -> None:
    reader = CallStream(make_id=lambda: "call_a")
    written = [reader.push(piece) for piece in ('[f(a="', "\\", "u00", 'e9\\ud83d\\ude00\\n")]')]
    assert [delta.arguments for deltas in written for delta in deltas] == ['{"a": "', '\u00e9\U0001f600\\n"}']


def test_a_block_that_is_cut_short_keeps_what_was_written() -> None:
    """As when max_tokens ends it: the arguments are incomplete, and the finish reason says so."""
    reader = CallReader(is_constrained=True, make_id=lambda: "call_a")
    reader.open()
    pieces: list[Piece] = [*reader.push('[f(a="x'), *reader.finish()]
    assert pieces == [CallDelta(0, "call_a", "f", '{"a": "x')]
    reader = CallReader(is_constrained=True)
    reader.open()
    assert [*reader.push("[get_w"), *reader.finish()] == []  # the begin of a call is no text of the answer


ANSWERS = [
    ("Sure.", "[f(a=1)]", ""),
    ("", "[f(a=1), g(b='x')]", "[f(a=1), g(b='x')]"),  # the model repeats the block
    ("", "[f(a=1)]", "\n[f(a=1)] and then prose"),
    ("", "[f(a=1)]", "[f(a=2)] is what I meant"),
    ("", "[f(1)]", "hm"),
    ("a", "no call", "b"),
]


@pytest.mark.parametrize(("before", "block", "after"), ANSWERS)
@pytest.mark.parametrize("cuts", [[1], [3], [2, 5], [1000]])
def test_without_a_grammar_any_cutting_gives_the_same(before: str, block: str, after: str, cuts: list[int]) -> None:
    def read(lengths: list[int]) -> tuple[list[tuple[str, str]], str]:
        reader = CallReader(is_constrained=False)
        pieces = [piece for text in cut(before, lengths) for piece in reader.push(text)]
        pieces += reader.open()
        pieces += [piece for text in cut(block, lengths) for piece in reader.push(text)]
        pieces += reader.close()
        pieces += [piece for text in cut(after, lengths) for piece in reader.push(text)]
        return join_pieces([*pieces, *reader.finish()])

    assert read(cuts) == read([10_000])


def test_a_repeated_block_is_dropped_and_other_text_is_kept() -> None:
    def text_after(block: str, after: str, *, orphan: bool = False) -> str:
        reader = CallReader(is_constrained=False)
        reader.open()
        reader.push(block)
        reader.close()
        pieces = [piece for char in after for piece in reader.push(char)]
        if orphan:
            pieces += reader.close()
        return join_pieces([*pieces, *reader.finish()])[1]

    assert text_after("[f(a=1)]", "[f(a=1)]") == ""
    assert text_after("[f(a=1)]", "[f(a=1", orphan=True) == ""
    assert text_after("[f(a=1)]", "\n[f(a=1)]Done.") == "Done."
    assert text_after("[f(a=1)]", "Done.") == "Done."
    assert text_after("[f(a=1)]", "[f(a=2)]") == "[f(a=2)]"
    assert text_after("[f(a=1)]", "[f(") == "[f("


def test_several_blocks_number_their_calls_on() -> None:
    reader = CallReader(is_constrained=False)
    pieces: list[Piece] = []
    for block in ("[f()]", "[g()]"):
        pieces += reader.open()
        pieces += reader.push(block)
        pieces += reader.close()
    assert [piece.index for piece in pieces if isinstance(piece, CallDelta)] == [0, 1]
    assert len({piece.id for piece in pieces if isinstance(piece, CallDelta)}) == 2
