"""Training a byte-level BPE tokenizer with LFM2's control tokens and its way of cutting text into words.

The files are those of a published LFM2 folder: `tokenizer.json`, `tokenizer_config.json` and the chat template, which
is for other programs: lfm reads it for its layout and never runs it. Control tokens come first, in LFM2's order.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lfm.chat.tokenizer_json import SPECIAL_TOKEN_TEXTS
from lfm.chat.tool_calls import render_calls, render_json_calls
from lfm.errors import UsageError
from lfm.model.sizes import format_bytes
from lfm.train.examples import Conversation, read_examples
from lfm.train.recipe import DataSettings, TokenizerRecipe

# Not LFM2's own way of cutting words, which joins a space to the word after it: there a name in a sentence and the same
# name between quotes are different tokens. A small model learns to copy tokens, not to spell, so here a string is cut
# the same way wherever it stands: letters apart from what surrounds them, digits in threes, signs that occur inside of
# codes one by one, and every character of the scripts that write without spaces (or, Korean, with endings joined).
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\u30fc"
_SIGNS = r"+\-@#%*/$\u20ac_~<>|^&"
WORD_PATTERN = (
    rf"[{_UNSPACED}]|[\p{{L}}\p{{M}}&&[^{_UNSPACED}]]+|\p{{N}}{{1,3}}|[{_SIGNS}]"
    rf"|[^\s\p{{L}}\p{{M}}\p{{N}}{_SIGNS}]*[\r\n]+|[^\r\n\p{{L}}\p{{M}}\p{{N}}{_SIGNS}]+"
)
_BOS, _EOS, _PAD = "<|startoftext|>", "<|im_end|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, min_frequency: int) -> dict[str, Any]:
    """Train on texts and return the content of tokenizer.json. The same texts give the same tokenizer.

    Raises UsageError if the texts hold too little for `vocab_size`.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKEN_TEXTS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise UsageError(
            f"The texts give only {tokenizer.get_vocab_size()} tokens of tokenizer.vocab_size={vocab_size}. "
            "Give more text, a smaller vocab_size or a smaller min_frequency."
        )
    bos_id = tokenizer.token_to_id(_BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A {_BOS} $B", special_tokens=[(_BOS, bos_id)]
    )
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def write_tokenizer(folder: Path, content: dict[str, Any]) -> None:
    """Write the tokenizer's files. Raises UsageError if the folder already holds a tokenizer."""
    if (folder / "tokenizer.json").exists():
        raise UsageError(f"{folder} already holds a tokenizer. Remove it, or name another tokenizer.output.")
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": _BOS,
        "eos_token": _EOS,
        "pad_token": _PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    template = resources.files("lfm.train").joinpath("chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial = folder / "tokenizer.json.partial"
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / "tokenizer.json")  # last: a folder with it is whole


def run_recipe(recipe: TokenizerRecipe, *, on_progress: Callable[[str], None]) -> Path:
    """Train the tokenizer of a recipe and return its folder. Raises UsageError."""
    folder = Path(recipe.tokenizer.output)
    if (folder / "tokenizer.json").exists():
        on_progress(f"{folder} already holds a tokenizer")
        return folder
    settings = recipe.tokenizer
    content = train_tokenizer(
        _counted(texts_of(recipe.data), on_progress),
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
    )
    write_tokenizer(folder, content)
    return folder


def texts_of(data: DataSettings) -> Iterator[str]:
    """Every text of the data: documents, and of conversations whatever a prompt would hold of them."""
    for file in data.files:
        for example in read_examples(Path(file)):
            yield from [example] if isinstance(example, str) else _texts_in(example)
    if data.synthetic is not None:
        from lfm.train.synthetic.generate import conversations  # its tables take a moment to load

        for shard in range(data.synthetic.shards):
            for conversation in conversations(data.synthetic, shard=shard):
                yield from _texts_in(conversation)


def _texts_in(conversation: Conversation) -> Iterator[str]:
    for tool in conversation.tools:
        yield json.dumps(tool, ensure_ascii=False)
    for message in conversation.messages:
        if message.tool_calls:
            calls = message.tool_calls
            yield render_json_calls(calls) if conversation.call_form == "json" else render_calls(calls)
        yield f"{message.role}\n{message.text}"


def _counted(texts: Iterable[str], on_progress: Callable[[str], None]) -> Iterator[str]:
    num_bytes = 0
    for number, text in enumerate(texts):
        num_bytes += len(text.encode())
        if number % 20_000 == 0:
            on_progress(f"reading texts: {format_bytes(num_bytes)}")
        yield text
    on_progress(f"counting pairs in {format_bytes(num_bytes)}")
