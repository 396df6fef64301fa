"""Output processing: events in, deltas out; nothing lost, nothing twice, nothing billed behind the end."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.chat.output import Delta, OutputProcessor, TokenScore, join_deltas
from lfm.chat.stop import StopStrings
from lfm.chat.tokenizer import Tokenizer
from lfm.errors import InternalError
from lfm.protocol import ErrorInfo, FinishReason, TokenEvent, TokenLogprob
from tests.chat.test_stop import naive_search

EOS = 7
LOST = ErrorInfo(message="The engine died.")


def event(
    ids: Sequence[int] = (),
    *,
    finish_reason: FinishReason | None = None,
    logprobs: Sequence[TokenLogprob] = (),
    prompt_logprobs: list[TokenLogprob | None] | None = None,
    error: ErrorInfo | None = None,
    num_cached_tokens: int | None = None,
) -> TokenEvent:
    return TokenEvent(
        request_id="chatcmpl-1-0",
        token_ids=list(ids),
        finish_reason=finish_reason,
        logprobs=list(logprobs),
        prompt_logprobs=prompt_logprobs,
        error=error,
        num_cached_tokens=num_cached_tokens,
    )


def spelled(tokenizer: Tokenizer, text: str, *, finish_reason: FinishReason | None = "length") -> list[TokenEvent]:
    """One event per byte of text, the last one terminal."""
    ids = tokenizer.encode(text)
    return [event([token_id]) for token_id in ids[:-1]] + [event(ids[-1:], finish_reason=finish_reason)]


def test_tokens_become_text_as_they_arrive(byte_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(byte_tokenizer)
    deltas = [processor.feed(item) for item in spelled(byte_tokenizer, "a€b")]
    assert [delta.text for delta in deltas] == ["a", "", "", "€", "b"]
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + ["length"]
    assert processor.num_output_tokens == 5
    assert processor.is_finished


def test_a_stop_token_is_billed_and_listed_but_is_no_text(byte_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(byte_tokenizer)
    delta = processor.feed(event([*byte_tokenizer.encode("Hi"), EOS], finish_reason="stop"))
    assert delta == Delta(text="Hi", token_ids=(86, 119, EOS), finish_reason="stop")
    assert processor.num_output_tokens == 3


def test_an_ordinary_token_that_the_request_chose_as_stop_token_is_no_text(byte_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(byte_tokenizer)
    delta = processor.feed(event(byte_tokenizer.encode("Hi."), finish_reason="stop"))
    assert (delta.text, processor.num_output_tokens) == ("Hi", 3)


def test_the_acceptance_event_is_an_empty_delta(byte_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(byte_tokenizer)
    assert not processor.feed(TokenEvent(request_id="1", is_accepted=True))
    assert processor.feed(event([65]))


def test_cached_tokens_are_remembered(byte_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(byte_tokenizer)
    processor.feed(event([65], num_cached_tokens=128))
    processor.feed(event([66]))
    assert processor.num_cached_tokens == 128


def test_a_stop_string_ends_the_text_and_later_tokens_are_dropped_and_not_billed(byte_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(byte_tokenizer, stop=["END"])
    ids = byte_tokenizer.encode("one END two")
    deltas = [processor.feed(event(ids[:6])), processor.feed(event(ids[6:9])), processor.feed(event(ids[9:]))]
    assert [delta.text for delta in deltas] == ["one ", "", ""]
    assert deltas[1] == Delta(token_ids=tuple(ids[6:7]), finish_reason="stop", stopped_by_string=True)
    assert not deltas[2]
    assert processor.num_output_tokens == len("one END")
    assert not processor.feed(event(finish_reason="abort"))
    assert processor.finish_reason == "stop"


def test_the_stop_string_can_be_kept(byte_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(byte_tokenizer, stop=["END"], include_stop=True)
    assert processor.feed(event(byte_tokenizer.encode("one END two"))).text == "one END"


@pytest.mark.parametrize("reason", ["length", "abort", "error", "stop"])
def test_held_text_is_shown_when_the_output_ends_otherwise(byte_tokenizer: Tokenizer, reason: FinishReason) -> None:
    processor = OutputProcessor(byte_tokenizer, stop=["<end>"])
    assert processor.feed(event(byte_tokenizer.encode("a<en"))).text == "a"
    end = processor.feed(event([EOS] if reason == "stop" else [], finish_reason=reason))
    assert (end.text, end.finish_reason, end.stopped_by_string) == ("<en", reason, False)


def test_half_a_character_is_shown_when_the_output_ends(byte_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(byte_tokenizer)
    assert processor.feed(event(byte_tokenizer.encode("€")[:2], finish_reason="length")).text == "\ufffd"


def test_errors_pass_through_with_what_was_held(byte_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(byte_tokenizer, stop=["<end>"])
    processor.feed(event(byte_tokenizer.encode("a<")))
    assert processor.feed(event(finish_reason="error", error=LOST)) == Delta(
        text="<", finish_reason="error", error=LOST
    )
    assert not processor.feed(event(finish_reason="error", error=LOST))


def test_an_error_is_not_hidden_by_a_stop_string(byte_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(byte_tokenizer, stop=["b"])
    delta = processor.feed(event(byte_tokenizer.encode("ab"), finish_reason="error", error=LOST))
    assert (delta.finish_reason, delta.error, delta.stopped_by_string) == ("error", LOST, False)


def test_logprobs_carry_text_bytes_and_alternatives(byte_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(byte_tokenizer, num_logprobs=2)
    euro = byte_tokenizer.encode("€")[0]
    scores = [
        TokenLogprob(79, -0.5, [(79, -0.5), (80, -1.5), (81, -2.5)]),
        TokenLogprob(euro, -math.inf, [(5000, -0.1), (EOS, -1.0)]),
    ]
    delta = processor.feed(event([79, euro], logprobs=scores))
    assert delta.logprobs == (
        TokenScore(79, "A", [65], -0.5, (TokenScore(79, "A", [65], -0.5), TokenScore(80, "B", [66], -1.5))),
        TokenScore(euro, "\ufffd", [0xE2], -9999.0, (TokenScore(EOS, "<|im_end|>", list(b"<|im_end|>"), -1.0),)),
    )


def test_logprobs_without_alternatives(byte_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(byte_tokenizer, num_logprobs=0)
    delta = processor.feed(event([79], logprobs=[TokenLogprob(79, -0.5, [(79, -0.5)])]))
    assert delta.logprobs == (TokenScore(79, "A", [65], -0.5),)


def test_logprobs_that_nobody_asked_for_are_left_out(byte_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(byte_tokenizer)
    assert processor.feed(event([79], logprobs=[TokenLogprob(79, -0.5)])).logprobs == ()


def test_missing_logprobs_are_our_error(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(InternalError, match="0 logprobs for 1 tokens"):
        OutputProcessor(byte_tokenizer, num_logprobs=0).feed(event([79]))
    with pytest.raises(InternalError, match="1 prompt logprobs for 2 prompt tokens"):
        OutputProcessor(byte_tokenizer, prompt_ids=[1, 79]).feed(event(prompt_logprobs=[None]))


def test_prompt_logprobs_describe_every_prompt_token(byte_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(byte_tokenizer, prompt_ids=[1, 79], num_logprobs=1)
    entries = [None, TokenLogprob(79, -2.0, [(80, -1.0)])]
    delta = processor.feed(event(prompt_logprobs=entries))
    assert delta.prompt_logprobs == (
        TokenScore(1, "<|startoftext|>", list(b"<|startoftext|>"), None),
        TokenScore(79, "A", [65], -2.0, (TokenScore(80, "B", [66], -1.0),)),
    )
    assert processor.feed(event([79], logprobs=[TokenLogprob(79, -1.0)])).prompt_logprobs is None


# Letters, one byte of a character that stays broken, a control token, and events of several tokens.
output_ids = st.lists(st.sampled_from([14 + ord("a"), 14 + ord("b"), 14 + 0xE2, 10]), max_size=16)


@given(
    ids=output_ids,
    cuts=st.sets(st.integers(0, 16)),
    stop=st.lists(st.text(alphabet="ab\ufffd", min_size=1, max_size=3), max_size=3),
    end=st.sampled_from(["stop", "length", "abort"]),
)
def test_any_split_into_events_gives_one_body(
    byte_tokenizer: Tokenizer, ids: list[int], cuts: set[int], stop: list[str], end: FinishReason
) -> None:
    if end == "stop":
        ids = [*ids, EOS]
    bounds = sorted({0, len(ids)} | {cut for cut in cuts if cut < len(ids)})
    processor = OutputProcessor(byte_tokenizer, stop=StopStrings(stop), num_logprobs=0)
    deltas = []
    for start, limit in zip(bounds, bounds[1:] or [0], strict=False):
        logprobs = [TokenLogprob(token_id, -float(position)) for position, token_id in enumerate(ids)][start:limit]
        is_last = limit == len(ids)
        deltas.append(
            processor.feed(event(ids[start:limit], logprobs=logprobs, finish_reason=end if is_last else None))
        )
    body = join_deltas(deltas)
    text = byte_tokenizer.decode(ids)
    found = naive_search(text, stop)
    assert body.text == (text if found is None else text[: found[0]])
    assert body.finish_reason == (end if found is None else "stop")
    assert body.stopped_by_string == (found is not None)
    assert sum(delta.finish_reason is not None for delta in deltas) == 1
    assert list(body.token_ids) == ids[: processor.num_output_tokens]
    assert [score.logprob for score in body.logprobs] == [-float(i) for i in range(processor.num_output_tokens)]
    if found is None:
        assert processor.num_output_tokens == len(ids)


def test_joined_deltas_are_one_delta(byte_tokenizer: Tokenizer) -> None:
    score = TokenScore(79, "A", [65], -0.5)
    first = Delta(text="A", token_ids=(79,), logprobs=(score,), prompt_logprobs=(score,))
    last = Delta(text="B", token_ids=(80,), logprobs=(score,), finish_reason="error", error=LOST)
    assert join_deltas([first, Delta(), last]) == Delta(
        text="AB",
        token_ids=(79, 80),
        logprobs=(score, score),
        prompt_logprobs=(score,),
        finish_reason="error",
        error=LOST,
    )
    assert not join_deltas([])
