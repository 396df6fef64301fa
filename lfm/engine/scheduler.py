"""The scheduler: one rule, and the bookkeeping of a step that is answered one step late. No torch here.

There is no prefill phase: every sequence has `num_computed` that catches up with `num_tokens`. A step takes running
sequences first (one token each, then chunks), then waiting ones, by priority and arrival, under a row limit and a token
budget. `schedule` goes ahead as if every sequence went on (lengths are known, ids are not); `update` reads a step's
answer and settles what it decided. Features go beside this file, not into it.

Who may change a sequence's blocks, and when (step N launched, not yet read):
    schedule   appends blocks; shares cached ones at admission
    abort/finish/preempt while N names the sequence   only marks it
    update(N)  indexes blocks that N filled; releases the blocks of a marked sequence once no launched step names it
"""

from bisect import bisect_left, insort

from lfm.engine.cache import BlockHasher, BlockPool
from lfm.engine.constraint import Constraint, grammar_failed
from lfm.engine.prefixes import Prefixes
from lfm.engine.sequence import Sequence, Status
from lfm.engine.step import Counters, ScheduledBatch, ScheduledRow, StepBudget, StepResult
from lfm.engine.token_events import NOT_FINITE, token_event
from lfm.errors import InternalError
from lfm.protocol import EngineRequest, ErrorInfo, FinishReason, TokenEvent, TokenLogprob

# While anything decodes, a step is short, but where so much waits that it would take more steps than this: long steps
# are up to a half faster per token, and those who wait wait longer than those who decode then do.
BACKLOG_STEPS = 16


class Scheduler:
    """Waiting and running sequences over one block pool. One thread owns it."""

    def __init__(
        self,
        pool: BlockPool,
        hasher: BlockHasher,
        *,
        block_size: int,
        max_running: int,
        step_tokens: int,
        step_tokens_decoding: int,
        prefix_caching: bool = True,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.counters = Counters()
        self.step_tokens = step_tokens
        self._step_tokens_decoding = min(step_tokens, step_tokens_decoding)
        self._prefixes = Prefixes(pool, hasher, block_size=block_size, is_on=prefix_caching)
        self._free_rows = list(range(max_running - 1, -1, -1))
        self.num_waiting_tokens = 0
        self._waiting: list[Sequence] = []  # sorted by key
        self._running: list[Sequence] = []  # sorted by key
        self._num_changes = 0  # of `_running`
        self._singles_since = -1  # the number of changes when all of them computed one token in the last step
        self._leaving: dict[str, Sequence] = {}  # preempted or finished, named by a launched step
        self._by_id: dict[str, Sequence] = {}  # every sequence without a terminal event
        self._num_arrivals = 0

    # -- entering and leaving ------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_sequences(self) -> bool:
        return bool(self._by_id or self._leaving)

    def knows(self, request_id: str) -> bool:
        return request_id in self._by_id or request_id in self._leaving

    def add(self, request: EngineRequest) -> Sequence:
        """Queue a request that `validate` has passed. Its prompt's full blocks are hashed here, once."""
        sequence = Sequence(request, arrival=self._num_arrivals, root_hash=self._prefixes.root(request.tenant))
        self._num_arrivals += 1
        self._by_id[sequence.id] = sequence
        self._prefixes.extend_hashes(sequence, len(sequence.ids) // self.block_size)
        self._enqueue(sequence)
        return sequence

    def abort(self, request_id: str) -> TokenEvent | None:
        """End a sequence now; its blocks follow when no launched step names it. None if it is unknown or has ended."""
        sequence = self._by_id.get(request_id)
        return self._finish(sequence, "abort") if sequence else None

    def release(self, sequence: Sequence, constraint: Constraint) -> None:
        """Let a sequence go whose grammar is compiled, with the ids that its output has to begin with."""
        begin = constraint.begin(sequence.max_num_tokens - sequence.num_prompt - 1)
        sequence.constraint, sequence.is_held = constraint, False
        sequence.stop_ids |= constraint.matcher.stop_ids
        sequence.ids += begin
        sequence.unsent = begin
        self.num_waiting_tokens += len(begin)

    def fail(self, request_id: str, error: ErrorInfo) -> TokenEvent | None:
        """End a sequence with an error; otherwise as `abort`."""
        sequence = self._by_id.get(request_id)
        return self._finish(sequence, "error", error=error) if sequence else None

    def fail_all(self, error: ErrorInfo) -> list[TokenEvent]:
        """End every sequence with the same error."""
        return [self._finish(sequence, "error", error=error) for sequence in list(self._by_id.values())]

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        error: ErrorInfo | None = None,
    ) -> TokenEvent:
        """Mark a sequence finished and make its terminal event."""
        del self._by_id[sequence.id]
        if sequence.status is Status.WAITING:
            self._dequeue(_index_of(sequence, self._waiting))
        sequence.finish_reason = reason
        self._leave(sequence, Status.FINISHED)
        return token_event(sequence, token_ids, logprobs, finish_reason=reason, error=error)

    def _leave(self, sequence: Sequence, status: Status) -> None:
        """Take a sequence out of the running ones; what it owns is released now, or after the last step naming it."""
        if sequence.status is Status.RUNNING:
            del self._running[_index_of(sequence, self._running)]
            self._num_changes += 1
            self._prefixes.stop_leading(sequence)
        sequence.status = status
        sequence.quiet_end = 0
        if sequence.num_in_flight:
            self._leaving[sequence.id] = sequence
        else:
            self._settle(sequence)

    def _settle(self, sequence: Sequence) -> None:
        """No launched step names this sequence: give back its blocks and row; a preempted one waits again."""
        self._leaving.pop(sequence.id, None)
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        if sequence.row >= 0:
            self._free_rows.append(sequence.row)
            sequence.row = -1
        if sequence.status is Status.PREEMPTED:
            sequence.status = Status.WAITING
            sequence.num_computed = sequence.num_indexed = 0
            sequence.leader_waits = 0
            sequence.awaited_hash = None
            self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_key)
        self.num_waiting_tokens += sequence.num_tokens

    def _dequeue(self, position: int) -> None:
        self.num_waiting_tokens -= self._waiting.pop(position).num_tokens

    # -- schedule ------------------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch | None:
        """Choose the next step, or None if nothing can be launched now (no work, or all of it waits for an answer)."""
        batch = ScheduledBatch(rows=[], started=[])
        tokens = self.step_tokens
        if any(sequence.is_decoding for sequence in self._running):
            tokens = min(tokens, max(self._step_tokens_decoding, self.num_waiting_tokens // BACKLOG_STEPS))
        budget = StepBudget(left=tokens, longest=tokens)
        self._schedule_single_tokens(batch, budget)
        self._schedule_chunks(batch, budget)
        self._admit(batch, budget)
        if budget.long is not None and budget.long.status is Status.RUNNING and budget.left + budget.reserve:
            size = self._grow(budget.long, min(budget.long.num_remaining, budget.left + budget.reserve), 0)
            if size:
                self._launch(batch, budget.long, size)
        if not batch.rows:
            return None
        are_single = batch.num_single == len(batch.rows) == len(self._running)
        batch.repeats = are_single and self._singles_since == self._num_changes
        self._singles_since = self._num_changes if are_single else -1
        return batch

    def _schedule_single_tokens(self, batch: ScheduledBatch, budget: StepBudget) -> None:
        """Running sequences that need one position, with a new block where the last is full. Each of them samples.

        This loop and that of `update` are what a step costs the host: some 0.3 us a sequence each.
        """
        rows, left, num_stalled = batch.rows, budget.left, 0
        for sequence in tuple(self._running):
            if not left:
                break
            start, num_pending = sequence.num_computed, sequence.num_pending
            end = len(sequence.ids) + num_pending
            if sequence.status is not Status.RUNNING:
                continue  # preempted for one before it
            if end - start != 1 or end >= sequence.max_num_tokens:
                if sequence.num_remaining > 1:
                    budget.with_chunks.append(sequence)
                continue
            if start == len(sequence.block_table) * self.block_size:
                if not self._make_room(sequence, num_stalled):
                    num_stalled += 1
                    continue
                sequence.block_table += self.pool.allocate(1)
            if not num_pending:
                batch.known_ids.append((len(rows), sequence.ids[start]))
            sequence.num_computed = end
            sequence.num_pending = num_pending + 1
            sequence.num_in_flight += 1
            rows.append(ScheduledRow(sequence, start, end, True))
            left -= 1
        batch.num_single, budget.left = len(rows), left

    def _make_room(self, sequence: Sequence, num_stalled: int) -> bool:
        """Whether a block is available for `sequence` now; preempts the last running ones, itself at worst."""
        while not self.pool.num_available:
            on_their_way = sum(len(leaving.block_table) for leaving in self._leaving.values())
            if on_their_way > num_stalled:
                return False  # a launched step's answer will free blocks: wait for it rather than preempt more
            victim = self._running[-1]
            self.counters.preemptions += 1
            self._leave(victim, Status.PREEMPTED)
            if victim is sequence:
                return False
        return True

    def _grow(self, sequence: Sequence, size: int, num_stalled: int) -> int:
        """How many of the next `size` positions have blocks, new ones included; preempts if there would be none."""
        room = len(sequence.block_table) * self.block_size - sequence.num_computed
        while room < size:
            if not self.pool.num_available and (room or not self._make_room(sequence, num_stalled)):
                break
            sequence.block_table += self.pool.allocate(1)
            room += self.block_size
        return min(room, size)

    def _schedule_chunks(self, batch: ScheduledBatch, budget: StepBudget) -> None:
        """Chunks of running prompts and of forced ids. The first one longer than a step is set aside, for the end."""
        running = (sequence for sequence in budget.with_chunks if sequence.status is Status.RUNNING)
        long = next((sequence for sequence in running if sequence.num_remaining > budget.longest), None)
        if long is not None:
            budget.reserve_for(long)
        num_stalled = 0
        for sequence in budget.with_chunks:
            if not budget.left:
                break
            if sequence.status is not Status.RUNNING or sequence.num_remaining > budget.longest:
                continue
            chunk = self._grow(sequence, min(sequence.num_remaining, budget.left), num_stalled)
            if not chunk:
                num_stalled += 1
                continue
            self._launch(batch, sequence, chunk)
            budget.left -= chunk

    def _admit(self, batch: ScheduledBatch, budget: StepBudget) -> None:
        """Waiting sequences, until rows, budget or blocks run out. Never preempts."""
        position = 0
        while position < len(self._waiting) and budget.left and self._free_rows:
            sequence = self._waiting[position]
            position += 1
            if sequence.is_held or self._prefixes.still_waits(sequence):
                continue
            hits = self._prefixes.find(sequence)
            if self._prefixes.begins_to_wait(sequence, len(hits)):
                continue
            num_new = sequence.num_tokens - len(hits) * self.block_size
            is_long = num_new > budget.longest
            if is_long and budget.long is not None:
                continue  # one long prompt at a time; shorter ones may pass it
            if not self._fits(sequence, hits):
                break
            position -= 1
            self._dequeue(position)
            self._start(batch, sequence, hits)
            if is_long:
                budget.reserve_for(sequence)
                continue
            if sequence is budget.long:
                budget.long = None  # preempted in this step, and short now with its blocks in the cache
            chunk = min(num_new, budget.left)
            self._launch(batch, sequence, chunk)
            budget.left -= chunk

    def _fits(self, sequence: Sequence, hits: list[int]) -> bool:
        """Whether all known tokens fit beside one block of growth for every running sequence."""
        num_needed = -(-sequence.num_tokens // self.block_size) - len(hits)
        num_available = self.pool.num_available - sum(self.pool.is_cached(block) for block in hits)
        return num_needed + len(self._running) <= num_available

    def _start(self, batch: ScheduledBatch, sequence: Sequence, hits: list[int]) -> None:
        """Give an admitted sequence its row and all blocks of its known tokens."""
        for block in hits:
            self.pool.share(block)
        num_blocks = -(-sequence.num_tokens // self.block_size)
        sequence.block_table = hits + self.pool.allocate(num_blocks - len(hits))
        sequence.num_computed = len(hits) * self.block_size
        sequence.num_indexed = len(hits)
        sequence.row = self._free_rows.pop()
        sequence.status = Status.RUNNING
        sequence.unmarked.clear()  # the device row begins with all ids
        if sequence.num_cached is None:
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
            self.counters.prompt_tokens += sequence.num_prompt
            self.counters.cached_prompt_tokens += sequence.num_cached
        self._prefixes.start_leading(sequence, len(hits))
        insort(self._running, sequence, key=_key)
        self._num_changes += 1
        batch.started.append(sequence)

    def _launch(self, batch: ScheduledBatch, sequence: Sequence, chunk: int) -> None:
        """Put a chunk into the step and count it as computed."""
        start = sequence.num_computed
        end = sequence.num_computed = start + chunk
        samples = end == sequence.num_tokens
        sequence.num_pending += samples
        sequence.num_in_flight += 1
        batch.rows.append(ScheduledRow(sequence, start, end, samples))

    # -- update --------------------------------------------------------------------------------------------------------

    def update(self, batch: ScheduledBatch, result: StepResult) -> list[TokenEvent]:
        """Settle a step that was read back, in launch order. Returns the events it caused."""
        events: list[TokenEvent] = []
        num_quiet, token_ids = 0, result.token_ids
        num_single = batch.num_single if result.is_plain else 0
        for index, row in enumerate(batch.rows):
            sequence, token_id = row.sequence, token_ids[index]
            if index < num_single and row.end < sequence.quiet_end and 0 <= token_id not in sequence.stop_ids:
                sequence.num_in_flight -= 1
                sequence.num_pending -= 1
                sequence.ids.append(token_id)
                events.append(TokenEvent(request_id=sequence.request.request_id, token_ids=[token_id]))
                num_quiet += 1
                continue
            sequence.num_in_flight -= 1
            is_dropped = row.samples and sequence.num_dropped > 0
            sequence.num_dropped -= is_dropped
            sequence.num_pending -= row.samples and not is_dropped
            if result.is_finite[index] and sequence.finish_reason != "error":
                self._prefixes.index_blocks(sequence, row.end)
            if sequence.status is not Status.FINISHED:
                event = self._read_row(sequence, row, result, index, is_dropped=is_dropped)
                if event is not None:
                    events.append(event)
            if not sequence.num_in_flight and sequence.id in self._leaving:
                self._settle(sequence)
        self.counters.generated_tokens += num_quiet
        return events

    def _read_row(
        self, sequence: Sequence, row: ScheduledRow, result: StepResult, index: int, *, is_dropped: bool
    ) -> TokenEvent | None:
        """One live sequence's answer: prompt log-probabilities, its new id and those forced after it, its end."""
        token_id = result.token_ids[index]
        if not result.is_finite[index] or (row.samples and token_id < 0):
            self.counters.corrupted_requests += 1
            return self._finish(sequence, "error", error=NOT_FINITE)
        if index in result.prompt_logprobs:
            known = len(sequence.prompt_logprobs)  # a preempted sequence computes some positions again
            sequence.prompt_logprobs += result.prompt_logprobs[index][max(0, known - row.start - 1) :]
        if not row.samples or is_dropped:
            return None
        new = (*sequence.unsent, *sequence.accept(token_id))
        sequence.unsent = []
        if sequence.constraint is not None and sequence.constraint.error is not None:
            return self._finish(sequence, "error", error=grammar_failed(sequence.constraint.error))
        self.counters.generated_tokens += len(new)
        logprob = result.logprobs[index] if result.logprobs else None
        logprobs = (logprob,) if logprob is not None else ()
        if new[-1] in sequence.stop_ids:
            return self._finish(sequence, "stop", token_ids=new, logprobs=logprobs)
        if len(sequence.ids) >= sequence.max_num_tokens:
            return self._finish(sequence, "length", token_ids=new, logprobs=logprobs)
        if sequence.constraint is None and sequence.status is Status.RUNNING:
            next_full = (row.end // self.block_size + 1) * self.block_size
            sequence.quiet_end = min(next_full, sequence.max_num_tokens - 1)
        return token_event(sequence, new, logprobs)

    # -- checks --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise InternalError if blocks or rows leak. Cheap when idle; tests call it after every step."""
        owners = [*self._running, *self._leaving.values()]
        self.pool.check_balance([sequence.block_table for sequence in owners])
        rows = [sequence.row for sequence in owners] + self._free_rows
        if len(set(rows)) != len(rows) or -1 in rows:
            raise InternalError(f"scheduler: rows are owned twice or lost: {sorted(rows)}")


def _key(sequence: Sequence) -> tuple[int, int]:
    return sequence.key


def _index_of(sequence: Sequence, ordered: list[Sequence]) -> int:
    """Where a sequence is in a list that is sorted by key; keys are unique."""
    return bisect_left(ordered, sequence.key, key=_key)
