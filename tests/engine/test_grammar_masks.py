"""Matchers, their cache and the thread that fills masks: errors never pass for an end, and nothing waits for ever."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from llguidance import LLMatcher

from lfm.chat.tokenizer import Tokenizer
from lfm.engine.grammar_library import TokenTable
from lfm.engine.grammar_masks import GrammarCache, GrammarMatcher, MaskFiller, num_mask_words, token_table
from lfm.errors import RequestError
from lfm.model.presets import PRESETS
from lfm.protocol import GrammarSpec

CONFIG = PRESETS["tiny"]
CALL_START, IM_END, ENDOFTEXT = 10, 7, 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.byte_level(CONFIG)


@pytest.fixture(scope="module")
def table(tokenizer: Tokenizer) -> TokenTable:
    return token_table(tokenizer, vocab_size=CONFIG.vocab_size)


@pytest.fixture(scope="module")
def cache(table: TokenTable) -> Iterator[GrammarCache]:
    made = GrammarCache(lambda: table)
    yield made
    made.close()


def new_masks(rows: int = 1) -> np.ndarray:
    return np.full((rows, num_mask_words(CONFIG.vocab_size)), -1, dtype=np.int32)


def allowed(row: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def filled(matcher: GrammarMatcher) -> list[int]:
    masks = new_masks()
    matcher.fill(masks[0])
    return allowed(masks[0])


def test_a_mask_has_the_bits_of_the_tokens_that_may_come_next(cache: GrammarCache, tokenizer: Tokenizer) -> None:
    matcher = cache.matcher(GrammarSpec(text='start: "ab" | "cd" /[0-9]+/'))
    a, b, c, d, seven = (tokenizer.encode(char)[0] for char in "abcd7")
    assert filled(matcher) == [a, c]
    assert matcher.accept(c)
    assert filled(matcher) == [d]
    assert matcher.accept(d)
    assert len(filled(matcher)) == 10
    assert matcher.accept(seven)
    assert set(filled(matcher)) >= {seven, IM_END, ENDOFTEXT}  # may go on, may end
    assert not matcher.is_finished
    assert not matcher.accept(b)


def test_ids_beyond_the_tokenizer_are_never_allowed(cache: GrammarCache, tokenizer: Tokenizer) -> None:
    free = filled(cache.matcher(GrammarSpec(text="start: /(?s:.*)/")))
    assert max(free) < tokenizer.num_ids < CONFIG.vocab_size
    assert not set(free) & (tokenizer.special_ids - set(tokenizer.stop_token_ids))


def test_a_trigger_leaves_everything_free_until_it_is_sampled(cache: GrammarCache, tokenizer: Tokenizer) -> None:
    matcher = cache.matcher(GrammarSpec(text=f'start: <[{CALL_START}]> "x"', trigger_id=CALL_START))
    assert not matcher.needs_mask
    assert matcher.take_forced() == []
    assert matcher.accept(tokenizer.encode("x")[0])
    assert matcher.accept(CALL_START)
    assert matcher.needs_mask
    assert matcher.take_forced() == tokenizer.encode("x")
    assert matcher.take_forced() == [IM_END]
    assert matcher.is_finished


def test_forced_tokens_are_taken_at_once_up_to_the_next_choice(cache: GrammarCache, tokenizer: Tokenizer) -> None:
    matcher = cache.matcher(GrammarSpec(text='start: "{\\"name\\": \\"" ("a" | "b") "\\"}"'))
    assert matcher.take_forced() == tokenizer.encode('{"name": "')
    assert matcher.take_forced() == []
    assert matcher.accept(tokenizer.encode("a")[0])
    assert matcher.take_forced() == tokenizer.encode('"}')
    assert matcher.error is None


def test_a_matcher_in_error_allows_the_stop_tokens_alone_and_says_so(cache: GrammarCache, tokenizer: Tokenizer) -> None:
    matcher = cache.matcher(GrammarSpec(text='start: "ab"'))
    assert not matcher.accept(tokenizer.encode("x")[0])
    assert matcher.error is not None
    assert "\n" not in matcher.error
    assert filled(matcher) == [ENDOFTEXT, IM_END]
    assert not matcher.is_finished  # an error never passes for an end
    assert matcher.take_forced() == []
    assert not matcher.accept(tokenizer.encode("a")[0])


def test_a_dead_end_in_a_grammar_is_an_error_not_an_end(cache: GrammarCache, tokenizer: Tokenizer) -> None:
    matcher = cache.matcher(GrammarSpec(text='start: "a" K | "b"\nK: /x/ & /y/'))
    matcher.accept(tokenizer.encode("a")[0])
    matcher.fill(new_masks()[0])
    assert matcher.error is not None


@pytest.mark.parametrize(
    "text",
    ['start: "a', "begin: /a/", "start: missing", "start: /(/", "", "start: " + "(" * 9000, "{}", 'start: <[99999]>'],
)  # fmt: skip
def test_a_grammar_that_the_library_refuses_is_a_bad_request(cache: GrammarCache, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        cache.matcher(GrammarSpec(text=text))
    assert caught.value.code == "invalid_grammar"
    assert len(str(caught.value)) < 500


def test_matchers_of_one_grammar_do_not_share_their_place(cache: GrammarCache, tokenizer: Tokenizer) -> None:
    spec = GrammarSpec(text='start: "abc"')
    first, second = cache.matcher(spec), cache.matcher(spec)
    first.accept(tokenizer.encode("a")[0])
    assert filled(second) == tokenizer.encode("a")
    assert filled(cache.matcher(spec)) == tokenizer.encode("a")


def test_the_cache_is_bounded_by_bytes(table: TokenTable) -> None:
    cache = GrammarCache(lambda: table, max_bytes=10 * 70_000)
    for index in range(40):
        cache.matcher(GrammarSpec(text=f'start: "{index}"'))
        assert cache.num_bytes <= 10 * 70_000
    huge = " | ".join(f'"{index}"' for index in range(5000))
    assert cache.matcher(GrammarSpec(text=f"start: /{huge}/")).error is None  # larger than the cache, and still served
    cache.close()


def test_grammars_are_prepared_beside_the_engine(cache: GrammarCache) -> None:
    future = cache.prepare(GrammarSpec(text='start: "prepared"'))
    assert future.result(timeout=30).take_forced()
    with pytest.raises(RequestError):
        cache.prepare(GrammarSpec(text="nonsense")).result(timeout=30)


def test_the_helper_fills_the_rows_it_is_given(cache: GrammarCache, tokenizer: Tokenizer) -> None:
    filler = MaskFiller(new_masks(4))
    rows = [(row, cache.matcher(GrammarSpec(text=f'start: "{char}"'))) for row, char in ((3, "a"), (1, "b"))]
    filler.start(rows)
    assert filler.wait(30) == []
    assert allowed(filler.masks[3]) == tokenizer.encode("a")
    assert allowed(filler.masks[1]) == tokenizer.encode("b")
    assert (filler.masks[0] == -1).all()
    assert filler.wait(0) == []  # nothing was started
    filler.close()


class SlowMatcher(GrammarMatcher):
    """Fills a mask once it may."""

    def __init__(self, matcher: LLMatcher, gate: threading.Event) -> None:
        super().__init__(matcher, trigger_id=None, stop_ids=[IM_END])
        self._gate = gate

    def fill(self, row: np.ndarray, *, address: int | None = None) -> None:
        assert self._gate.wait(30)
        row[:] = 7


class BrokenMatcher(GrammarMatcher):
    """The library misbehaves."""

    def fill(self, row: np.ndarray, *, address: int | None = None) -> None:
        if self.error is None:
            raise RuntimeError("as no library should")
        super().fill(row)


def test_a_late_mask_is_named_and_the_rows_before_it_are_not(cache: GrammarCache, table: TokenTable) -> None:
    gate = threading.Event()
    library_matcher = LLMatcher(table.compiled(), 'start: "a"')
    filler = MaskFiller(new_masks(3))
    ready = cache.matcher(GrammarSpec(text='start: "a"'))
    filler.start([(0, ready), (1, SlowMatcher(library_matcher, gate)), (2, ready)])
    deadline = time.monotonic() + 30
    while (filler.masks[0] == -1).all() and time.monotonic() < deadline:
        pass
    assert filler.wait(0.01) == [1, 2]
    gate.set()
    filler.start([(2, ready)])
    assert filler.wait(30) == []
    filler.close()


def test_a_matcher_that_raises_costs_its_own_row_only(
    cache: GrammarCache, table: TokenTable, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    broken = BrokenMatcher(LLMatcher(table.compiled(), 'start: "a"'), trigger_id=None, stop_ids=[IM_END])
    filler = MaskFiller(new_masks(2))
    filler.start([(0, broken), (1, cache.matcher(GrammarSpec(text='start: "a"')))])
    assert filler.wait(30) == []
    assert broken.error is not None
    assert allowed(filler.masks[0]) == [IM_END]
    assert allowed(filler.masks[1]) == tokenizer.encode("a")
    assert "could not be filled" in caplog.text
    filler.close()
