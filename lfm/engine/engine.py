"""The engine: requests in, token events out, one step at a time. No I/O; one thread owns it.

    step():  scheduler.schedule()  ->  which sequence, how many tokens, which blocks     (plain Python)
             runner.forward()      ->  logits of the rows that need a token              (launched, not waited for)
             runner.sample()       ->  token ids on the device                           (launched, not waited for)
             runner.read()         ->  the answer of the step before this one
             scheduler.update()    ->  token events

With grammars in the step, the last two come before `runner.sample`, and the masks of `lfm.engine.grammars` after them.

Its only callers are the engine process and `lfm.LLM`. Features go beside this file, not into it.
"""

import random
import time
from collections import OrderedDict, deque

import msgspec

from lfm.engine.grammars import Failure, Grammars
from lfm.engine.runner import Launched, Runner
from lfm.engine.scheduler import Scheduler
from lfm.engine.stats import Rates
from lfm.engine.step import ScheduledBatch
from lfm.engine.validate import validate
from lfm.errors import OverloadedError, RequestError
from lfm.protocol import EngineInfo, EngineRequest, EngineStats, TokenEvent

MAX_EARLY_ABORTS = 4096  # aborts remembered that came before their add
MAX_HOST_TIMES = 65_536
COMPILE_WAIT_S = 0.001  # so long at a time an engine waits that has nothing but grammars to wait for


class Engine:
    """One model on one device. `num_ids`: ids that the tokenizer knows, out of the vocabulary.

    With `overlap`, the host schedules and launches a step before it reads the one before; without, it reads each step
    at once (the plain loop, which is the oracle).
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        grammars: Grammars,
        info: EngineInfo,
        *,
        num_ids: int,
        overlap: bool,
        seed: int = 0,
    ) -> None:
        self.info = info
        self.scheduler = scheduler
        self.runner = runner
        self.grammars = grammars
        self.host_ms: deque[float] = deque(maxlen=MAX_HOST_TIMES)  # schedule, build, launch and update of each step
        self._num_ids = num_ids
        self._num_in_flight_kept = 1 if overlap else 0
        self._in_flight: deque[Launched] = deque()
        self._pending_events: list[TokenEvent] = []
        self._early_aborts: OrderedDict[str, None] = OrderedDict()
        self._seeds = random.Random(seed)
        self._rates = Rates()
        self._num_steps = 0
        self._waited_s = 0.0  # for the device, in this step

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises RequestError if it is wrong and OverloadedError if the queue is full."""
        validate(
            request,
            vocab_size=self.info.vocab_size,
            num_ids=self._num_ids,
            max_model_len=self.info.max_model_len,
            num_cache_tokens=self.info.num_blocks * self.info.block_size,
        )
        if request.grammar is not None:
            self.grammars.check()
        if self.scheduler.knows(request.request_id):
            raise RequestError(f"request_id={request.request_id!r} is in use. Give every request its own.")
        if request.request_id in self._early_aborts:
            del self._early_aborts[request.request_id]
            self._pending_events.append(TokenEvent(request_id=request.request_id, finish_reason="abort"))
            return
        num_present = self.scheduler.num_running + self.scheduler.num_waiting
        if num_present >= self.info.max_running + self.info.max_queue:
            raise OverloadedError(
                f"The queue is full: {self.scheduler.num_waiting} requests wait and {self.scheduler.num_running} run "
                f"(--max-queue {self.info.max_queue}). Try again later.",
                retry_after_s=self._rates.wait_s(self.scheduler),
            )
        if request.sampling.seed is None:
            sampling = msgspec.structs.replace(request.sampling, seed=self._seeds.getrandbits(63))
            request = msgspec.structs.replace(request, sampling=sampling)
        sequence = self.scheduler.add(request)
        if request.grammar is not None:
            self.grammars.compile(sequence)

    def abort(self, request_id: str) -> None:
        """End a request early; its terminal event comes from the next step. Idempotent; may precede the add."""
        if not self.scheduler.knows(request_id):
            self._early_aborts[request_id] = None
            if len(self._early_aborts) > MAX_EARLY_ABORTS:
                self._early_aborts.popitem(last=False)
            return
        self.grammars.forget(request_id)
        event = self.scheduler.abort(request_id)
        if event is not None:
            self._pending_events.append(event)

    def has_work(self) -> bool:
        """Whether anything waits, runs or has not been read or returned yet."""
        return bool(self._pending_events or self._in_flight or self.scheduler.has_sequences)

    @property
    def would_start_full(self) -> bool:
        """Whether nothing runs, the next step would be full whatever is added, and launching it waits for nothing."""
        if not self._num_in_flight_kept or self._in_flight or self.scheduler.num_running:
            return False
        return self.scheduler.num_waiting_tokens >= self.scheduler.step_tokens

    def step(self) -> list[TokenEvent]:
        """One round: launch the next step, read what is due, return the events that it caused."""
        events, self._pending_events = self._pending_events, []
        started_s, self._waited_s = time.perf_counter(), 0.0
        if self.grammars.is_compiling:
            events += self._fail(self.grammars.take_compiled())
        batch = self.scheduler.schedule()
        if batch is not None:
            events += self._launch(batch)
            self._num_steps += 1
        elif self.grammars.is_compiling and not self._in_flight and not events:
            self.grammars.wait(COMPILE_WAIT_S)
            self._waited_s = time.perf_counter() - started_s
        events += self._read(keep=self._num_in_flight_kept if batch is not None else 0)
        self.host_ms.append((time.perf_counter() - started_s - self._waited_s) * 1e3)
        self.runner.between_steps()
        if not self.has_work():
            self.scheduler.check()
        return events

    def _launch(self, batch: ScheduledBatch) -> list[TokenEvent]:
        """Launch a step. What grammars allow depends on the ids before: they are read while the forward runs."""
        if not self.grammars.hold(batch):
            self._in_flight.append(self.runner.sample(self.runner.forward(batch)))
            return []
        is_known = not self._in_flight
        if is_known:
            self.grammars.start(batch)
        forwarded = self.runner.forward(batch)
        events = self._read(keep=0)
        if not is_known:
            self.grammars.start(batch)
        events += self._fail(self.grammars.finish())
        self._in_flight.append(self.runner.sample(forwarded))
        return events

    def _read(self, *, keep: int) -> list[TokenEvent]:
        """Read launched steps but for the last few, and settle them."""
        events: list[TokenEvent] = []
        while len(self._in_flight) > keep:
            launched = self._in_flight.popleft()
            started_s = time.perf_counter()
            result = self.runner.read(launched)
            self._waited_s += time.perf_counter() - started_s
            events += self.scheduler.update(launched.batch, result)
            self._rates.record(launched.batch)
        return events

    def _fail(self, failures: list[Failure]) -> list[TokenEvent]:
        ended = [self.scheduler.fail(sequence.id, error) for sequence, error in failures]
        return [event for event in ended if event is not None]

    def prepare(self) -> bool:
        """Use a moment without work for what later steps will need; False when there is nothing of that left."""
        return not self.has_work() and self.runner.prepare()

    def stats(self) -> EngineStats:
        """A snapshot of counters and sizes."""
        scheduler, counters = self.scheduler, self.scheduler.counters
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=scheduler.pool.num_blocks,
            num_blocks_used=scheduler.pool.num_used,
            num_blocks_cached=scheduler.pool.num_cached,
            block_size=scheduler.block_size,
            prompt_tokens=counters.prompt_tokens,
            cached_prompt_tokens=counters.cached_prompt_tokens,
            generated_tokens=counters.generated_tokens,
            preemptions=counters.preemptions,
            corrupted_requests=counters.corrupted_requests,
            steps=self._num_steps,
            step_tokens=self._rates.num_step_tokens,
            prefill_tokens_per_s=self._rates.prefill_tokens_per_s,
            decode_tokens_per_s=self._rates.decode_tokens_per_s,
            waiting_prompt_tokens=scheduler.num_waiting_tokens,
        )
