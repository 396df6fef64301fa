"""Patterns of JSON Schemas: which texts their languages hold, and which patterns are refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.chat.schema_automaton import Automaton, Work, shortest_length
from lfm.chat.schema_formats import FORMATS
from lfm.chat.schema_nodes import SchemaError
from lfm.chat.schema_regex import RegexError, min_length, parse_regex


def matches(pattern: str, text: str) -> bool:
    return Automaton(parse_regex(pattern), Work()).matches(text, Work())


@pytest.mark.parametrize(
    ("pattern", "text", "is_match"),
    [
        ("foo", "a foo b", True),
        ("^foo$", "a foo b", False),
        ("^a|b$", "axx", True),
        ("^a|b$", "xxb", True),
        ("^a|b$", "xax", False),
        ("(^a|b)c", "ac", True),
        ("(^a|b)c", "xbc", True),
        ("(^a|b)c", "xac", False),
        ("^$", "", True),
        ("", "anything", True),
        (r"^\d{2,3}$", "12", True),
        (r"^\d{2,3}$", "1234", False),
        (r"^[^\w]+$", "!?", True),
        (r"^[^\w]+$", "\u00e9", False),  # a word character to Python, so never generated
        (r"^\D$", "\u0661", False),  # a digit to Python
        (r"^\w$", "\u00e9", False),
        (r"^\S$", "\u00a0", False),
        ("^.$", "\n", False),
        ("^.$", "\u2028", False),
        (r"^\u00e9\x41\u{1F600}\cJ$", "\u00e9A\U0001f600\n", True),
        (r"^\ud83d\ude00$", "\U0001f600", True),
        (r"^[a\-z]$", "-", True),
        (r"^[\d-]$", "-", True),
        (r"^(?<year>\d{4})-(?P<month>\d\d)$", "2026-11", True),
        (r"^x{2}y{0}z*?$", "xxzz", True),
        ("^{a}$", "{a}", True),
    ],
)
def test_the_language_of_a_pattern(pattern: str, text: str, is_match: bool) -> None:
    assert matches(pattern, text) is is_match


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(?=a)a", "look-around"),
        ("(?<!a)b", "look-around"),
        (r"(a)\1", r"\\1 is not supported"),
        (r"\bword\b", r"\\b"),
        (r"\p{L}", r"\\p"),
        ("(?i)a", "group"),
        ("a++", "possessive"),
        ("a{,3}", "two meanings"),
        ("a**", "two repetitions"),
        ("(", "closed|middle"),
        (")", "unmatched"),
        ("[a", "middle"),
        ("[z-a]", "wrong way"),
        ("[[:alpha:]]", "POSIX"),
        ("a^b", "ends of the pattern"),
        ("(^a)+", "repeated"),
        ("a{5,2}", "contradict"),
        ("((a{1,99}b){1,99}c){1,99}", "20000"),
        ("a{999999}", "100000"),
        ("(" * 50 + ")" * 50, "nested"),
        ("a" * 5000, "characters"),
        ("\ud800", "lone surrogate"),
        ("[^\\s\\S]", "no text"),
    ],
)
def test_a_pattern_that_cannot_be_generated_from_is_refused(pattern: str, reason: str) -> None:
    with pytest.raises(RegexError, match=reason):
        parse_regex(pattern)


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|aa)+$", "^(a*)*$", r"^(\w+\s?)+$", "^(x+x+)+y$"])
def test_catastrophic_patterns_are_followed_in_linear_time(pattern: str) -> None:
    text = "x" * 2000
    work = Work(200_000)  # backtracking would take 2**2000 steps
    assert Automaton(parse_regex(pattern), work).matches(text + "!", work) is False


def test_nested_repetitions_that_mean_one_become_one() -> None:
    assert parse_regex("^(a+)+$") == parse_regex("^a+$")
    assert parse_regex("^(a{1,100}){1,100}$") == parse_regex("^a{1,10000}$")
    assert parse_regex("^(a{2}){2}$") != parse_regex("^a{4}$")


simple = st.recursive(
    st.sampled_from(["a", "b", "[ab]", ".", "[^a]"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}"])).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)


@given(simple, st.text("abc", max_size=6), st.sampled_from([("", ""), ("^", ""), ("", "$"), ("^", "$")]))
def test_languages_agree_with_python(pattern: str, text: str, anchors: tuple[str, str]) -> None:
    whole = f"{anchors[0]}{pattern}{anchors[1]}"
    if anchors != ("", ""):
        whole = f"{anchors[0]}(?:{pattern}){anchors[1]}"
    assert matches(whole, text) == (re.search(whole, text) is not None)


@given(simple, st.integers(0, 4), st.integers(0, 4))
def test_the_shortest_length_is_that_of_the_shortest_match(pattern: str, low: int, extra: int) -> None:
    whole = f"^(?:{pattern})$"
    texts = [""]
    lengths = []
    for _ in range(low + extra + 1):
        lengths += [len(text) for text in texts if len(text) >= low and re.search(whole, text)]
        texts = [text + char for text in texts for char in "abc"][:400]
    automaton = Automaton(parse_regex(whole), Work())
    found = shortest_length([automaton], Work(), low=low, high=low + extra)
    if len(texts) < 400:
        assert found == min((n for n in lengths if n <= low + extra), default=None)
    if low == 0 and found is not None:
        assert found == min_length(parse_regex(whole))


def test_intersections_and_excluded_texts_are_seen_through() -> None:
    def shortest(*patterns: str, excluded: tuple[str, ...] = (), low: int = 0, high: int | None = None) -> int | None:
        automata = [Automaton(parse_regex(pattern), Work()) for pattern in patterns]
        return shortest_length(automata, Work(), excluded=excluded, low=low, high=high)

    assert shortest("^a", "b$") == 2
    assert shortest("^a$", "^b$") is None
    assert shortest("^(ab)*$", low=3, high=3) is None
    assert shortest("^(ab)*$", low=3, high=4) == 4
    assert shortest("^a?$", excluded=("", "a")) is None
    assert shortest("^a+$", excluded=("a", "aa")) == 3
    with pytest.raises(SchemaError, match="too long"):
        shortest(*(f"{char}.{{20}}{char}" for char in "abcdefgh"))


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date", "2024-02-29", "2023-02-29"),
        ("date", "2000-02-29", "1900-02-29"),
        ("time", "23:59:59.5+01:00", "24:00:00Z"),
        ("date-time", "2026-11-21T10:00:00Z", "2026-11-21 10:00:00Z"),
        ("duration", "P1Y2M3DT4H", "P"),
        ("email", "a.b@example.com", "a@"),
        ("hostname", "a-b.example", "-a"),
        ("ipv4", "255.0.10.1", "256.0.0.1"),
        ("ipv6", "fe80::1:2", "fe80:::1"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123e4567"),
        ("uri", "https://example.com/a?b=c#d", "example.com"),
    ],
)
def test_formats_hold_what_they_name(name: str, good: str, bad: str) -> None:
    assert matches(FORMATS[name], good)
    assert not matches(FORMATS[name], bad)
