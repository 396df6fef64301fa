"""What an answer cites, at which offsets, and which sentence of the source supports it."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.search.citations import find_citations, supporting_span

NUMBERS = {1, 2, 3}


def cited(answer: str) -> list[tuple[int, str, str]]:
    """Each citation as its source, its statement and its mark."""
    return [
        (found.number, answer[found.start : found.end], answer[found.mark_start : found.mark_end])
        for found in find_citations(answer, NUMBERS)
    ]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Pumps freeze [1].", [(1, "Pumps freeze", "[1]")]),
        ("Pumps freeze.[1]", [(1, "Pumps freeze.", "[1]")]),
        ("Pumps freeze. [1] Valves leak. [2]", [(1, "Pumps freeze.", "[1]"), (2, "Valves leak.", "[2]")]),
        ("First. Pumps freeze[2]. Last.", [(2, "Pumps freeze", "[2]")]),
        ("Both [1][3].", [(1, "Both", "[1][3]"), (3, "Both", "[1][3]")]),
        ("Both [1, 3].", [(1, "Both", "[1, 3]"), (3, "Both", "[1, 3]")]),
        ("Both [1] [1;2].", [(1, "Both", "[1] [1;2]"), (2, "Both", "[1] [1;2]")]),
        ("As [Source 2] says.", [(2, "As", "[Source 2]")]),
        ("A freezes [1] and B melts [2].", [(1, "A freezes", "[1]"), (2, "and B melts", "[2]")]),
        ("- one [1]\n- two [2]", [(1, "- one", "[1]"), (2, "- two", "[2]")]),
        ("東京は首都です[1]。人口は多い[2]。", [(1, "東京は首都です", "[1]"), (2, "人口は多い", "[2]")]),
        ("\U0001f600 smile [1]", [(1, "\U0001f600 smile", "[1]")]),
        ("[1] first", [(1, "", "[1]")]),
        ("unknown [4] and [0]", []),
        ("known [4, 2]", [(2, "known", "[4, 2]")]),
        ("a link [1](http://x.example)", []),
        ("[1]: http://x.example", []),
        ("in code `a[1]` and [2]", [(2, "in code `a[1]` and", "[2]")]),
        ("```\na[1]\n```\nafter [1]", [(1, "```\na[1]\n```\nafter", "[1]")]),
        ("```\nnever closed [1]", []),
        ("[x] [1a] [12345678] [] [ 1 ] 1]", []),
        ("", []),
    ],
)
def test_marks_are_found_with_the_statement_before_them(answer: str, expected: list[tuple[int, str, str]]) -> None:
    assert cited(answer) == expected


@given(st.text(alphabet=st.sampled_from("ab. []1234,;`\n(:東。"), max_size=200))
def test_offsets_lie_in_the_answer_and_in_order(answer: str) -> None:
    last = 0
    for found in find_citations(answer, NUMBERS):
        assert last <= found.mark_start < found.mark_end <= len(answer)
        assert 0 <= found.start <= found.end <= found.mark_start
        assert answer[found.mark_start] == "["
        assert answer[found.mark_end - 1] == "]"
        last = found.mark_start


@pytest.mark.parametrize("piece", ["[1]", "[1] ", "[", "[1, ", "`", "a [1]. ", "```", "[1](", "\n"])
def test_finding_takes_no_longer_than_the_answer_deserves(piece: str) -> None:
    answer = piece * (60_000 // len(piece))
    start_s = time.process_time()
    find_citations(answer, NUMBERS)
    assert time.process_time() - start_s < 2


def test_the_supporting_sentence_is_the_one_that_shares_most() -> None:
    text = "A pump moves water. In winter the valve of a pump freezes unless it is drained. It costs 10 euros.\n"
    span = supporting_span("The valve may freeze in winter", text)
    assert span is not None
    assert text[slice(*span)] == "In winter the valve of a pump freezes unless it is drained."
    assert supporting_span("Elephants", text) is None
    assert supporting_span("x", "") is None
