"""Scheduler and block pool under random traffic, against a fake device that answers one step late.

The fake device is a function of the known ids: the next id is a hash of the whole sequence, so a wrong resume, a wrong
hit or a lost id changes the output. It also keeps its own model of what every block holds, and refuses reads of
anything that was not written: garbage is visible without any tensor.
"""

import zlib
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lfm.engine.cache import BlockHasher, BlockPool
from lfm.engine.scheduler import Scheduler
from lfm.engine.sequence import Sequence
from lfm.engine.step import ScheduledBatch, StepResult
from lfm.protocol import EngineRequest, SamplingParams, TokenEvent

EOS = 3
VOCAB = 16


def next_id(ids: list[int]) -> int:
    """The fake model: a pure function of every id so far."""
    return (zlib.crc32(bytes(ids)) * 2654435761 >> 20) % VOCAB


def expected_outputs(prompt: list[int], max_tokens: int) -> list[int]:
    """The naive loop."""
    ids: list[int] = list(prompt)
    while len(ids) - len(prompt) < max_tokens:
        ids.append(next_id(ids))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


def long_prompts() -> list[list[int]]:
    """Prompts of three ids whose outputs run to 16 tokens without the end token."""
    prompts = ([a, b, 7] for a in range(4, 16) for b in range(4, 16))
    return [prompt for prompt in prompts if len(expected_outputs(prompt, 16)) == 16]


@dataclass
class FakeDevice:
    """Executes launched steps in order on its own picture of the pool: block -> ids of the prefix that ends in it."""

    block_size: int
    contents: dict[int, list[int]] = field(default_factory=dict)
    last_ids: dict[int, int] = field(default_factory=dict)
    rows: dict[int, str] = field(default_factory=dict)

    def run(self, batch: ScheduledBatch) -> StepResult:
        for sequence in batch.started:
            self.rows[sequence.row] = sequence.id
        return StepResult(
            token_ids=[self._run_row(row.sequence, row.start, row.end, row.samples) for row in batch.rows],
            is_finite=[True] * len(batch.rows),
        )

    def _run_row(self, sequence: Sequence, start: int, end: int, samples: bool) -> int:
        assert self.rows[sequence.row] == sequence.id, "the device row belongs to somebody else"
        known = sequence.ids[:end]
        if len(known) < end:  # the id of the last position is on the device only
            assert len(known) == end - 1
            known = [*known, self.last_ids[sequence.row]]
        if start:
            tail = self.contents[sequence.block_table[(start - 1) // self.block_size]]
            assert tail == known[:start], "the tail read is not the state after position start - 1"
        for position in range(start // self.block_size):
            assert self.contents[sequence.block_table[position]] == known[: (position + 1) * self.block_size]
        for position in range(start // self.block_size, (end - 1) // self.block_size + 1):
            block = sequence.block_table[position]
            self.contents[block] = known[: min(end, (position + 1) * self.block_size)]
        if not samples:
            return -1
        self.last_ids[sequence.row] = next_id(known)
        return self.last_ids[sequence.row]


@dataclass
class Expected:
    prompt: list[int]
    outputs: list[int]
    received: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    was_aborted: bool = False


class Harness:
    """The engine's loop over a scheduler and a fake device; `overlap` reads a step after launching the next."""

    def __init__(self, *, num_blocks: int, block_size: int, max_running: int, step_tokens: int, overlap: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(
            self.pool,
            BlockHasher(b"key", model="fake", kv_dtype="none"),
            block_size=block_size,
            max_running=max_running,
            step_tokens=step_tokens,
            step_tokens_decoding=max(1, step_tokens // 2),
        )
        self.device = FakeDevice(block_size)
        self.capacity = num_blocks * block_size
        self.overlap = overlap
        self.in_flight: list[ScheduledBatch] = []
        self.answers: list[StepResult] = []
        self.requests: dict[str, Expected] = {}
        self.last_ends: list[tuple[str, int, int]] = []
        self.num_repeats = 0

    def add(self, prompt: list[int], max_tokens: int, *, tenant: str = "", priority: int = 0) -> str:
        request_id = f"r{len(self.requests)}"
        sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=(EOS,))
        self.scheduler.add(
            EngineRequest(request_id=request_id, prompt_ids=prompt, sampling=sampling, tenant=tenant, priority=priority)
        )
        self.requests[request_id] = Expected(prompt, expected_outputs(prompt, max_tokens))
        return request_id

    def abort(self, request_id: str) -> None:
        event = self.scheduler.abort(request_id)
        if event is not None:
            self.requests[request_id].was_aborted = True
            self.receive(event)

    def step(self) -> None:
        batch = self.scheduler.schedule()
        if batch is not None:
            self.check_shape(batch)
            self.in_flight.append(batch)
            self.answers.append(self.device.run(batch))
        keep = 1 if self.overlap and batch is not None else 0
        while len(self.in_flight) > keep:
            for event in self.scheduler.update(self.in_flight.pop(0), self.answers.pop(0)):
                self.receive(event)
        self.scheduler.check()

    def check_shape(self, batch: ScheduledBatch) -> None:
        sizes = [row.end - row.start for row in batch.rows]
        assert all(size > 0 for size in sizes)
        assert sum(sizes) <= self.scheduler.step_tokens
        assert len({row.sequence.row for row in batch.rows}) == len(batch.rows)
        ends = [(row.sequence.id, row.sequence.row, row.end) for row in batch.rows]
        if batch.repeats:
            assert ends == [(request_id, row, end + 1) for request_id, row, end in self.last_ends]
            self.num_repeats += 1
        self.last_ends = ends

    def receive(self, event: TokenEvent) -> None:
        expected = self.requests[event.request_id]
        assert expected.finish_reason is None, "an event after the terminal one"
        expected.received += event.token_ids
        expected.finish_reason = event.finish_reason

    def finish(self) -> None:
        for _ in range(100_000):
            if not self.scheduler.has_sequences:
                break
            self.step()
        assert not self.scheduler.has_sequences, "the scheduler does not come to an end"
        self.check_outputs()
        assert self.pool.num_used == 0

    def check_outputs(self) -> None:
        for expected in self.requests.values():
            assert expected.finish_reason is not None
            if expected.was_aborted:
                assert expected.finish_reason == "abort"
                assert expected.received == expected.outputs[: len(expected.received)]
            else:
                assert expected.received == expected.outputs
                assert expected.finish_reason == ("stop" if expected.outputs[-1] == EOS else "length")


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(4, 14),
        block_size=st.integers(1, 5),
        max_running=st.integers(1, 6),
        step_tokens=st.integers(1, 12),
        overlap=st.booleans(),
    )
    def start(self, num_blocks: int, block_size: int, max_running: int, step_tokens: int, overlap: bool) -> None:
        self.harness = Harness(
            num_blocks=num_blocks,
            block_size=block_size,
            max_running=max_running,
            step_tokens=step_tokens,
            overlap=overlap,
        )

    @rule(
        stem=st.sampled_from([0, 3, 8]),
        rest=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
        max_tokens=st.integers(1, 14),
        tenant=st.sampled_from(["", "b"]),
        priority=st.integers(0, 1),
        copies=st.integers(1, 3),
    )
    def add(self, stem: int, rest: list[int], max_tokens: int, tenant: str, priority: int, copies: int) -> None:
        prompt = [5, 6, 7, 8, 9, 10, 11, 12][:stem] + rest
        room = self.harness.capacity - len(prompt) + 1
        if room < 1:
            return
        for _ in range(copies):
            self.harness.add(prompt, min(max_tokens, room), tenant=tenant, priority=priority)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.harness.step()

    @precondition(lambda self: self.harness.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.harness.abort(data.draw(st.sampled_from(sorted(self.harness.requests))))

    @invariant()
    def balanced(self) -> None:
        if hasattr(self, "harness"):
            self.harness.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.finish()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("overlap", [False, True])
class TestNamedCases:
    """Each case once by name, so that a failure says what broke."""

    def make(self, overlap: bool, **changes: int) -> Harness:
        sizes = {"num_blocks": 12, "block_size": 4, "max_running": 4, "step_tokens": 8} | changes
        return Harness(overlap=overlap, **sizes)

    @pytest.mark.parametrize("length", [1, 4, 5, 8, 9])
    def test_prompt_lengths_around_the_block_size(self, overlap: bool, length: int) -> None:
        harness = self.make(overlap)
        harness.add(list(range(4, 4 + length)), 9)
        harness.finish()

    def test_a_hit_of_exactly_k_blocks_leaves_the_last_token_to_compute(self, overlap: bool) -> None:
        harness = self.make(overlap)
        prompt = [5, 6, 7, 8, 9, 10, 11, 12]
        harness.add(prompt, 1)
        harness.finish()
        harness.add(prompt, 1)  # 8 tokens are 2 full blocks, but only 7 tokens may be hit: 1 block
        harness.add([*prompt, 4], 1)  # 9 tokens: 2 blocks
        harness.step()
        cached = [row.sequence.num_cached for row in harness.in_flight[-1].rows] if overlap else None
        if cached is not None:
            assert cached == [4, 8]
        harness.finish()
        assert harness.scheduler.counters.cached_prompt_tokens == 12

    def test_another_tenant_never_hits(self, overlap: bool) -> None:
        harness = self.make(overlap)
        harness.add([5, 6, 7, 8, 9], 1, tenant="a")
        harness.finish()
        harness.add([5, 6, 7, 8, 9], 1, tenant="b")
        harness.finish()
        assert harness.scheduler.counters.cached_prompt_tokens == 0

    def test_followers_wait_for_the_leader_of_their_prefix(self, overlap: bool) -> None:
        harness = self.make(overlap, num_blocks=60, step_tokens=16, max_running=8)
        for tail in range(6):
            harness.add([5, 6, 7, 8] * 6 + [4, tail], 2)
        harness.finish()
        assert harness.scheduler.counters.cached_prompt_tokens == 5 * 24

    def test_n_choices_share_the_prompt(self, overlap: bool) -> None:
        harness = self.make(overlap, num_blocks=40, max_running=8)
        for _ in range(5):
            harness.add([5, 6, 7, 8, 9, 10], 3)
        harness.finish()
        assert harness.scheduler.counters.cached_prompt_tokens == 4 * 4

    def test_preempted_sequences_resume_with_the_same_tokens(self, overlap: bool) -> None:
        harness = self.make(overlap, num_blocks=6)
        for prompt in long_prompts()[:4]:
            harness.add(prompt, 16)
        harness.finish()
        assert harness.scheduler.counters.preemptions > 0

    def test_the_most_urgent_sequence_is_never_preempted(self, overlap: bool) -> None:
        harness = self.make(overlap, num_blocks=6)
        *others, last = long_prompts()[:4]
        for prompt in others:
            harness.add(prompt, 16, priority=1)
        urgent = harness.add(last, 16, priority=0)
        seen = []
        while harness.requests[urgent].finish_reason is None:
            harness.step()
            waiting = [sequence.id for sequence in harness.scheduler._waiting]
            seen.append(urgent in waiting)
        assert not any(seen[1:])
        harness.finish()

    def test_abort_with_a_step_in_flight_defers_the_release(self, overlap: bool) -> None:
        harness = self.make(overlap)
        request = harness.add([5, 6, 7, 8, 9], 16)
        for _ in range(3):
            harness.step()
        used = harness.pool.num_used
        harness.abort(request)
        assert harness.requests[request].finish_reason == "abort"
        assert harness.pool.num_used == (used if overlap else 0)
        harness.step()
        assert harness.pool.num_used == 0
        harness.finish()

    def test_an_aborted_prompt_stays_cached(self, overlap: bool) -> None:
        harness = self.make(overlap)
        request = harness.add([5, 6, 7, 8, 9], 16)
        for _ in range(2):
            harness.step()
        harness.abort(request)
        harness.add([5, 6, 7, 8, 9], 1)
        harness.finish()
        assert harness.scheduler.counters.cached_prompt_tokens == 4

    def test_eos_as_the_token_that_fills_a_block_is_shared_with_the_next_turn(self, overlap: bool) -> None:
        """The prompt is chosen so that the output ends with EOS at the end of a block."""
        prompt = next(
            ids
            for seed in range(10_000)
            if (ids := [4 + seed % 12, 4 + seed // 12 % 12, 4 + seed // 144 % 12])
            and (outputs := expected_outputs(ids, 16))[-1] == EOS
            and (len(ids) + len(outputs)) % 4 == 0
        )
        harness = self.make(overlap)
        harness.add(prompt, 16)
        harness.finish()
        conversation = prompt + expected_outputs(prompt, 16)
        harness.add([*conversation, 7], 1)
        harness.finish()
        # With a step in flight the block of the EOS itself is computed too; without, all blocks but that one.
        assert harness.scheduler.counters.cached_prompt_tokens == len(conversation) - (0 if overlap else 4)

    def test_a_long_prompt_lets_short_ones_pass_beside_it(self, overlap: bool) -> None:
        harness = self.make(overlap, num_blocks=80, step_tokens=8)
        long = harness.add([5] * 200, 1)
        other_long = harness.add([6] * 60, 1)
        short = harness.add([7, 8, 9], 1)
        for _ in range(4):
            harness.step()
        assert harness.requests[short].finish_reason is not None
        assert harness.requests[long].finish_reason is None
        assert harness.requests[other_long].finish_reason is None
        harness.finish()

    def test_a_row_that_is_not_finite_ends_in_error_and_is_not_cached(self, overlap: bool) -> None:
        harness = self.make(overlap)
        request = harness.add([5, 6, 7, 8, 9], 16)
        run = harness.device.run

        def broken(batch: ScheduledBatch) -> StepResult:
            result = run(batch)
            return (
                StepResult(token_ids=[-1] * len(batch.rows), is_finite=[False] * len(batch.rows)) if first else result
            )

        first = True
        harness.device.run = broken  # type: ignore[method-assign]
        harness.step()
        first = False
        harness.step()
        harness.step()
        assert harness.requests[request].finish_reason == "error"
        del harness.requests[request]
        harness.requests["gone"] = Expected([1], [EOS], [EOS], "stop")
        harness.device.contents.clear()
        harness.add([5, 6, 7, 8, 9], 1)
        harness.finish()
        assert harness.scheduler.counters.cached_prompt_tokens == 0
        assert harness.scheduler.counters.corrupted_requests == 1

    def test_a_sample_that_failed_in_the_middle_of_decoding_ends_its_sequence_alone(self, overlap: bool) -> None:
        """Hidden states may be finite where logits are not."""
        harness = self.make(overlap)
        broken_id, whole_id = (harness.add(prompt, 16) for prompt in long_prompts()[:2])
        for _ in range(6):
            harness.step()
        run = harness.device.run

        def broken(batch: ScheduledBatch) -> StepResult:
            result = run(batch)
            for index, row in enumerate(batch.rows):
                if row.sequence.id == broken_id:
                    result.token_ids[index] = -1
            return result

        harness.device.run = broken  # type: ignore[method-assign]
        for _ in range(3):
            harness.step()
        assert harness.requests[broken_id].finish_reason == "error"
        assert harness.requests[whole_id].finish_reason is None
        assert harness.scheduler.counters.corrupted_requests == 1
        del harness.requests[broken_id]
        harness.finish()

    def test_steps_of_the_same_sequences_are_told_to_repeat(self, overlap: bool) -> None:
        harness = self.make(overlap, num_blocks=40, max_running=8, step_tokens=16)
        for prompt in long_prompts()[:3]:
            harness.add(prompt, 16)
        harness.finish()
        assert harness.num_repeats >= 10

    def test_a_long_queue_gets_long_steps_and_a_short_one_leaves_those_who_decode_alone(self, overlap: bool) -> None:
        harness = self.make(overlap, num_blocks=200, block_size=4, step_tokens=64, max_running=32)
        run, sizes = harness.device.run, list[list[int]]()

        def recorded(batch: ScheduledBatch) -> StepResult:
            sizes.append([row.end - row.start for row in batch.rows])
            return run(batch)

        harness.device.run = recorded  # type: ignore[method-assign]
        harness.add(long_prompts()[0], 16)
        harness.step()
        harness.step()
        harness.add([7] * 40, 1)  # 40 tokens: a step takes 32, which is the budget while something decodes
        harness.step()
        assert sizes[-1] == [1, 31]
        assert harness.scheduler.num_waiting_tokens == 0
        for index in range(20):
            harness.add([8 + index % 4] * (40 + index), 1)
        assert harness.scheduler.num_waiting_tokens == sum(40 + index for index in range(20)) == 990
        harness.step()
        assert sum(sizes[-1]) == 990 // 16
        harness.finish()
        assert harness.scheduler.num_waiting_tokens == 0
