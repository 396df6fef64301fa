"""Conversations and documents as rows of token ids with a mask of what the model has to predict.

A conversation is encoded by the very function that builds prompts for serving, so training cannot drift away from it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lfm.chat.messages import Message, ToolCall, parse_messages
from lfm.chat.prompt import build_prompt
from lfm.chat.tokenizer import Tokenizer
from lfm.chat.tokenizer_json import read_tokenizer_json
from lfm.chat.tool_calls import render_json_calls
from lfm.config import ModelConfig
from lfm.errors import RequestError, UsageError
from lfm.train.dataset import Row

CallForm = Literal["python", "json"]
JSON_CALLS = "Output function calls as JSON."  # the sentence of the system prompt that asks for the other call form


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One example for SFT. `call_form` says how its tool calls are written."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...] = ()
    call_form: CallForm = "python"


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder that need not hold a model yet. Raises ModelError."""
    num_ids = max(_ids_of(read_tokenizer_json(folder)), default=0) + 1
    config = ModelConfig(
        model_type="lfm2",  # a stand-in: of a config, a tokenizer reads only how many rows the embedding has
        vocab_size=num_ids,
        hidden_size=2,
        intermediate_size=1,
        num_hidden_layers=0,
        layer_types=(),
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        num_dense_layers=0,
        eos_token_ids=(),
    )
    return Tokenizer.from_folder(folder, config)


def _ids_of(raw: Mapping[str, Any]) -> list[int]:
    return [*raw["model"]["vocab"].values(), *(token["id"] for token in raw.get("added_tokens") or ())]


def sft_row(tokenizer: Tokenizer, conversation: Conversation) -> Row:
    """A conversation of which the assistant's turns count: their text or calls, and the token that ends them.

    Raises RequestError for a conversation that no prompt can hold.
    """
    ids = conversation_ids(tokenizer, conversation)
    return Row(np.asarray(ids, np.int64), assistant_mask(tokenizer, ids))


def conversation_ids(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """The ids of a whole conversation, as serving would build them."""
    ids = build_prompt(tokenizer, conversation.messages, tools=conversation.tools, add_generation_prompt=False)
    if conversation.call_form == "json":
        ids = _with_json_calls(tokenizer, ids, [m.tool_calls for m in conversation.messages if m.tool_calls])
    return ids


def assistant_mask(tokenizer: Tokenizer, ids: Sequence[int]) -> np.ndarray:
    """Which ids [length] an assistant would have to write: each turn after its header, its end token included."""
    special = tokenizer.special
    header = tokenizer.encode("assistant\n")
    mask = np.zeros(len(ids), dtype=bool)
    begin = None
    for i, token_id in enumerate(ids):
        if token_id == special.im_start and list(ids[i + 1 : i + 1 + len(header)]) == header:
            begin = i + 1 + len(header)
        elif token_id == special.im_end and begin is not None:
            mask[begin : i + 1] = True
            begin = None
    return mask


def _with_json_calls(tokenizer: Tokenizer, ids: Sequence[int], calls: Sequence[Sequence[ToolCall]]) -> list[int]:
    """Write the calls between each pair of call markers as JSON instead. Only ids can be markers, text never is."""
    start, end = tokenizer.special.tool_call_start, tokenizer.special.tool_call_end
    assert start is not None, "build_prompt has written calls"
    remaining = iter(calls)
    written: list[int] = []
    is_inside = False
    for token_id in ids:
        if token_id == start:
            is_inside = True
            written += [token_id, *tokenizer.encode(render_json_calls(next(remaining)))]
        elif token_id == end:
            is_inside = False
        if not is_inside:
            written.append(token_id)
    return written


def document_rows(tokenizer: Tokenizer, text: str, *, max_length: int) -> Iterator[Row]:
    """A text for pretraining, every token a target: BOS, the text, end of text; cut into rows where it is long."""
    end = tokenizer.special.endoftext
    ids = [tokenizer.special.bos, *tokenizer.encode(text), *([] if end is None else [end])]
    for begin in range(0, len(ids) - 1, max_length - 1):  # the last id of a row is an input of the next
        part = np.asarray(ids[begin : begin + max_length], np.int64)
        yield Row(part, np.ones(len(part), bool))


def every_token(tokenizer: Tokenizer, conversation: Conversation) -> Row:
    """A conversation for pretraining."""
    ids = np.asarray(conversation_ids(tokenizer, conversation), np.int64)
    return Row(ids, np.ones(len(ids), bool))


def read_examples(path: Path) -> Iterator[Conversation | str]:
    """The conversations and texts of a JSONL file. Raises UsageError naming the file and the line that is wrong."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_example(line, f"{path}:{number}")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}. Check data.files of the recipe.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 ({error}).") from error


def _parse_example(line: str, where: str) -> Conversation | str:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({error}). Is the file truncated?") from error
    if isinstance(raw, dict) and isinstance(raw.get("text"), str):
        return str(raw["text"])
    if not isinstance(raw, dict) or "messages" not in raw:
        raise UsageError(f'{where} is neither {{"text": ...}} nor {{"messages": [...]}}.')
    form = raw.get("call_form", "python")
    tools = raw.get("tools", [])
    if form not in ("python", "json") or not isinstance(tools, list):
        raise UsageError(f"{where}: call_form is python or json, and tools is an array.")
    try:
        messages = parse_messages(raw["messages"])
    except RequestError as error:
        raise UsageError(f"{where}: {error}") from error
    return Conversation(messages=tuple(messages), tools=tuple(tools), call_form=form)
