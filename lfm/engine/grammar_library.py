"""What the engine and the worker that tries grammars ask of the grammar library (llguidance), in the same way.

Nothing else is imported here: the worker has little memory and should start fast.
"""

import re
from collections.abc import Callable, Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

MAX_ERROR_CHARS = 300
DEAD_END = "it comes to a place where nothing is allowed"

# What the library says, and what it means to whoever wrote the grammar.
_MEANINGS = {
    "NoExtension": DEAD_END,
    "Too many items": "it can be read in too many ways at once",
    "too big": "it is too large",
    "LexerTooComplex": "its terminals are too complex",
    "fuel": "its terminals are too complex",
}
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): ")

# Runs of text in either of Python's quotes. Where a whole run is allowed, its tokens need no look of their own.
STRING_RUNS = [r"""[^"'\\\x00-\x1F\x7F]{1,10}""", r"""[^"'\\\x00-\x1F\x7F]{1,30}""", r"""[^"'\\\x00-\x1F\x7F]+"""]


class TokenTable:
    """A vocabulary as the library wants to see it: the bytes of every id, and a way to write text in tokens.

    An id without bytes is never allowed. The first of `stop_ids` ends a turn.
    """

    bos_token_id = None

    def __init__(
        self,
        tokens: Sequence[bytes],
        *,
        special_ids: Sequence[int],
        stop_ids: Sequence[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens = list(tokens)
        self.special_token_ids = sorted(special_ids)
        self.stop_ids = list(stop_ids)
        self.eos_token_id = stop_ids[0]
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)

    def compiled(self) -> LLTokenizer:
        """The library's own form: a tree of all tokens. Takes some 0.2 s for 65,536 of them."""
        slices = [*LLTokenizer.general_slices(), *STRING_RUNS]
        return LLTokenizer(TokenizerWrapper(self), eos_token=self.stop_ids, slices=slices)


def compile_grammar(tokenizer: LLTokenizer, text: str) -> LLMatcher:
    """A matcher at the beginning of a Lark grammar. It may be in error: ask `readable_error`."""
    limits = LLParserLimits(
        max_items_in_row=10_000,  # 512 tools take some 2,500
        step_lexer_fuel=200_000,  # at most 14 ms of a step
        step_max_items=50_000,  # at most 2.5 ms of a step
        max_lexer_states=50_000,  # at most 100 MB
        verbose_errors=False,
    )
    return LLMatcher(tokenizer, text, log_level=0, limits=limits)


def readable_error(matcher: LLMatcher) -> str | None:
    """What went wrong, in one line, or None. To be asked after every call: the library does not raise."""
    text = matcher.get_error()
    if not text:
        return None
    line: str = text.split("\n", 1)[0]
    for words, meaning in _MEANINGS.items():
        if words in line:
            return meaning
    place = _PLACE.match(line)
    if place:  # the first line says only that this is a grammar; what its writer wrote begins below it
        line = f"line {int(place[1]) - 1}, column {place[2]}: {line[place.end() :]}"
    return line[:MAX_ERROR_CHARS].removesuffix(":")
