"""Small checkpoints' text files for the tests of lfm.chat: trained here, with LFM2's layout and control tokens.

No LFM2 tokenizer.json may be shipped, so a BPE is trained on a few lines with the same pre-tokenizer, merge rule and
special tokens. The chat templates are reconstructions: the oracle that prompt building is compared with.
"""

import copy
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lfm.chat.tokenizer_json import SPECIAL_TOKEN_TEXTS
from lfm.config import ModelConfig

RESERVED = tuple(f"<|reserved_{i}|>" for i in range(6))
VOCAB_SIZE = 1024  # rows of the embedding; the tokenizers here are shorter, as the real one is

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = [
    "system user assistant tool List of tools: what are some fun things to do in New York?\n\n",
    "The weather in Zürich is 21 degrees; the answer is 42. It's what they're after.\n\n\n    return value\n",
    'def get_weather(city="Paris", days=3): {"name": "get_weather", "description": "the weather", "parameters": {}}',
    "<|im_start|>user <|im_end|> <think>the thought</think> think thinking",
]

PLAIN_TEMPLATE = """\
{{- bos_token -}}
{%- set keep_past_thinking = keep_past_thinking | default(false) -%}
{%- set ns = namespace(system_prompt="", content="", last_assistant=-1) -%}
{%- if messages[0]["role"] == "system" -%}
    {%- if messages[0]["content"] is string -%}
        {%- set ns.system_prompt = messages[0]["content"] -%}
    {%- else -%}
        {%- for item in messages[0]["content"] -%}
            {%- if item["type"] == "text" -%}
                {%- set ns.system_prompt = ns.system_prompt + item["text"] -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
    {%- set ns.system_prompt = ns.system_prompt + ("\\n" if ns.system_prompt else "") + "List of tools: [" -%}
    {%- for tool in tools -%}
        {%- set ns.system_prompt = ns.system_prompt + (tool if tool is string else tool | tojson) -%}
        {%- if not loop.last -%}
            {%- set ns.system_prompt = ns.system_prompt + ", " -%}
        {%- endif -%}
    {%- endfor -%}
    {%- set ns.system_prompt = ns.system_prompt + "]" -%}
{%- endif -%}
{%- if ns.system_prompt -%}
    {{- "<|im_start|>system\\n" + ns.system_prompt + "<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message["role"] == "assistant" -%}
        {%- set ns.last_assistant = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" -}}
    {%- set ns.content = message["content"] -%}
    {%- if ns.content is not string -%}
        {%- set ns.content = "" -%}
        {%- for item in message["content"] -%}
            {%- if item["type"] == "image" -%}
                {%- set ns.content = ns.content + "<image>" -%}
            {%- elif item["type"] == "text" -%}
                {%- set ns.content = ns.content + item["text"] -%}
            {%- else -%}
                {%- set ns.content = ns.content + (item | tojson) -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message["role"] == "assistant" and not keep_past_thinking and loop.index0 != ns.last_assistant -%}
        {%- if "</think>" in ns.content -%}
            {%- set ns.content = ns.content.split("</think>")[-1] | trim -%}
        {%- endif -%}
    {%- endif -%}
    {{- ns.content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""

WRAPPED_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(system_prompt="") -%}
{%- if messages[0]["role"] == "system" -%}
    {%- set ns.system_prompt = messages[0]["content"] -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
    {%- set ns.system_prompt = ns.system_prompt + ("\\n" if ns.system_prompt else "") -%}
    {%- set ns.system_prompt = ns.system_prompt + "List of tools: <|tool_list_start|>[" -%}
    {%- for tool in tools -%}
        {%- set ns.system_prompt = ns.system_prompt + (tool if tool is string else tool | tojson) -%}
        {%- if not loop.last -%}
            {%- set ns.system_prompt = ns.system_prompt + ", " -%}
        {%- endif -%}
    {%- endfor -%}
    {%- set ns.system_prompt = ns.system_prompt + "]<|tool_list_end|>" -%}
{%- endif -%}
{%- if ns.system_prompt -%}
    {{- "<|im_start|>system\\n" + ns.system_prompt + "<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" -}}
    {%- set content = message["content"] -%}
    {%- if message["role"] == "tool" -%}
        {%- set content = "<|tool_response_start|>" + content + "<|tool_response_end|>" -%}
    {%- endif -%}
    {{- content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""


def tiny_config(*, vocab_size: int = VOCAB_SIZE, eos_token_ids: tuple[int, ...] = (7,)) -> ModelConfig:
    return ModelConfig(
        model_type="lfm2",
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        layer_types=("conv",),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_dense_layers=1,
        eos_token_ids=eos_token_ids,
    )


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(_CORPUS * 3, trainer)
    return tokenizer.to_str()


def tokenizer_json(
    *, special: Sequence[str] = (*SPECIAL_TOKEN_TEXTS, *RESERVED), unmarked: Sequence[str] = (), at_end: bool = False
) -> dict[str, Any]:
    """A tokenizer.json whose special tokens stand first (LFM2) or behind the learned ones (LFM2.5).

    `unmarked` tokens are added with `special: false`, as `<think>` is. As in real files, the special tokens are in the
    model's vocabulary too.
    """
    raw: dict[str, Any] = copy.deepcopy(json.loads(_trained()))
    learned = raw["model"]["vocab"]
    first = len(learned) if at_end else 0
    vocab = {text: i + (0 if at_end else len(special)) for text, i in learned.items()}
    vocab |= {text: first + i for i, text in enumerate(special)}
    last = len(vocab)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": vocab[text], "content": text, **flags, "special": True} for text in special]
    for text in unmarked:
        added.append({"id": vocab.get(text, last), "content": text, **flags, "special": False})
        last += text not in vocab
    bos = {
        "<|startoftext|>": {"id": "<|startoftext|>", "ids": [vocab["<|startoftext|>"]], "tokens": ["<|startoftext|>"]}
    }
    raw["post_processor"] = {  # as in the real file: would put a second BOS in front of every encoded text
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|startoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": bos,
    }
    raw["model"]["vocab"] = vocab
    raw["added_tokens"] = added
    return raw


def write_folder(folder: Path, raw: dict[str, Any], *, template: str | None = None) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
