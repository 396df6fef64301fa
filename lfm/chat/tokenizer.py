"""The tokenizer of one model: text to ids and back, with control tokens under our control.

Two encoders are made from one tokenizer.json: `encode` knows no added token, so text can never become a control token;
`encode_raw` matches them, for completions where the caller writes the whole prompt. Sizes and ids come from the file.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers

from lfm.chat import tokenizer_json
from lfm.config import ModelConfig
from lfm.errors import ModelError, RequestError

# "plain": the 24B's template. "wrapped": LFM2-8B-A1B and dense LFM2, with markers around tool lists and tool responses.
PromptForm = Literal["plain", "wrapped"]

# All of ASCII and characters of two, three and four bytes; in NFC, so a normalizing tokenizer passes too.
_PROBE = "".join(map(chr, range(128))) + "\u00e9\u0416\u20ac\u65e5\U0001f600"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Ids of the control tokens by name; None where the tokenizer lacks one. `im_end` ends a turn (the EOS)."""

    bos: int
    im_start: int
    im_end: int
    pad: int | None = None
    endoftext: int | None = None
    tool_list_start: int | None = None
    tool_list_end: int | None = None
    tool_call_start: int | None = None
    tool_call_end: int | None = None
    tool_response_start: int | None = None
    tool_response_end: int | None = None


class Tokenizer:
    """Encode and decode for one checkpoint. Immutable after construction; safe to share between threads.

    Attributes:
        num_ids: ids of this tokenizer lie in [0, num_ids); the embedding may have more rows, which are never sampled.
        special: the control tokens by name.
        special_ids: ids marked special; they never become text.
        added_ids: special_ids and the added tokens that are not marked special; `encode` yields none of them.
        stop_token_ids: ids that end a generation: im_end, endoftext and those that config.json names.
        max_token_bytes: bytes of the longest token; a text of b bytes has at least b / max_token_bytes tokens.
        prompt_form: which of the two chat layouts this checkpoint was trained with.
    """

    def __init__(
        self, raw: Mapping[str, Any], *, config: ModelConfig, origin: str, prompt_form: PromptForm = "plain"
    ) -> None:
        raw = tokenizer_json.without_side_effects(raw)
        self._matching = _load(raw, origin)
        self._literal = _load(tokenizer_json.without_added_tokens(raw), origin)
        vocab = self._matching.get_vocab(with_added_tokens=True)
        added = self._matching.get_added_tokens_decoder()
        self.num_ids: int = max(vocab.values(), default=-1) + 1
        if self.num_ids > config.vocab_size:
            raise ModelError(
                f"{origin} has ids up to {self.num_ids - 1}, but config.json says vocab_size={config.vocab_size}. "
                "Use the tokenizer and the config of the same model."
            )
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.added_ids = frozenset(added)
        self.special = _find_special({token.content: token_id for token_id, token in added.items()}, origin)
        self.prompt_form: PromptForm = prompt_form
        if prompt_form == "wrapped":
            _check_wrapped(self.special, origin)
        stop_ids = {self.special.im_end, self.special.endoftext, *config.eos_token_ids}
        self.stop_token_ids = tuple(sorted(i for i in stop_ids if i is not None and 0 <= i < config.vocab_size))
        self._bytes = _bytes_of_ids(vocab, self.added_ids)
        self.max_token_bytes = max(map(len, self._bytes))
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ModelError(f"{origin} loses text: it is no complete byte-level tokenizer. Download it again.")

    @classmethod
    def from_folder(cls, folder: Path, config: ModelConfig) -> "Tokenizer":
        """Read tokenizer.json and the chat template's layout. Raises ModelError with the cause and the fix."""
        template = tokenizer_json.read_chat_template(folder)
        return cls(
            tokenizer_json.read_tokenizer_json(folder),
            config=config,
            origin=str(folder / "tokenizer.json"),
            prompt_form="wrapped" if template is not None and "<|tool_list_start|>" in template else "plain",
        )

    @classmethod
    def byte_level(cls, config: ModelConfig) -> "Tokenizer":
        """The tokenizer of `random:` presets: special tokens at ids 0..13, byte b at id 14 + b."""
        return cls(tokenizer_json.byte_level_json(), config=config, origin="the byte-level tokenizer")

    @classmethod
    def for_source(cls, folder: Path | None, config: ModelConfig) -> "Tokenizer":
        """The folder's tokenizer, or the byte-level one for a `random:` preset (folder None)."""
        return cls.byte_level(config) if folder is None else cls.from_folder(folder, config)

    def encode(self, text: str, *, param: str | None = None) -> list[int]:
        """Encode literal text: no id is ever in `added_ids`. Raises RequestError naming `param` for lone surrogates."""
        check_text(text, param=param)
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, already checked, in one call that releases the interpreter lock."""
        return [encoding.ids for encoding in self._literal.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_raw(self, text: str, *, param: str | None = None) -> list[int]:
        """Encode a whole prompt as the caller wrote it, control tokens included, with exactly one BOS in front."""
        check_text(text, param=param)
        ids = self._matching.encode_batch_fast([text], add_special_tokens=False)[0].ids
        start = next((i for i, token_id in enumerate(ids) if token_id != self.special.bos), len(ids))
        return [self.special.bos, *ids[start:]]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids without special tokens; invalid UTF-8 becomes U+FFFD. Raises RequestError for unknown ids."""
        shown = (self.token_bytes(token_id) for token_id in ids if token_id not in self.special_ids)
        return b"".join(shown).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token; of an added token, its text; empty for an id that the tokenizer leaves out."""
        if not 0 <= token_id < self.num_ids:
            self.check_ids([token_id])
        return self._bytes[token_id]

    def check_ids(self, ids: Iterable[int], *, param: str | None = None) -> None:
        """Raise RequestError naming `param` unless every id lies in [0, num_ids)."""
        for position, token_id in enumerate(ids):
            if not 0 <= token_id < self.num_ids:
                where = f"{param}[{position}]" if param else "token id"
                raise RequestError(
                    f"{where}={token_id} is outside the tokenizer. Allowed: 0 to {self.num_ids - 1}.", param=param
                )


def check_text(text: str, *, param: str | None = None) -> None:
    """Raise RequestError naming `param` if text holds a lone surrogate, which no UTF-8 and so no token can express."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param or 'text'} holds a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}), "
            "which is not valid Unicode text. Send whole characters.",
            param=param,
        ) from None


def _load(raw: Mapping[str, Any], origin: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(raw))
    except Exception as error:  # the library raises bare Exception for every defect of the file
        raise ModelError(f"{origin} is not a valid tokenizer ({error}). Download it again.") from error


def _find_special(ids: Mapping[str, int], origin: str) -> SpecialTokens:
    for text in ("<|startoftext|>", "<|im_start|>", "<|im_end|>"):
        if text not in ids:
            raise ModelError(f"{origin} has no {text} token, so it is no LFM2 chat tokenizer. Download it again.")
    return SpecialTokens(
        bos=ids["<|startoftext|>"],
        im_start=ids["<|im_start|>"],
        im_end=ids["<|im_end|>"],
        pad=ids.get("<|pad|>"),
        endoftext=ids.get("<|endoftext|>"),
        tool_list_start=ids.get("<|tool_list_start|>"),
        tool_list_end=ids.get("<|tool_list_end|>"),
        tool_call_start=ids.get("<|tool_call_start|>"),
        tool_call_end=ids.get("<|tool_call_end|>"),
        tool_response_start=ids.get("<|tool_response_start|>"),
        tool_response_end=ids.get("<|tool_response_end|>"),
    )


def _check_wrapped(special: SpecialTokens, origin: str) -> None:
    for name in ("tool_list_start", "tool_list_end", "tool_response_start", "tool_response_end"):
        if getattr(special, name) is None:
            raise ModelError(
                f"The chat template uses <|{name}|>, which {origin} lacks. Use the template and tokenizer of one model."
            )


def _bytes_of_ids(vocab: Mapping[str, int], added: frozenset[int]) -> list[bytes]:
    byte_of_char = tokenizer_json.byte_alphabet()
    table = [b""] * (max(vocab.values()) + 1)
    for text, token_id in vocab.items():
        if token_id in added or not byte_of_char.keys() >= set(text):
            table[token_id] = text.encode("utf-8")
        else:
            table[token_id] = bytes(byte_of_char[char] for char in text)
    return table
