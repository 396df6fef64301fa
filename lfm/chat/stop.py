"""Stop strings in a stream of text. What could be the beginning of one is held back until that is decided.

The first stop string to be completed ends the text; of several completed by one character, the longest. This does not
depend on how the text is cut into pieces. Each character is read once (Aho and Corasick, 1975).
"""

from collections import deque
from collections.abc import Sequence

from lfm.chat.tokenizer import check_text
from lfm.errors import RequestError
from lfm.protocol import MAX_STOP_BYTES, MAX_STOP_STRINGS


class StopStrings:
    """The stop strings of a request as one automaton; immutable, so that the n choices of a request share it.

    A state is the longest end of the text so far that begins a stop string; `depths` holds its length, and
    `match_lengths` the length of the longest stop string that ends there (0: none).
    """

    def __init__(self, stop: Sequence[str] = (), *, param: str = "stop") -> None:
        _check_stop(stop, param)
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.depths = [0]
        self.match_lengths = [0]
        for text in stop:
            self._insert(text)
        self._link()

    def __bool__(self) -> bool:
        return len(self.depths) > 1

    def advance(self, state: int, char: str) -> int:
        """The state after one more character. Amortised constant time: a fallback undoes an earlier advance."""
        while char not in self._next[state]:
            if state == 0:
                return 0
            state = self._fallback[state]
        return self._next[state][char]

    def _insert(self, text: str) -> None:
        state = 0
        for char in text:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self.depths.append(self.depths[state] + 1)
                self.match_lengths.append(0)
            state = self._next[state][char]
        self.match_lengths[state] = len(text)

    def _link(self) -> None:
        queue = deque(self._next[0].values())  # breadth first: a state falls back to a shallower, finished one
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                self._fallback[child] = self.advance(self._fallback[state], char)
                self.match_lengths[child] = self.match_lengths[child] or self.match_lengths[self._fallback[child]]
                queue.append(child)


class StopMatcher:
    """Follows one text. `matched` is the stop string that ended it, or None."""

    def __init__(self, stop: StopStrings, *, include_stop: bool = False) -> None:
        self.matched: str | None = None
        self._stop = stop
        self._include_stop = include_stop
        self._state = 0
        self._held = ""

    def push(self, text: str) -> str:
        """Add text and return what is certain now. After a match: the text before it (or through it), then nothing."""
        if self.matched is not None:
            return ""
        if not self._stop:
            return text
        known = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            self._state = self._stop.advance(self._state, char)
            length = self._stop.match_lengths[self._state]
            if length:
                self.matched, self._held = known[end - length : end], ""
                return known[: end if self._include_stop else end - length]
        certain = len(known) - self._stop.depths[self._state]
        self._held = known[certain:]
        return known[:certain]

    def flush(self) -> str:
        """Give out what is held: the text is over, so nothing can complete it."""
        held, self._held, self._state = self._held, "", 0
        return held


def _check_stop(stop: Sequence[str], param: str) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestError(f"{param} has {len(stop)} strings. Allowed: at most {MAX_STOP_STRINGS}.", param=param)
    for index, text in enumerate(stop):
        where = f"{param}[{index}]"
        if not text:
            raise RequestError(f"{where} is empty. Leave it out.", param=where)
        check_text(text, param=where)
        num_bytes = len(text.encode("utf-8"))
        if num_bytes > MAX_STOP_BYTES:
            raise RequestError(f"{where} has {num_bytes} bytes. Allowed: 1 to {MAX_STOP_BYTES}.", param=where)
