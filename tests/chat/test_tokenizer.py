"""The tokenizer: literal text never becomes a control token, bytes survive, bad files and ids are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lfm.chat.tokenizer import Tokenizer
from lfm.chat.tokenizer_json import SPECIAL_TOKEN_TEXTS, byte_level_json
from lfm.errors import ModelError, RequestError
from tests.chat.checkpoints import (
    PLAIN_TEMPLATE,
    RESERVED,
    VOCAB_SIZE,
    WRAPPED_TEMPLATE,
    tiny_config,
    tokenizer_json,
    write_folder,
)

UNMARKED = ("<think>", "</think>", "weather")


def assert_is_literal(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.added_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text


def test_byte_level_ids_are_the_special_tokens_and_then_the_bytes(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.num_ids == 270
    assert [byte_tokenizer.token_bytes(i).decode() for i in range(14)] == list(SPECIAL_TOKEN_TEXTS)
    assert [byte_tokenizer.token_bytes(14 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert byte_tokenizer.encode("Aé\0") == [14 + byte for byte in "Aé\0".encode()]
    assert (byte_tokenizer.special.bos, byte_tokenizer.special.im_start, byte_tokenizer.special.im_end) == (1, 6, 7)


@given(text=st.text())
def test_any_text_round_trips(any_tokenizer: Tokenizer, text: str) -> None:
    assert_is_literal(any_tokenizer, text)
    assert b"".join(map(any_tokenizer.token_bytes, any_tokenizer.encode(text))) == text.encode()


@pytest.mark.parametrize("text", ["", "\0", "a\0b\0", "\ufeff", "\ufffd", "\r\n\r\n", "e\u0301", "   \n\n\n   "])
def test_odd_texts_round_trip(any_tokenizer: Tokenizer, text: str) -> None:
    assert_is_literal(any_tokenizer, text)


@pytest.mark.parametrize("token", [*SPECIAL_TOKEN_TEXTS, *RESERVED, *UNMARKED])
def test_no_added_token_comes_out_of_its_text_whole_or_split(any_tokenizer: Tokenizer, token: str) -> None:
    for text in (token, f"a{token}b", f" {token} ", token * 3, f"\n{token}\n", f"{token[:-1]}{token}{token[1:]}"):
        assert_is_literal(any_tokenizer, text)
    for cut in range(len(token) + 1):
        head, tail = token[:cut], token[cut:]
        parts = any_tokenizer.encode_many([head, tail])
        assert any_tokenizer.added_ids.isdisjoint(parts[0] + parts[1])
        assert any_tokenizer.decode(parts[0] + parts[1]) == token
        assert_is_literal(any_tokenizer, head + "\0" + tail)


@given(pieces=st.lists(st.sampled_from([*SPECIAL_TOKEN_TEXTS, *UNMARKED, "<|", "|>", "im_start", " ", "\n", "a"])))
def test_no_mix_of_token_pieces_makes_a_control_token(any_tokenizer: Tokenizer, pieces: list[str]) -> None:
    assert_is_literal(any_tokenizer, "".join(pieces))


@given(text=st.text().filter(lambda text: "<|" not in text))  # the search also tries constants of the source
def test_ids_of_ordinary_text_are_those_of_the_file(plain_tokenizer: Tokenizer, text: str) -> None:
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json()))
    assert plain_tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_a_learned_word_that_is_also_an_added_token_is_spelled_out(thinking_tokenizer: Tokenizer) -> None:
    weather = thinking_tokenizer.encode_raw("weather")[1]
    assert weather in thinking_tokenizer.added_ids - thinking_tokenizer.special_ids
    assert len(thinking_tokenizer.encode("weather")) > 1
    assert thinking_tokenizer.decode([weather]) == "weather"


def test_special_tokens_are_found_by_text_wherever_their_ids_are(thinking_tokenizer: Tokenizer) -> None:
    special = thinking_tokenizer.special
    assert special.bos > 400
    assert thinking_tokenizer.token_bytes(special.bos) == b"<|startoftext|>"
    assert special.tool_call_start is not None
    assert thinking_tokenizer.token_bytes(special.tool_call_start) == b"<|tool_call_start|>"
    assert thinking_tokenizer.special_ids == {special.bos - 1 + i for i in range(20)}


def test_stop_tokens_are_im_end_endoftext_and_those_of_the_config() -> None:
    tokenizer = Tokenizer.byte_level(tiny_config(eos_token_ids=(7, 30, VOCAB_SIZE + 5)))
    assert tokenizer.stop_token_ids == (2, 7, 30)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "<|startoftext|>"),
        ("hi", "<|startoftext|>hi"),
        ("<|startoftext|>hi", "<|startoftext|>hi"),
        ("<|startoftext|><|startoftext|>hi", "<|startoftext|>hi"),
        ("<|startoftext|>", "<|startoftext|>"),
        ("<|im_start|>user\nhi<|im_end|>", "<|startoftext|><|im_start|>user\nhi<|im_end|>"),
        (" <|startoftext|>", "<|startoftext|> <|startoftext|>"),
    ],
)
def test_raw_prompts_match_control_tokens_and_get_bos_once(any_tokenizer: Tokenizer, text: str, expected: str) -> None:
    ids = any_tokenizer.encode_raw(text)
    assert b"".join(map(any_tokenizer.token_bytes, ids)).decode() == expected
    assert [i for i in ids if i in any_tokenizer.special_ids] == _special_ids_in(any_tokenizer, expected)


def _special_ids_in(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = {"<|startoftext|>": tokenizer.special.bos, "<|im_start|>": tokenizer.special.im_start}
    ids["<|im_end|>"] = tokenizer.special.im_end
    return [ids["<|" + piece.partition("|>")[0] + "|>"] for piece in text.split("<|")[1:]]


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ude00\ud83d"])
def test_lone_surrogates_are_refused_with_the_field(byte_tokenizer: Tokenizer, text: str) -> None:
    for encode in (byte_tokenizer.encode, byte_tokenizer.encode_raw):
        with pytest.raises(RequestError, match=r"prompt\[2\] holds a lone surrogate \(U\+D") as caught:
            encode(text, param="prompt[2]")
        assert caught.value.param == "prompt[2]"


@pytest.mark.parametrize("token_id", [270, 1023, 1024, 10**12, -1, -270])
def test_ids_outside_the_tokenizer_are_refused(byte_tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(RequestError, match="Allowed: 0 to 269"):
        byte_tokenizer.decode([65, token_id])
    with pytest.raises(RequestError, match=rf"prompt\[1\]={token_id} is outside the tokenizer") as caught:
        byte_tokenizer.check_ids([65, token_id], param="prompt")
    assert caught.value.param == "prompt"


def test_an_id_that_the_file_leaves_out_has_no_text() -> None:
    raw = byte_level_json()
    raw["added_tokens"] += [{**raw["added_tokens"][0], "id": 271, "content": "<|late|>"}]
    raw["model"]["vocab"]["<|late|>"] = 271
    tokenizer = Tokenizer(raw, config=tiny_config(), origin="test")
    assert (tokenizer.num_ids, tokenizer.token_bytes(270), tokenizer.decode([79, 270, 271, 80])) == (272, b"", "AB")


def test_decode_skips_special_tokens_and_joins_the_bytes_around_them(byte_tokenizer: Tokenizer) -> None:
    euro = byte_tokenizer.encode("€")
    assert byte_tokenizer.decode([1, *euro[:1], 7, *euro[1:], 2]) == "€"
    assert byte_tokenizer.decode(euro[:2]) == "\ufffd"


def test_truncation_padding_dropout_and_post_processor_of_the_file_change_nothing(plain_tokenizer: Tokenizer) -> None:
    raw = tokenizer_json()
    raw["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    raw["model"]["dropout"] = 0.9
    tokenizer = Tokenizer(raw, config=tiny_config(), origin="test")
    text = "what are some fun things to do in New York?"
    assert tokenizer.encode(text) == plain_tokenizer.encode(text)
    assert tokenizer.encode_raw(text) == [1, *plain_tokenizer.encode(text)]


def test_merges_written_as_strings_are_read_too(plain_tokenizer: Tokenizer) -> None:
    raw = tokenizer_json()
    raw["model"]["merges"] = [" ".join(merge) for merge in raw["model"]["merges"]]
    tokenizer = Tokenizer(raw, config=tiny_config(), origin="test")
    assert tokenizer.encode("what are the tools") == plain_tokenizer.encode("what are the tools")


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path, tiny_config())


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        "\0",
        "{}",
        "[" * 100_000,
        '{"model": {"type": "BPE"}}',
        '{"model": {"type": "WordPiece"}}',
        '{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}, "added_tokens": []}',
        '{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}, "added_tokens": []}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": [3]}',
    ],
)
def test_a_corrupt_tokenizer_file_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer\.json") as caught:
        Tokenizer.from_folder(tmp_path, tiny_config())
    assert "\n" not in str(caught.value)


def test_a_tokenizer_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{\0}\0")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        Tokenizer.from_folder(tmp_path, tiny_config())


def damaged(kind: str) -> dict[str, Any]:
    raw = tokenizer_json()
    if kind == "no im_end":
        raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<|im_end|>"]
    if kind == "no byte Z":
        del raw["model"]["vocab"]["Z"]
        raw["model"]["merges"] = []
    if kind == "no byte level":
        raw["pre_tokenizer"] = None
    if kind == "lower case":
        raw["normalizer"] = {"type": "Lowercase"}
    return raw


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no im_end", "has no <|im_end|> token"),
        ("no byte Z", "loses text"),
        ("no byte level", "loses text"),
        ("lower case", "loses text"),
    ],
)
def test_a_tokenizer_that_cannot_serve_chat_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    write_folder(tmp_path, damaged(kind))
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_folder(tmp_path, tiny_config())
    assert message in str(caught.value)


def test_a_tokenizer_longer_than_the_embedding_is_refused() -> None:
    assert Tokenizer.byte_level(tiny_config(vocab_size=270)).num_ids == 270
    with pytest.raises(ModelError, match=r"ids up to 269, but config.json says vocab_size=269"):
        Tokenizer.byte_level(tiny_config(vocab_size=269))


@pytest.mark.parametrize(
    ("template", "form"), [(None, "plain"), (PLAIN_TEMPLATE, "plain"), (WRAPPED_TEMPLATE, "wrapped")]
)
def test_the_chat_template_decides_the_prompt_form(tmp_path: Path, template: str | None, form: str) -> None:
    write_folder(tmp_path, tokenizer_json(), template=template)
    assert Tokenizer.for_source(tmp_path, tiny_config()).prompt_form == form


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (WRAPPED_TEMPLATE, "wrapped"),
        (PLAIN_TEMPLATE, "plain"),
        ([{"name": "rag", "template": PLAIN_TEMPLATE}, {"name": "default", "template": WRAPPED_TEMPLATE}], "wrapped"),
        ([{"name": "tool_use", "template": WRAPPED_TEMPLATE}], "plain"),
        (None, "plain"),
        (7, "plain"),
    ],
)
def test_the_template_may_stand_in_tokenizer_config(tmp_path: Path, value: object, form: str) -> None:
    write_folder(tmp_path, tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}), encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path, tiny_config()).prompt_form == form


def test_unreadable_template_files_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json cannot be read as JSON"):
        Tokenizer.from_folder(tmp_path, tiny_config())
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"chat_template\.jinja cannot be read"):
        Tokenizer.from_folder(tmp_path, tiny_config())


def test_a_wrapped_template_needs_the_tokens_that_it_uses(tmp_path: Path) -> None:
    special = [text for text in SPECIAL_TOKEN_TEXTS if text != "<|tool_response_end|>"]
    write_folder(tmp_path, tokenizer_json(special=special), template=WRAPPED_TEMPLATE)
    with pytest.raises(ModelError, match=r"uses <\|tool_response_end\|>"):
        Tokenizer.from_folder(tmp_path, tiny_config())


def test_a_preset_gets_the_byte_level_tokenizer() -> None:
    assert Tokenizer.for_source(None, tiny_config()).num_ids == 270


@given(text=st.text() | st.sampled_from(SPECIAL_TOKEN_TEXTS) | st.integers(0, 40).map("\n".__mul__))
def test_no_token_stands_for_more_bytes_than_the_longest(any_tokenizer: Tokenizer, text: str) -> None:
    assert len(text.encode()) <= any_tokenizer.max_token_bytes * len(any_tokenizer.encode(text))
