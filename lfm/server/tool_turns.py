"""Which tool result belongs to which call, which every API family tells by ids.

LFM2's chat layout has no place for ids: the order of the results says which call each one answers.
"""

from collections.abc import Sequence
from itertools import groupby

from lfm.chat.messages import Message
from lfm.errors import RequestError


class ToolTurns:
    """Follows the calls and results of a conversation while it is read."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._position_of: dict[str, int] = {}  # of every call so far, by id
        self._answered: set[str] = set()

    def add_call(self, call_id: str, where: str) -> None:
        """Raises RequestError for the id of a call that still waits for its result; some clients count from 0 again."""
        if call_id in self._position_of and call_id not in self._answered:
            raise RequestError(f"{where}={call_id[:80]!r} is the id of two calls. Give each its own.", param=where)
        self._answered.discard(call_id)
        self._position_of[call_id] = self._num_calls
        self._num_calls += 1

    def add_result(self, call_id: str, where: str) -> None:
        """Raises RequestError for a result without its call, and for a second result of one call."""
        if call_id not in self._position_of:
            raise RequestError(
                f"{where}={call_id[:80]!r} is the id of no call before it. Send the call, too.", param=where
            )
        if call_id in self._answered:
            raise RequestError(f"{where}={call_id[:80]!r} has a result already. Send one result per call.", param=where)
        self._answered.add(call_id)

    def in_call_order(self, results: Sequence[Message]) -> list[Message]:
        """Results that follow each other, in the order of the calls that they answer."""
        return sorted(results, key=lambda message: self._position_of[message.tool_call_id or ""])


def pair_results(messages: Sequence[Message], *, param: str = "messages") -> list[Message]:
    """The messages of a chat, with results that follow each other in the order of their calls.

    Raises RequestError for a result without its call, and for ids that say nothing.
    """
    paired: list[Message] = []
    turns = ToolTurns()
    numbered = [(f"{param}[{index}]", message) for index, message in enumerate(messages)]
    for are_results, group in groupby(numbered, key=lambda item: item[1].role == "tool"):
        turn = list(group)
        for where, message in turn:
            _follow(turns, message, where)
        found = [message for _, message in turn]
        paired += turns.in_call_order(found) if are_results else found
    return paired


def _follow(turns: ToolTurns, message: Message, where: str) -> None:
    if message.role == "tool":
        if message.tool_call_id is None:
            raise RequestError(
                f"{where}.tool_call_id is missing. Send the id of the call that this answers.",
                param=f"{where}.tool_call_id",
            )
        turns.add_result(message.tool_call_id, f"{where}.tool_call_id")
    elif message.role == "assistant":
        for index, call in enumerate(message.tool_calls):
            if call.id is not None:
                turns.add_call(call.id, f"{where}.tool_calls[{index}].id")
