"""Tool calls out of a model's answer: its text and its blocks of calls, in the order in which they come.

The caller says where control tokens stood (`open`, `close`); they are no text. Under a grammar, arguments stream as
they are written (`call_parser_stream`); without one a block is read as a whole (`call_parser_lenient`), and the model's
habit of repeating the block as text after it is undone. Any cutting of the text gives the same calls and the same text.
"""

import secrets
from collections.abc import Callable

from lfm.chat.call_parser_lenient import ParsedCall, parse_block
from lfm.chat.call_parser_stream import CallDelta, CallStream

Piece = str | CallDelta  # text of the answer, or part of a call


def new_call_id() -> str:
    """An id for one call, as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


class CallReader:
    """Follows one answer. Attributes: `num_calls` so far; `is_open` while a block is being written.

    Args:
        is_constrained: a grammar holds the blocks.
        make_id: makes the ids of calls.
    """

    def __init__(self, *, is_constrained: bool, make_id: Callable[[], str] = new_call_id) -> None:
        self.num_calls = 0
        self.is_open = False
        self._is_constrained = is_constrained
        self._make_id = make_id
        self._stream: CallStream | None = None
        self._block = ""  # the text of the block
        self._echo = ""  # what the model may repeat after it
        self._held = ""  # text that may be the beginning of that

    def open(self) -> list[Piece]:
        """The token that opens a block came."""
        pieces = self._release()
        if not self.is_open:
            self.is_open = True
            self._block = ""
            if self._is_constrained:
                self._stream = CallStream(make_id=self._make_id, first_index=self.num_calls)
        return pieces

    def push(self, text: str) -> list[Piece]:
        """Further text of the answer, inside a block or outside."""
        if not text:
            return []
        if not self.is_open:
            return self._outside(text)
        self._block += text
        if self._stream is None:
            return []
        deltas = self._stream.push(text)
        self.num_calls = self._stream.first_index + self._stream.num_calls
        return list(deltas)

    def close(self) -> list[Piece]:
        """The token that closes a block came. One without a block ends a repetition of it."""
        if not self.is_open:
            self._echo = self._held = ""
            return []
        self.is_open = False
        stream, self._stream = self._stream, None
        if stream is not None:
            return [] if stream.num_calls or not self._block.strip() else [self._block]
        self._echo = self._block.strip()
        pieces: list[Piece] = []
        for found in parse_block(self._block):
            if isinstance(found, ParsedCall):
                pieces.append(CallDelta(self.num_calls, self._make_id(), found.name, found.arguments))
                self.num_calls += 1
            else:
                pieces.append(found)
        return pieces

    def finish(self) -> list[Piece]:
        """The answer is over, perhaps in the middle of a block. What a grammar began there is the begin of a call."""
        if not self.is_open:
            return self._release()
        pieces = self.close()
        return [] if self._is_constrained else pieces

    def _outside(self, text: str) -> list[Piece]:
        self._held += text
        if self._echo:
            seen = self._held.lstrip()
            if self._echo.startswith(seen) and seen != self._echo:
                return []
            if seen.startswith(self._echo):
                self._held = seen.removeprefix(self._echo)
        return self._release()

    def _release(self) -> list[Piece]:
        held, self._held, self._echo = self._held, "", ""
        return [held] if held else []
