"""A stand-in for the engine: no model, no device, and trouble on demand.

What a request wants is written in the first id of its prompt. Its tokens count up from 0, one per step, `max_tokens` of
them, unless the prompt says otherwise. The engine as a whole is told what to do by the words of `EngineConfig.model`.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lfm.config import EngineConfig
from lfm.errors import MachineError, ModelError, OverloadedError, RequestError
from lfm.protocol import EngineInfo, EngineRequest, EngineStats, TokenEvent

COUNT = 1  # an ordinary request
RAISE = 2  # the step that takes it up raises
DIE = 3  # the step that takes it up kills the process
HANG = 4  # the step that takes it up never ends
LIVELOCK = 5  # never gets a token although the engine is stepped
CRASH_ADD = 6  # add raises what it must not
WAIT = 7  # stays in the queue until it is aborted
DIE_ONCE = 8  # kills the process, unless the file named in the model has been made by an earlier life
MAX_MODEL_LEN = 100_000


class FakeEngine:
    """Implements `lfm.engine.loop.SteppedEngine`; `step_s` stands for the time that the device takes."""

    def __init__(self, *, step_s: float = 0.0, max_queue: int = 10_000, marker: Path | None = None) -> None:
        self.info = EngineInfo(
            model_type="fake",
            vocab_size=65_536,
            max_model_len=MAX_MODEL_LEN,
            num_blocks=1,
            block_size=16,
            max_running=1024,
            max_queue=max_queue,
            device="none",
            dtype="none",
            load_s=0.0,
        )
        self.running: dict[str, tuple[EngineRequest, int]] = {}
        self.aborted: list[str] = []
        self.num_steps = 0
        self._early_aborts: set[str] = set()
        self._abort_events: list[TokenEvent] = []
        self._step_s = step_s
        self._max_queue = max_queue
        self._marker = marker

    def add(self, request: EngineRequest) -> None:
        if request.prompt_ids[0] == CRASH_ADD:
            raise ZeroDivisionError("a bug in add")
        if len(request.prompt_ids) + request.sampling.max_tokens > MAX_MODEL_LEN:
            raise RequestError("too long", param="max_tokens", code="context_length_exceeded")
        if len(self.running) >= self._max_queue:
            raise OverloadedError("the queue is full", retry_after_s=7.0)
        if request.request_id in self._early_aborts:
            self._early_aborts.discard(request.request_id)
            self._end(request.request_id)
        else:
            self.running[request.request_id] = (request, 0)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        if self.running.pop(request_id, None):
            self._end(request_id)
        else:
            self._early_aborts.add(request_id)

    def _end(self, request_id: str) -> None:
        self._abort_events.append(TokenEvent(request_id=request_id, finish_reason="abort"))

    def step(self) -> list[TokenEvent]:
        time.sleep(self._step_s)
        events, self._abort_events = self._abort_events, []
        kinds = {request.prompt_ids[0] for request, _ in self.running.values()}
        self._make_trouble(kinds)
        if kinds != {LIVELOCK}:
            self.num_steps += 1
        for request, num_tokens in list(self.running.values()):
            if request.prompt_ids[0] not in (WAIT, LIVELOCK):
                events.append(self._next_token(request, num_tokens))
        return events

    def _next_token(self, request: EngineRequest, num_tokens: int) -> TokenEvent:
        self.running[request.request_id] = (request, num_tokens + 1)
        is_last = num_tokens + 1 == request.sampling.max_tokens
        if is_last:
            del self.running[request.request_id]
        return TokenEvent(
            request_id=request.request_id,
            token_ids=[num_tokens],
            num_cached_tokens=len(request.prompt_ids) if num_tokens == 0 else None,
            finish_reason="length" if is_last else None,
        )

    def _make_trouble(self, kinds: set[int]) -> None:
        if RAISE in kinds:
            raise ZeroDivisionError("a bug in step")
        if DIE in kinds:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANG in kinds:
            threading.Event().wait()
        if DIE_ONCE in kinds and self._marker is not None and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def has_work(self) -> bool:
        return bool(self.running or self._abort_events)

    def prepare(self) -> bool:
        return False

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.running), steps=self.num_steps)


def build_fake(config: EngineConfig, *, on_phase: Callable[[str], None]) -> FakeEngine:
    """The engine factory of the tests. Words: refuse, machine, crash, die, slow, load=SECONDS, marker=PATH."""
    words = config.model.removeprefix("fake:").split(",")
    options = dict(word.split("=") for word in words if "=" in word)
    on_phase("reading fake weights")
    print("a library that prints must not disturb the reports")
    if "refuse" in words:
        raise ModelError("fake shard 2 of 3 is missing. Download it again.")
    if "machine" in words:
        raise MachineError("needed 48 GB, had 24 GB. Use a smaller model.")
    if "crash" in words:
        raise ZeroDivisionError("a bug in build\nwith a second line")
    if "die" in words:
        os.kill(os.getpid(), signal.SIGKILL)
    if "load" in options:
        threading.Event().wait(float(options["load"]))
    marker = Path(options["marker"]) if "marker" in options else None
    return FakeEngine(step_s=0.005 if "slow" in words else 0.0, max_queue=config.max_queue, marker=marker)
