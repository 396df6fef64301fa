"""Reading and making tokenizer.json contents, as plain dictionaries. Knows files and JSON; encodes nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfm.errors import ModelError

# LFM2's control tokens, ids 0..13 of its first tokenizer. Checkpoints are searched by text: LFM2.5 moved them.
SPECIAL_TOKEN_TEXTS = (
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|fim_pre|>",
    "<|fim_mid|>",
    "<|fim_suf|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|tool_list_start|>",
    "<|tool_list_end|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "<|tool_response_start|>",
    "<|tool_response_end|>",
)


def byte_alphabet() -> dict[str, int]:
    """Map each of the 256 printable characters that byte-level BPE writes for a byte to that byte.

    Source: `bytes_to_unicode` of GPT-2: printable Latin-1 stands for itself, the rest moves to U+0100 and up in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(moved)}


def byte_level_json() -> dict[str, Any]:
    """Make the tokenizer of `random:` presets: the special tokens at ids 0..13, then byte b at id 14 + b."""
    num_special = len(SPECIAL_TOKEN_TEXTS)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocab = {char: num_special + byte for char, byte in byte_alphabet().items()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in enumerate(SPECIAL_TOKEN_TEXTS)],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {text: i for i, text in enumerate(SPECIAL_TOKEN_TEXTS)} | vocab,
            "merges": [],
        },
    }


def read_tokenizer_json(folder: Path) -> dict[str, Any]:
    """Read tokenizer.json of a model folder. Raises ModelError if it is missing, unreadable or no byte-level BPE."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no tokenizer.json. Download it from the model's page into that folder.")
    raw = read_json_object(path)
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ModelError(f"{path} is no BPE tokenizer; LFM2 checkpoints have one. Download it again.")
    return raw


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises ModelError with the cause."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds {type(raw).__name__}, not an object. Download it again.")
    return raw


def read_chat_template(folder: Path) -> str | None:
    """The text of the folder's chat template, or None. It is searched for markers, never executed."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read ({error}). Download it again.") from error
    path = folder / "tokenizer_config.json"
    template = read_json_object(path).get("chat_template") if path.is_file() else None
    if isinstance(template, list):  # the form for several templates: [{"name": ..., "template": ...}]
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def without_side_effects(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what would change ids behind our back: truncation, padding, BPE dropout, tokens added around a text."""
    model = {**raw["model"], "dropout": None}
    return {**raw, "model": model, "truncation": None, "padding": None, "post_processor": None}


def without_added_tokens(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Make a tokenizer that cannot produce the id of any added token, whatever the text.

    `encode_special_tokens` of the tokenizers library leaves added tokens with `special: false` (`<think>`) on, and an
    added token that is also in the vocabulary can come out of BPE (`ignore_merges` looks whole words up there). So the
    tokens leave the list, the vocabulary and the merges.
    """
    added = {token["content"] for token in raw.get("added_tokens") or ()}
    model = raw["model"]
    merges = []
    for merge in model.get("merges") or ():
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if added.isdisjoint((left, right, left + right)):
            merges.append(merge)
    vocab = {text: token_id for text, token_id in model["vocab"].items() if text not in added}
    unknown = None if model.get("unk_token") in added else model.get("unk_token")
    return {**raw, "added_tokens": [], "model": {**model, "vocab": vocab, "merges": merges, "unk_token": unknown}}
