"""Tool calls in the output: cut at the control tokens, streamed as they are written, the same for every chunking."""

import itertools
import json
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.chat.call_parser import CallReader
from lfm.chat.output import Delta, OutputProcessor, join_deltas
from lfm.chat.tokenizer import Tokenizer
from lfm.protocol import FinishReason, TokenEvent

EOS = 7
START, END = "<|tool_call_start|>", "<|tool_call_end|>"


def numbered() -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield f"call_{number}"


def processor(tokenizer: Tokenizer, *, is_constrained: bool = True, stop: Sequence[str] = ()) -> OutputProcessor:
    ids = numbered()
    reader = CallReader(is_constrained=is_constrained, make_id=lambda: next(ids))
    return OutputProcessor(tokenizer, stop=stop, calls=reader)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text in which the names of the two markers stand for the markers."""
    before, marker, after = text.partition(START)
    if marker:
        return [*ids_of(tokenizer, before), tokenizer.special.tool_call_start or 0, *ids_of(tokenizer, after)]
    before, marker, after = text.partition(END)
    if marker:
        return [*tokenizer.encode(before), tokenizer.special.tool_call_end or 0, *ids_of(tokenizer, after)]
    return tokenizer.encode(text)


def feed(
    target: OutputProcessor, ids: Sequence[int], *, cuts: Sequence[int] = (), reason: FinishReason = "stop"
) -> list[Delta]:
    """The deltas of these ids, cut into events at these places; the last event is terminal."""
    ids = [*ids, EOS] if reason == "stop" else list(ids)
    bounds = [0, *sorted(cut for cut in set(cuts) if 0 < cut < len(ids)), len(ids)]
    events = [
        TokenEvent(request_id="1", token_ids=ids[start:end], finish_reason=reason if end == len(ids) else None)
        for start, end in itertools.pairwise(bounds)
    ]
    return [target.feed(event) for event in events]


def calls_of(delta: Delta) -> list[tuple[int, str | None, object]]:
    return [(call.index, call.name, json.loads(call.arguments)) for call in delta.calls]


def test_calls_are_cut_out_of_the_text_and_end_it_with_tool_calls(byte_tokenizer: Tokenizer) -> None:
    target = processor(byte_tokenizer)
    body = join_deltas(feed(target, ids_of(byte_tokenizer, f'Let me see.{START}[f(city="Bern"), now()]{END}')))
    assert (body.text, body.finish_reason) == ("Let me see.", "tool_calls")
    assert calls_of(body) == [(0, "f", {"city": "Bern"}), (1, "now", {})]
    assert [call.id for call in body.calls] == ["call_1", "call_2"]
    assert target.num_output_tokens == len(body.token_ids) == len('Let me see.[f(city="Bern"), now()]') + 3


def test_arguments_stream_as_the_model_writes_them_with_the_name_once(byte_tokenizer: Tokenizer) -> None:
    target = processor(byte_tokenizer)
    ids = ids_of(byte_tokenizer, f'{START}[f(city="Bern")]{END}')
    deltas = feed(target, ids, cuts=[9, 12])
    pieces = [call for delta in deltas for call in delta.calls]
    assert [piece.name for piece in pieces] == ["f", *[None] * (len(pieces) - 1)]
    assert {(piece.index, piece.id) for piece in pieces} == {(0, "call_1")}
    assert len(pieces) > 1
    assert "".join(piece.arguments for piece in pieces) == '{"city": "Bern"}'


@pytest.mark.parametrize("is_constrained", [True, False], ids=["constrained", "free"])
def test_stop_strings_hold_outside_of_calls_only(byte_tokenizer: Tokenizer, is_constrained: bool) -> None:
    target = processor(byte_tokenizer, is_constrained=is_constrained, stop=["END"])
    body = join_deltas(feed(target, ids_of(byte_tokenizer, f'EN{START}[f(city="END D")]{END}')))
    assert (body.text, body.finish_reason) == ("EN", "tool_calls")
    assert calls_of(body) == [(0, "f", {"city": "END D"})]
    assert not body.stopped_by_string


def test_a_stop_string_does_not_reach_across_a_call(byte_tokenizer: Tokenizer) -> None:
    target = processor(byte_tokenizer, is_constrained=False, stop=["AB"])
    body = join_deltas(feed(target, ids_of(byte_tokenizer, f"A{START}[f()]{END}B")))
    assert (body.text, body.finish_reason, len(body.calls)) == ("AB", "tool_calls", 1)


def test_a_stop_string_in_front_of_a_call_ends_the_output(byte_tokenizer: Tokenizer) -> None:
    target = processor(byte_tokenizer, stop=["see"])
    body = join_deltas(feed(target, ids_of(byte_tokenizer, f"Let me see{START}[f()]{END}")))
    assert (body.text, body.finish_reason, body.calls) == ("Let me ", "stop", ())
    assert body.stopped_by_string
    assert target.num_output_tokens == len("Let me see")


def test_text_without_a_call_ends_with_stop(byte_tokenizer: Tokenizer) -> None:
    body = join_deltas(feed(processor(byte_tokenizer), ids_of(byte_tokenizer, "No.")))
    assert (body.text, body.finish_reason, body.calls) == ("No.", "stop", ())


def test_a_call_that_is_cut_says_length(byte_tokenizer: Tokenizer) -> None:
    ids = ids_of(byte_tokenizer, f'{START}[f(city="Be')
    body = join_deltas(feed(processor(byte_tokenizer), ids, reason="length"))
    assert body.finish_reason == "length"
    assert [(call.name, call.arguments) for call in body.calls] == [("f", '{"city": "Be')]


def test_the_models_echo_of_a_free_call_is_no_text(byte_tokenizer: Tokenizer) -> None:
    text = f"{START}[f(a=1)]{END}\n[f(a=1)]"
    body = join_deltas(feed(processor(byte_tokenizer, is_constrained=False), ids_of(byte_tokenizer, text)))
    assert (body.text, calls_of(body), body.finish_reason) == ("", [(0, "f", {"a": 1})], "tool_calls")


def test_a_block_that_is_no_call_becomes_text(byte_tokenizer: Tokenizer) -> None:
    ids = ids_of(byte_tokenizer, f"a{START}what?{END}b")
    body = join_deltas(feed(processor(byte_tokenizer, is_constrained=False), ids))
    assert (body.text, body.finish_reason, body.calls) == ("awhat?b", "stop", ())


def test_without_a_reader_the_markers_are_silent(byte_tokenizer: Tokenizer) -> None:
    ids = ids_of(byte_tokenizer, f"a{START}[f()]{END}")
    body = join_deltas(feed(OutputProcessor(byte_tokenizer), ids))
    assert (body.text, body.finish_reason, body.calls) == ("a[f()]", "stop", ())


TEXTS = st.lists(
    st.sampled_from(
        [
            "a€",
            "END",
            "E",
            START,
            END,
            f'{START}[f(x="é END", from=2), g()]{END}',
            f"{START}[f(",
            "[f(a=1)]",
            "1)]",
            "\n",
        ]
    ),
    max_size=6,
).map("".join)


@given(
    text=TEXTS,
    cuts=st.lists(st.integers(0, 60), max_size=12),
    is_constrained=st.booleans(),
    reason=st.sampled_from(["stop", "length", "abort"]),
)
def test_any_chunking_gives_the_same_text_and_calls(
    byte_tokenizer: Tokenizer, text: str, cuts: list[int], is_constrained: bool, reason: FinishReason
) -> None:
    ids = ids_of(byte_tokenizer, text)
    whole = processor(byte_tokenizer, is_constrained=is_constrained, stop=["END"])
    parts = processor(byte_tokenizer, is_constrained=is_constrained, stop=["END"])
    expected = join_deltas(feed(whole, ids, reason=reason))
    deltas = feed(parts, ids, cuts=cuts, reason=reason)
    assert join_deltas(deltas) == expected
    assert sum(delta.finish_reason is not None for delta in deltas) == 1
    for delta in deltas:
        assert len({call.index for call in delta.calls}) == len(delta.calls)
