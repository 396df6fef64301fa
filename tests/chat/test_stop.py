"""Stop strings: what is found and what is held does not depend on how the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.chat.stop import StopMatcher, StopStrings
from lfm.errors import RequestError
from lfm.protocol import MAX_STOP_BYTES, MAX_STOP_STRINGS


def naive_search(text: str, stop: list[str]) -> tuple[int, str] | None:
    """Start and text of the stop string that is completed first; the longest of those completed together."""
    for end in range(1, len(text) + 1):
        ending = [candidate for candidate in stop if text[:end].endswith(candidate)]
        if ending:
            longest = max(ending, key=len)
            return end - len(longest), longest
    return None


def naive_certain(text: str, stop: list[str]) -> int:
    """How much of a text without a match can no longer belong to one."""
    for start in range(len(text)):
        if any(candidate.startswith(text[start:]) for candidate in stop):
            return start
    return len(text)


# Two letters make overlaps, shared beginnings and stop strings within stop strings the rule, not the exception.
letters = st.text(alphabet="ab", min_size=1, max_size=5)
stops = st.lists(letters, max_size=4)
chunks = st.lists(st.text(alphabet="ab", max_size=4), max_size=12)


@given(stop=stops, pieces=chunks, include_stop=st.booleans())
def test_any_cut_gives_what_a_search_of_the_whole_text_gives(
    stop: list[str], pieces: list[str], include_stop: bool
) -> None:
    matcher = StopMatcher(StopStrings(stop), include_stop=include_stop)
    shown = "".join([matcher.push(piece) for piece in pieces] + [matcher.flush()])
    found = naive_search("".join(pieces), stop)
    if found is None:
        assert (shown, matcher.matched) == ("".join(pieces), None)
    else:
        start, matched = found
        assert matcher.matched == matched
        assert shown == "".join(pieces)[: start + (len(matched) if include_stop else 0)]


@given(stop=stops, pieces=chunks)
def test_exactly_what_could_begin_a_stop_string_is_held(stop: list[str], pieces: list[str]) -> None:
    matcher, text, shown = StopMatcher(StopStrings(stop)), "", ""
    for piece in pieces:
        text += piece
        if naive_search(text, stop):
            break
        shown += matcher.push(piece)
        assert shown == text[: naive_certain(text, stop)]


def follow(stop: list[str], pieces: list[str], *, include_stop: bool = False) -> list[str]:
    matcher = StopMatcher(StopStrings(stop), include_stop=include_stop)
    return [matcher.push(piece) for piece in pieces] + [matcher.flush()]


def test_a_stop_string_over_many_pieces_is_held_and_never_shown() -> None:
    assert follow(["</end>"], ["Hi ", "<", "/", "e", "nd", ">", " more"]) == ["Hi ", "", "", "", "", "", "", ""]


def test_a_stop_string_inside_one_piece_is_found() -> None:
    assert follow(["STOP"], ["one STOP two STOP"]) == ["one ", ""]
    assert follow(["STOP"], ["one STOP two"], include_stop=True) == ["one STOP", ""]


def test_held_text_is_shown_once_it_turns_out_otherwise() -> None:
    assert follow(["</end>"], ["a</e", "x", "</", ""]) == ["a", "</ex", "", "", "</"]


def test_the_first_stop_string_to_be_completed_wins() -> None:
    assert follow(["abcd", "bc"], ["abcd"]) == ["a", ""]
    assert follow(["bcd", "abcd"], ["abcd"]) == ["", ""]


def test_the_order_and_repetition_of_stop_strings_do_not_matter() -> None:
    assert follow(["b", "ab", "b"], ["xab"]) == follow(["ab", "b"], ["xab"]) == ["x", ""]


def test_without_stop_strings_nothing_is_held() -> None:
    assert follow([], ["a", "b"]) == ["a", "b", ""]
    assert not StopStrings()


def test_one_automaton_serves_several_texts_at_once() -> None:
    strings = StopStrings(["ab"])
    first, second = StopMatcher(strings), StopMatcher(strings)
    assert (first.push("a"), second.push("xa"), first.push("b"), second.push("c")) == ("", "x", "", "ac")
    assert (first.matched, second.matched) == ("ab", None)


def test_the_largest_allowed_stop_strings_are_followed_in_linear_time() -> None:
    """A quadratic search would need some 10**10 comparisons here and run into the time limit."""
    stop = ["a" * (MAX_STOP_BYTES - 1 - i) + "b" for i in range(MAX_STOP_STRINGS)]
    matcher = StopMatcher(StopStrings(stop))
    shown = sum(len(matcher.push("a")) for _ in range(100_000))
    assert shown == 100_000 - (MAX_STOP_BYTES - 1)
    assert matcher.push("b") == ""
    assert matcher.matched == stop[0]


@pytest.mark.parametrize(
    ("stop", "param", "message"),
    [
        (["a"] * 17, "stop", "has 17 strings. Allowed: at most 16"),
        (["a"] * 10_000, "stop", "has 10000 strings"),
        (["a", ""], "stop[1]", "is empty"),
        (["a" * 257], "stop[0]", "has 257 bytes. Allowed: 1 to 256"),
        (["é" * 129], "stop[0]", "has 258 bytes"),
        (["a", "\ud800"], "stop[1]", "lone surrogate"),
    ],
)
def test_stop_strings_outside_the_bounds_are_refused(stop: list[str], param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        StopStrings(stop)
    assert caught.value.param == param
    assert message in str(caught.value)


def test_the_bounds_themselves_are_allowed() -> None:
    stop = ["é" * (MAX_STOP_BYTES // 2)] * MAX_STOP_STRINGS
    assert follow(stop, ["é" * 127, "é"]) == ["", "", ""]
