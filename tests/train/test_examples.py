"""What counts in a conversation: the assistant's own tokens and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest

from lfm.chat.grammar_tools import JSON_REQUEST
from lfm.chat.messages import Message, ToolCall
from lfm.chat.prompt import build_prompt
from lfm.chat.tokenizer import Tokenizer
from lfm.errors import UsageError
from lfm.train.examples import (
    JSON_CALLS,
    Conversation,
    document_rows,
    every_token,
    load_tokenizer,
    read_examples,
    sft_row,
)
from tests.train.models import write_documents, write_tiny_tokenizer

CALLS = (ToolCall(name="f", arguments={"a": "the cat"}), ToolCall(name="g", arguments={"n": 2, "ok": True}))
CONVERSATION = (
    Message(role="system", content="the assistant\n sees"),
    Message(role="user", content="assistant\nlikes a dog <|im_end|>"),
    Message(role="assistant", tool_calls=CALLS),
    Message(role="tool", content='{"x": 1}'),
    Message(role="assistant", content="the red house"),
    Message(role="user", content="and?"),
    Message(role="assistant", content="a small cat"),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("made")
    return load_tokenizer(write_tiny_tokenizer(folder / "tokenizer", write_documents(folder / "documents.jsonl")))


def shown(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return b"".join(tokenizer.token_bytes(int(i)) for i in ids).decode()


def test_only_the_assistants_turns_and_their_ends_are_targets(tokenizer: Tokenizer) -> None:
    row = sft_row(tokenizer, Conversation(messages=CONVERSATION))
    assert shown(tokenizer, row.ids[row.is_target]) == (
        '<|tool_call_start|>[f(a="the cat"), g(n=2, ok=True)]<|tool_call_end|><|im_end|>'
        "the red house<|im_end|>a small cat<|im_end|>"
    )


def test_the_ids_are_those_that_serving_builds(tokenizer: Tokenizer) -> None:
    """Before every assistant turn, the row is exactly the prompt that serving would have built there."""
    tools = ({"name": "f", "description": "the dog"},)
    row = sft_row(tokenizer, Conversation(messages=CONVERSATION, tools=tools))
    begins = [i for i in range(1, len(row.ids)) if row.is_target[i] and not row.is_target[i - 1]]
    turns = [i for i, message in enumerate(CONVERSATION) if message.role == "assistant"]
    assert len(begins) == len(turns) == 3
    for begin, turn in zip(begins, turns, strict=True):
        assert row.ids[:begin].tolist() == build_prompt(tokenizer, CONVERSATION[:turn], tools=tools)


def test_calls_can_be_written_as_json(tokenizer: Tokenizer) -> None:
    row = sft_row(tokenizer, Conversation(messages=CONVERSATION, call_form="json"))
    assert JSON_REQUEST in JSON_CALLS  # what serving looks for is what training says
    calls = [{"name": "f", "arguments": {"a": "the cat"}}, {"name": "g", "arguments": {"n": 2, "ok": True}}]
    text = shown(tokenizer, row.ids[row.is_target])
    assert text.startswith(f"<|tool_call_start|>{json.dumps(calls)}<|tool_call_end|><|im_end|>the red")


def test_pretraining_predicts_everything(tokenizer: Tokenizer) -> None:
    row = every_token(tokenizer, Conversation(messages=CONVERSATION))
    assert row.is_target.all()
    assert row.ids[0] == tokenizer.special.bos


def test_long_documents_are_cut_into_rows_that_join_again(tokenizer: Tokenizer) -> None:
    text = "the small red cat sees a dog " * 20
    rows = list(document_rows(tokenizer, text, max_length=16))
    assert all(2 <= len(row.ids) <= 16 for row in rows)
    inputs = np.concatenate([row.ids[:-1] for row in rows]).tolist()
    assert [*inputs, rows[-1].ids[-1]] == [
        tokenizer.special.bos,
        *tokenizer.encode(text),
        tokenizer.special.endoftext,
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"examples.jsonl:2 is not JSON"),
        ("[1]", r"examples.jsonl:2 is neither"),
        ('{"text": 3}', r"is neither"),
        ('{"messages": [{"role": 1}]}', r"messages\[0\].role is a number"),
        ('{"messages": [], "call_form": "xml"}', r"call_form is python or json"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UsageError, match=message):
        list(read_examples(path))


def test_conversations_and_texts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    raw = {"messages": [{"role": "assistant", "tool_calls": [call]}], "tools": [{"name": "f"}], "call_form": "json"}
    path.write_text('{"text": "a"}\n\n' + json.dumps(raw) + "\n")
    text, conversation = read_examples(path)
    assert text == "a"
    assert isinstance(conversation, Conversation)
    assert conversation.messages[0].tool_calls == (ToolCall(name="f", arguments={"a": 1}),)
    assert (conversation.tools, conversation.call_form) == (({"name": "f"},), "json")
