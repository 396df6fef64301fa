"""Which tool result belongs to which call, for API families that tell it by ids.

LFM2's chat layout has no place for ids: the order of the results says which call each one answers.
"""

from collections.abc import Sequence

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
