"""The sequences of one HTTP request: from the engine's events to the deltas of its choices, with timing and counts.

Streamed and whole answers read the same deltas; this module knows neither of them, nor any text of JSON.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lfm.chat.call_parser import CallReader
from lfm.chat.output import Delta, OutputProcessor, join_deltas
from lfm.chat.stop import StopStrings
from lfm.engine.client import EventStream
from lfm.protocol import EngineRequest, ErrorInfo, TokenEvent
from lfm.server.errors import GenerationError
from lfm.server.metrics import Metrics
from lfm.server.patience import Patience
from lfm.server.state import AppState, RequestRecord

ABORTED = ErrorInfo(
    message="The server ended this request before it was complete. Send it again.",
    type="overloaded_error",
    code="aborted",
    status=503,
    retry_after_s=1.0,
)


@dataclass(slots=True, eq=False)
class Choice:
    """One sequence and what has become of it. `index` is its place in the response."""

    index: int
    request: EngineRequest
    processor: OutputProcessor
    deltas: list[Delta] = field(default_factory=list)  # of the newest events, not yet joined
    first_token_at: float | None = None
    last_token_at: float = 0.0


class DeltaSource(Protocol):
    """What an answer is made of: the deltas of its choices as they come, and what they cost.

    `Generation` is one turn of the model. What runs tools between several turns would be another one.
    """

    @property
    def choices(self) -> Sequence[Choice]: ...

    @property
    def is_finished(self) -> bool: ...

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_cached_tokens(self) -> int: ...

    @property
    def num_output_tokens(self) -> int: ...

    async def open(self) -> None: ...

    async def next_deltas(self, *, timeout_s: float | None = None) -> list[tuple[Choice, Delta]] | None: ...

    async def aclose(self) -> None: ...


class Generation:
    """One turn of the model. Use `open`, then `next_deltas` until it returns an empty list; `aclose` in a `finally`.

    `reads_calls`: a grammar holds the blocks of calls, which are tool calls and no text.
    """

    def __init__(
        self,
        requests: Sequence[EngineRequest],
        *,
        stop: StopStrings,
        n: int,
        state: AppState,
        record: RequestRecord,
        reads_calls: bool = False,
    ) -> None:
        self._n = n
        self._state = state
        self._record = record
        self._stream: EventStream | None = None
        self._patience: Patience | None = None
        self.choices = [
            Choice(
                index,
                request,
                OutputProcessor(
                    state.tokenizer,
                    prompt_ids=request.prompt_ids,
                    stop=stop,
                    num_logprobs=request.sampling.logprobs,
                    calls=CallReader(is_constrained=True) if reads_calls else None,
                ),
            )
            for index, request in enumerate(requests)
        ]
        self._choice_of = {choice.request.request_id: choice for choice in self.choices}

    @property
    def is_finished(self) -> bool:
        return all(choice.processor.is_finished for choice in self.choices)

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counts once, however many choices it has."""
        return sum(len(choice.request.prompt_ids) for choice in self.choices[:: self._n])

    @property
    def num_cached_tokens(self) -> int:
        return sum(choice.processor.num_cached_tokens for choice in self.choices[:: self._n])

    @property
    def num_output_tokens(self) -> int:
        return sum(choice.processor.num_output_tokens for choice in self.choices)

    async def open(self) -> None:
        """Hand the sequences to the engine. Raises RequestError or OverloadedError if it refuses them."""
        self._record.num_prompt_tokens = self.num_prompt_tokens
        self._stream = await self._state.backend.submit([choice.request for choice in self.choices])
        metrics = self._state.metrics
        metrics.prompt_tokens.observe(self.num_prompt_tokens)
        metrics.num_choices.observe(self._n)
        metrics.max_tokens.observe(self.choices[0].request.sampling.max_tokens)

    async def next_deltas(self, *, timeout_s: float | None = None) -> list[tuple[Choice, Delta]] | None:
        """One joined delta for each choice that has news, with everything that came since the last call.

        Empty: every choice has ended. None: nothing came for `timeout_s`. Raises GenerationError if a choice failed.
        """
        assert self._stream is not None, "open() comes first"
        while not self.is_finished:
            if self._patience is None:
                self._patience = Patience(timeout_s)  # the same for all deltas of an answer
            try:
                events = await self._patience.wait(self._stream.next_events())
            except TimeoutError:
                return None
            if not events:
                raise GenerationError(ABORTED)
            news = await self._read(events)
            if news:
                return news
        return []

    async def aclose(self) -> None:
        """Abort whatever has not ended, and note what was used."""
        record = self._record
        record.num_output_tokens = self.num_output_tokens
        record.num_cached_tokens = self.num_cached_tokens
        record.finish = ",".join(dict.fromkeys(choice.processor.finish_reason or "-" for choice in self.choices))
        if self._stream is not None:
            await self._stream.aclose()

    async def _read(self, events: Sequence[TokenEvent]) -> list[tuple[Choice, Delta]]:
        touched: dict[int, Choice] = {}
        for event in events:
            choice = self._choice_of[event.request_id]
            delta = choice.processor.feed(event)
            if delta:
                choice.deltas.append(delta)
                touched[choice.index] = choice
        now = time.monotonic()
        news = []
        for choice in touched.values():
            delta = choice.deltas[0] if len(choice.deltas) == 1 else join_deltas(choice.deltas)
            choice.deltas.clear()
            self._observe(choice, delta, now)
            if delta.stopped_by_string:
                await self._abort(choice)
            if delta.finish_reason in ("error", "abort"):
                raise GenerationError(delta.error or ABORTED)
            news.append((choice, delta))
        return news

    async def _abort(self, choice: Choice) -> None:
        assert self._stream is not None
        await self._stream.abort(choice.request.request_id)

    def _observe(self, choice: Choice, delta: Delta, now: float) -> None:
        metrics, num_tokens = self._state.metrics, len(delta.token_ids)
        if num_tokens and choice.first_token_at is None:
            choice.first_token_at = choice.last_token_at = now
            if self._record.first_token_s is None:
                self._record.first_token_s = now - self._record.started_s
                metrics.first_token_s.observe(self._record.first_token_s)
        elif num_tokens:
            gap_s = (now - choice.last_token_at) / num_tokens
            for _ in range(num_tokens):
                metrics.inter_token_s.observe(gap_s)
            choice.last_token_at = now
        if delta.finish_reason is not None:
            _observe_end(metrics, choice, delta.finish_reason)


def _observe_end(metrics: Metrics, choice: Choice, finish_reason: str) -> None:
    num_tokens = choice.processor.num_output_tokens
    metrics.output_tokens.observe(num_tokens)
    if finish_reason in ("stop", "length", "tool_calls"):
        metrics.count_success(finish_reason)
    if choice.first_token_at is not None and num_tokens > 1:
        metrics.per_token_s.observe((choice.last_token_at - choice.first_token_at) / (num_tokens - 1))
