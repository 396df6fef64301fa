"""Tokenizers made here cut a string the same way wherever it stands; lfm and transformers read them alike."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from lfm.chat.messages import Message, ToolCall, parse_messages
from lfm.chat.prompt import build_prompt
from lfm.chat.tokenizer_json import SPECIAL_TOKEN_TEXTS
from lfm.errors import UsageError
from lfm.train.examples import load_tokenizer
from lfm.train.recipe import TokenizerRecipe, parse_recipe
from lfm.train.tokenizer import WORD_PATTERN, run_recipe, train_tokenizer, write_tokenizer
from tests.train.models import write_documents, write_tiny_tokenizer

TEXTS = ["the cat sees the dog", "Zürich 12345 東京 \u0645\u0631\u062d\u0628\u0627", "the\n\n  return 12"] * 5
TOOLS = [{"name": "get_weather", "description": "Wetter für {x}", "parameters": {"type": "object"}}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the weather in Zürich\n\nplease"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"function": {"name": "get_weather", "arguments": {"city": 'Zü"rich', "days": 2, "now": True}}},
            {"function": {"name": "f", "arguments": {"a": {"b": [1]}, "c": ["x"], "d": None}}},
        ],
    },
    {"role": "tool", "content": '{"degrees": 21}'},
    {"role": "assistant", "content": "<think>so</think> 21 degrees"},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "you are welcome"},
]


def test_control_tokens_come_first_in_lfm2s_order() -> None:
    content = train_tokenizer(TEXTS, vocab_size=300, min_frequency=1)
    vocab = content["model"]["vocab"]
    assert [vocab[text] for text in SPECIAL_TOKEN_TEXTS] == list(range(14))
    assert [token["content"] for token in content["added_tokens"]] == list(SPECIAL_TOKEN_TEXTS)
    assert all(token["special"] for token in content["added_tokens"])
    assert sorted(vocab.values()) == list(range(300))


def test_the_same_texts_give_the_same_tokenizer() -> None:
    one, other = (train_tokenizer(TEXTS, vocab_size=300, min_frequency=1) for _ in range(2))
    assert one == other


def test_too_little_text_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match=r"give only \d+ tokens of tokenizer.vocab_size=2000"):
        train_tokenizer(TEXTS, vocab_size=2000, min_frequency=1)


def test_numbers_are_cut_into_groups_of_three_and_any_text_survives(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, train_tokenizer(["1234567 " * 9] * 9, vocab_size=274, min_frequency=1))
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567")] == ["123", "456", "7"]
    text = "Grüße, 東京! \U0001f600\n\n\t\u0645\u0631\u062d\u0628\u0627 <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special.im_end not in tokenizer.encode(text)


@pytest.mark.parametrize(
    ("value", "around"),
    [
        ("Dublin", ["from Dublin to", '(city="Dublin")', '"Dublin"', "\u201eDublin\u201c"]),
        ("N-4313.5", ["order N-4313.5 now", '"N-4313.5"', "(N-4313.5)"]),
        ("ko7@mail.example", ["to ko7@mail.example:", '"ko7@mail.example"']),
        ("\u4eac\u90fd", ["\u4eac\u90fd\u306e\u5929\u6c17", '"\u4eac\u90fd"']),
        ("\uc11c\uc6b8", ["\uc11c\uc6b8\uc758", '"\uc11c\uc6b8"']),
    ],
)
def test_a_value_is_cut_the_same_way_wherever_it_stands(value: str, around: list[str]) -> None:
    cut = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    alone = [part for part, _ in cut.pre_tokenize_str(value)]
    for text in around:
        parts = [part for part, _ in cut.pre_tokenize_str(text)]
        assert "".join(parts) == text
        assert any(parts[i : i + len(alone)] == alone for i in range(len(parts))), parts


def test_the_template_gives_the_ids_that_serving_builds(tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path / "tokenizer", write_documents(tmp_path / "documents.jsonl"))
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for end in (2, 3, 5, 7):
        for is_prompt in (True, False):
            mine = build_prompt(ours, parse_messages(TURNS[:end]), tools=TOOLS, add_generation_prompt=is_prompt)
            rendered = theirs.apply_chat_template(
                TURNS[:end], tools=TOOLS, add_generation_prompt=is_prompt, tokenize=True, return_dict=False
            )
            assert mine == rendered


def test_a_recipe_trains_once(tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "documents.jsonl")
    raw = {
        "tokenizer": {"output": str(tmp_path / "made"), "vocab_size": 300, "min_frequency": 1},
        "data": {"files": [str(documents)]},
    }
    recipe = parse_recipe(raw, TokenizerRecipe, origin="r.toml")
    lines: list[str] = []
    folder = run_recipe(recipe, on_progress=lines.append)
    before = (folder / "tokenizer.json").read_bytes()
    assert run_recipe(recipe, on_progress=lines.append) == folder
    assert (folder / "tokenizer.json").read_bytes() == before
    assert lines[-1].endswith("already holds a tokenizer")
    with pytest.raises(UsageError, match="already holds a tokenizer"):
        write_tokenizer(folder, json.loads(before))


def test_a_message_without_content_is_an_empty_text(tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path / "tokenizer", write_documents(tmp_path / "documents.jsonl"))
    tokenizer = load_tokenizer(folder)
    call = Message(role="assistant", tool_calls=(ToolCall(name="f", arguments={}),))
    ids = build_prompt(tokenizer, [Message(role="user", content="a"), call], add_generation_prompt=False)
    assert ids.count(tokenizer.special.tool_call_start) == 1
