"""Grammars in the engine: compiled beside it, and their masks filled while the device computes.

A sequence with a grammar is held back until that is compiled. From then on each of its samples depends on the ids
before it, which the host has to know: the engine reads step N while the forward of N + 1 runs, lets the helper thread
fill the masks of N + 1, and launches sampling then. Rows without a grammar are sampled in the same launch.

One thread owns this, the engine's. Between `start` and `finish` the matchers of the batch are the helper's.
"""

import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from typing import NamedTuple

import torch

from lfm.engine.constraint import NEVER, Constraint, grammar_failed
from lfm.engine.grammar_library import TokenTable
from lfm.engine.grammar_masks import BITS, GrammarCache, GrammarMatcher, MaskFiller, num_mask_words
from lfm.engine.sampling_rows import SamplingRows
from lfm.engine.scheduler import Scheduler
from lfm.engine.sequence import Sequence, Status
from lfm.engine.step import ScheduledBatch
from lfm.engine.wire import to_error_info
from lfm.errors import RequestError
from lfm.protocol import ErrorInfo

logger = logging.getLogger(__name__)

COMPILE_S = 30.0  # a grammar that passed its trial compiled there in 5 s
MASK_S = 1.0  # a mask takes 15 ms at worst by the library's own limits; more means that it hangs, or the machine does
MAX_STUCK = 4  # masks that may hang in one step; after them, all that are not filled count as late

_LATE = ErrorInfo(
    message="The grammar of this request takes too long to follow. Make it simpler.",
    type="server_error",
    code="grammar_timeout",
)


class Failure(NamedTuple):
    """A sequence that must end with this error."""

    sequence: Sequence
    error: ErrorInfo


class Grammars:
    """All grammars of one engine.

    Args:
        make_table: makes the table of tokens, once, in the thread that compiles; None: grammars are refused.
        min_chunk: so many forced ids go into the cache in one chunk.
    """

    def __init__(
        self,
        make_table: Callable[[], TokenTable] | None,
        rows: SamplingRows,
        scheduler: Scheduler,
        *,
        min_chunk: int,
    ) -> None:
        self.min_chunk = min_chunk
        self._scheduler = scheduler
        self._make_table = make_table
        self._rows = rows
        self._cache: GrammarCache | None = None
        self._compiling: dict[str, tuple[Sequence, Future[GrammarMatcher]]] = {}
        self._masks: torch.Tensor | None = None
        self._filler: MaskFiller | None = None
        self._held: list[Sequence] = []  # by their row of `_masks`
        self._marks: list[tuple[int, list[int]]] = []

    # -- compiling -----------------------------------------------------------------------------------------------------

    @property
    def is_compiling(self) -> bool:
        return bool(self._compiling)

    def check(self) -> None:
        """Raise RequestError if this engine takes no grammars."""
        if self._make_table is None:
            raise RequestError("This engine has no tokenizer, so it takes no grammar.", param="grammar")

    def compile(self, sequence: Sequence) -> None:
        """Begin to compile a sequence's grammar, and hold it back until then."""
        grammar = sequence.request.grammar
        assert grammar is not None
        assert self._make_table is not None
        if self._cache is None:
            self._cache = GrammarCache(self._make_table)
        sequence.is_held = True
        self._compiling[sequence.id] = (sequence, self._cache.prepare(grammar))

    def forget(self, request_id: str) -> None:
        """Its sequence has ended, or never was."""
        found = self._compiling.pop(request_id, None)
        if found is not None:
            found[1].cancel()

    def wait(self, timeout_s: float) -> None:
        """Wait a moment for a grammar, when there is nothing else to do."""
        wait([future for _, future in self._compiling.values()], timeout_s, FIRST_COMPLETED)

    def take_compiled(self) -> list[Failure]:
        """Give the sequences whose grammars are ready their constraint; returns those whose grammars are none."""
        failures = self._late_compilations()
        for sequence, future in list(self._compiling.values()):
            if not future.done():
                continue
            del self._compiling[sequence.id]
            try:
                matcher = future.result()
            except RequestError as error:
                failures.append(Failure(sequence, to_error_info(error)))
            except (Exception, CancelledError):  # it costs its own request only; the traceback goes to the log
                logger.exception("a grammar could not be compiled")
                failures.append(Failure(sequence, grammar_failed("the grammar library failed")))
            else:
                reports_logprobs = sequence.request.sampling.logprobs is not None
                constraint = Constraint(matcher, min_chunk=NEVER if reports_logprobs else self.min_chunk)
                self._scheduler.release(sequence, constraint)
        return failures

    def _late_compilations(self) -> list[Failure]:
        """Leave a thread that hangs alone with its grammar; another one goes on with the others."""
        assert self._cache is not None
        if self._cache.busy_s < COMPILE_S:
            return []
        stuck = {sequence.request.grammar for sequence, future in self._compiling.values() if future.running()}
        self._cache.abandon_helper()
        failures = []
        for sequence, future in list(self._compiling.values()):
            grammar = sequence.request.grammar
            assert grammar is not None
            if grammar in stuck:
                del self._compiling[sequence.id]
                failures.append(Failure(sequence, _LATE))
            elif future.cancelled():
                self._compiling[sequence.id] = (sequence, self._cache.prepare(grammar))
        return failures

    # -- masks ---------------------------------------------------------------------------------------------------------

    def hold(self, batch: ScheduledBatch) -> bool:
        """Whether some sample of the batch depends on the ids of the step before. Free while nobody uses grammars."""
        return self._cache is not None and any(
            row.sequence.constraint is not None and row.samples for row in batch.rows
        )

    def start(self, batch: ScheduledBatch) -> None:
        """Begin to fill the masks of the batch's samples. All ids of earlier steps must have been read."""
        if self._filler is None:
            self._filler = self._new_filler()
        self._held.clear()
        self._marks.clear()
        jobs: list[tuple[int, GrammarMatcher]] = []
        for row in batch.rows:
            sequence = row.sequence
            constraint = sequence.constraint
            if constraint is None or not row.samples or sequence.status is Status.FINISHED:
                continue
            if sequence.unmarked:
                self._marks.append((sequence.row, sequence.unmarked))
                sequence.unmarked = []
            slot = len(self._held)
            known = sequence.ids[row.end] if row.end < len(sequence.ids) else constraint.next_id
            if known is not None:
                self._filler.fill_one(slot, known)
            elif constraint.matcher.needs_mask:
                jobs.append((slot, constraint.matcher))
            else:
                continue
            self._held.append(sequence)
        self._filler.start(jobs)

    @torch.inference_mode()
    def finish(self) -> list[Failure]:
        """Wait for the masks and send them to the device. Returns the sequences that have none, or a broken matcher."""
        assert self._filler is not None
        assert self._masks is not None
        late = self._late_slots()
        failures = [Failure(self._held[slot], _LATE) for slot in late]
        for slot, sequence in enumerate(self._held):
            constraint = sequence.constraint
            assert constraint is not None
            for token_id in sequence.request.sampling.banned_ids:
                self._filler.masks[slot, token_id >> 5] &= ~BITS[token_id & 31]
            if slot not in late and constraint.error is not None:
                failures.append(Failure(sequence, grammar_failed(constraint.error)))
        if self._marks:
            self._rows.mark(self._marks)
        if self._held:
            self._rows.write_masks([sequence.row for sequence in self._held], self._masks[: len(self._held)])
        return failures

    def _late_slots(self) -> list[int]:
        """Wait for the helper. One that hangs is left alone with its mask; another one goes on with the others."""
        stuck: list[int] = []
        assert self._filler is not None
        while late := self._filler.wait(MASK_S):
            stuck.append(late[0])
            before = self._filler
            self._filler = self._new_filler()  # the old one may still write into its memory
            self._filler.masks[: len(self._held)] = before.masks[: len(self._held)]
            before.abandon()
            if len(stuck) == MAX_STUCK:
                return stuck + late[1:]
            self._filler.start(before.rest(after=late[0]))
        return stuck

    def _new_filler(self) -> MaskFiller:
        rows, words = self._rows.num_rows, num_mask_words(self._rows.vocab_size)
        is_cuda = self._rows.device.type == "cuda"
        self._masks = torch.zeros((rows, words), dtype=torch.int32, pin_memory=is_cuda)
        return MaskFiller(self._masks.numpy())
