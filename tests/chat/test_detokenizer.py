"""Incremental detokenization equals decoding all at once, and never shows half a character."""

import json

import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lfm.chat.detokenizer import Detokenizer
from lfm.chat.tokenizer import Tokenizer
from lfm.chat.tokenizer_json import byte_level_json
from tests.chat.checkpoints import tokenizer_json

# Start, continuation and never-valid bytes of UTF-8, so that broken sequences of every kind come up often.
utf8_bytes = st.sampled_from([0x41, 0x80, 0xBF, 0xC2, 0xC0, 0xE2, 0x82, 0xAC, 0xED, 0xA0, 0xF0, 0x9F, 0x98, 0xF5, 0xFF])
byte_ids = st.one_of(utf8_bytes.map(lambda byte: 14 + byte), st.integers(0, 269))


@st.composite
def cut_ids(draw: st.DrawFn, ids: st.SearchStrategy[int]) -> list[list[int]]:
    return draw(st.lists(st.lists(ids, max_size=4), max_size=12))


@given(chunks=cut_ids(byte_ids))
def test_any_cut_of_any_bytes_gives_the_text_of_all_of_them(byte_tokenizer: Tokenizer, chunks: list[list[int]]) -> None:
    detokenizer = Detokenizer(byte_tokenizer)
    text = "".join([detokenizer.push(chunk) for chunk in chunks] + [detokenizer.finish()])
    all_ids = [token_id for chunk in chunks for token_id in chunk]
    assert text == byte_tokenizer.decode(all_ids)
    assert text == tokenizers.Tokenizer.from_str(json.dumps(byte_level_json())).decode(all_ids)


@given(chunks=cut_ids(st.integers(0, 519)))
def test_any_ids_of_a_trained_tokenizer_decode_as_the_library_does(
    plain_tokenizer: Tokenizer, chunks: list[list[int]]
) -> None:
    detokenizer = Detokenizer(plain_tokenizer)
    all_ids = [token_id for chunk in chunks for token_id in chunk if token_id < plain_tokenizer.num_ids]
    text = "".join([detokenizer.push([token_id]) for token_id in all_ids]) + detokenizer.finish()
    assert text == plain_tokenizer.decode(all_ids)
    assert text == tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json())).decode(all_ids)


@given(text=st.text(alphabet=st.sampled_from("aé€日\U0001f600")))
def test_text_grows_by_whole_characters(byte_tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(byte_tokenizer)
    pieces = [detokenizer.push([token_id]) for token_id in byte_tokenizer.encode(text)]
    assert [piece for piece in pieces if piece] == list(text)
    assert detokenizer.finish() == ""


def test_a_character_that_never_ends_is_shown_at_the_end(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer)
    emoji = byte_tokenizer.encode("\U0001f600")
    assert detokenizer.push(emoji[:3]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_an_invalid_byte_is_shown_as_soon_as_it_is_known_to_be_one(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer)
    assert detokenizer.push([14 + 0xFF]) == "\ufffd"
    assert detokenizer.push([14 + 0xE2]) == ""
    assert detokenizer.push([14 + 0x41]) == "\ufffdA"


def test_special_tokens_have_no_text_and_do_not_part_a_character(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer)
    first, *rest = byte_tokenizer.encode("€")
    assert detokenizer.push([1, first, 10]) == ""
    assert detokenizer.push([*rest, 7]) == "€"
