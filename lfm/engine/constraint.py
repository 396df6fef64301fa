"""What holds the output of one sequence: its place in its grammar, and the ids that are known to come next. No torch.

Where a grammar leaves no choice, the library writes the ids itself. A run of them goes into the cache in one chunk, as
a prompt does; a short one is sampled id by id from a mask of one bit. Both ways give the same ids.
"""

from collections import deque

from lfm.engine.grammar_masks import GrammarMatcher
from lfm.protocol import ErrorInfo

NEVER = 2**31  # as `min_chunk`: every id is sampled


class Constraint:
    """One sequence's matcher. `min_chunk`: so many forced ids are taken at once.

    Sequences that report log-probabilities sample every id (NEVER): each then has its own.
    """

    __slots__ = ("_forced", "_min_chunk", "_misled", "matcher")

    def __init__(self, matcher: GrammarMatcher, *, min_chunk: int) -> None:
        self.matcher = matcher
        self._min_chunk = min_chunk
        self._forced: deque[int] = deque()  # accepted by the matcher already, still to be sampled
        self._misled = False

    @property
    def error(self) -> str | None:
        """What went wrong in the grammar library, or None. Such a sequence must end with an error."""
        return "a token outside of the grammar was sampled" if self._misled else self.matcher.error

    @property
    def next_id(self) -> int | None:
        """The only id that may be sampled next, where that is known without a mask."""
        return self._forced[0] if self._forced else None

    def begin(self, most: int) -> list[int]:
        """The ids, at most so many, that the output begins with whatever the model says. To be called first.

        A stop id is not among them: it has to be sampled, so that every sequence samples something.
        """
        forced = self._take_forced()
        num_taken = 0
        if len(forced) >= self._min_chunk:
            end = next((i for i, one in enumerate(forced) if one in self.matcher.stop_ids), len(forced))
            num_taken = min(most, end)
        self._forced.extend(forced[num_taken:])
        return forced[:num_taken]

    def advance(self, token_id: int) -> list[int]:
        """Go on with an id that was sampled. Returns the ids after it that are taken without being sampled."""
        if self._forced:
            self._misled = self._forced.popleft() != token_id
        else:
            self.matcher.accept(token_id)
        if self._forced or self.error is not None:
            return []
        forced = self._take_forced()
        if len(forced) >= self._min_chunk:
            return forced
        self._forced.extend(forced)
        return []

    def _take_forced(self) -> list[int]:
        forced = self.matcher.take_forced()
        if forced and forced[-1] not in self.matcher.stop_ids:
            forced += self.matcher.take_forced()  # the end, if nothing else may follow
        return forced


def grammar_failed(cause: str) -> ErrorInfo:
    """The error of a sequence whose grammar cannot be followed any further."""
    message = f"The output could not be held to its grammar: {cause}. Send the request again, or make it simpler."
    return ErrorInfo(message=message, type="server_error", code="grammar_error")
