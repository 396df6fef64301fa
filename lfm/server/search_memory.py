"""What the server searched for a chat whose answer ended with calls of the caller's own tools.

Chat completions have no place to show a search, and so its client sends the answer back without it: the model would not
know what it has found, and its prompt would leave the prefix cache. It is kept here for a while, by the id of the call.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lfm.chat.messages import Message, ToolCall
from lfm.search.chain import CACHE_S
from lfm.server.tool_turns import pair_results

_MAX_KEPT = 256  # answers; each holds some thousand tokens of text


@dataclass(frozen=True, slots=True, kw_only=True)
class Unseen:
    """An answer as the model wrote it. The caller saw `shown_text` and the calls of `shown_ids`.

    `turns` are those before the last one, results included; `text`, `calls` and `results` (of our calls) are its own.
    """

    turns: tuple[Message, ...]
    text: str
    calls: tuple[ToolCall, ...]
    results: tuple[Message, ...]
    shown_text: str
    shown_ids: tuple[str, ...]

    def is_of(self, message: Message) -> bool:
        """Whether `message` is what the caller was shown, unchanged."""
        return tuple(call.id for call in message.tool_calls) == self.shown_ids and message.text == self.shown_text

    def in_place_of(self, message: Message) -> list[Message]:
        """All turns of the answer. The caller's calls are taken from `message`: it may have changed their arguments."""
        shown = {call.id: call for call in message.tool_calls}
        calls = tuple(shown.get(call.id, call) for call in self.calls)
        return [*self.turns, Message(role="assistant", content=self.text, tool_calls=calls), *self.results]


class SearchMemory:
    """Of one process: a caller that reaches another one loses no more than what its model found."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: OrderedDict[tuple[str, str], tuple[float, Unseen]] = OrderedDict()

    def keep(self, unseen: Unseen, *, tenant: str) -> None:
        """Keep it for 15 minutes, or until there are too many."""
        self._kept[tenant, unseen.shown_ids[0]] = (self._clock() + CACHE_S, unseen)
        while len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)

    def restored(self, messages: Sequence[Message], *, tenant: str) -> list[Message]:
        """The messages of a caller with the searches that it was not shown, where they were."""
        restored: list[Message] = []
        for message in messages:
            unseen = self._find(message, tenant) if message.tool_calls else None
            restored += [message] if unseen is None else unseen.in_place_of(message)
        return pair_results(restored) if len(restored) > len(messages) else restored

    def _find(self, message: Message, tenant: str) -> Unseen | None:
        expires_s, unseen = self._kept.get((tenant, message.tool_calls[0].id or ""), (0.0, None))
        return unseen if unseen is not None and expires_s > self._clock() and unseen.is_of(message) else None
