"""Ids to text as they arrive, never half a character."""

import codecs
from collections.abc import Iterable

from lfm.chat.tokenizer import Tokenizer


class Detokenizer:
    """Turns a growing sequence of ids into text; all pieces joined equal `Tokenizer.decode` of all ids at once.

    Bytes that could still become a character are held, at most three of them. Special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these further ids complete."""
        return "".join(
            self._decoder.decode(self._tokenizer.token_bytes(token_id))
            for token_id in token_ids
            if token_id not in self._tokenizer.special_ids
        )

    def finish(self) -> str:
        """The rest at the end: U+FFFD for a character that stayed incomplete, else empty."""
        return self._decoder.decode(b"", final=True)
