"""What the server needs of an engine, wherever that engine lives: the seam between HTTP and generation.

`lfm.engine.process` implements it over ZeroMQ; tests implement it in a few lines.
"""

from collections.abc import Sequence
from typing import Protocol

from lfm.protocol import EngineInfo, EngineRequest, EngineStats, TokenEvent


class EventStream(Protocol):
    """The events of a group of sequences that were submitted together (the n choices of one request)."""

    async def next_events(self) -> list[TokenEvent]:
        """Wait for at least one event and return all that have arrived since the last call, in order.

        An engine failure arrives as terminal events with finish_reason "error". Empty list: every sequence has ended.
        """

    async def abort(self, request_id: str) -> None:
        """End one sequence early (a stop string was found). Its later events are dropped. Idempotent."""

    async def aclose(self) -> None:
        """Abort whatever has not ended. Idempotent; called when the client disconnects and in every `finally`."""


class EngineBackend(Protocol):
    """A running engine as seen by one API process."""

    @property
    def info(self) -> EngineInfo:
        """Facts about the loaded model. Raises OverloadedError while nothing is loaded yet."""

    @property
    def not_ready_reason(self) -> str | None:
        """None while the model is loaded and steps make progress; else one line for /readyz."""

    def stats(self) -> EngineStats:
        """The newest snapshot of the engine's counters."""

    async def submit(self, requests: Sequence[EngineRequest]) -> EventStream:
        """Hand over the sequences of one request and wait until the engine has accepted all of them.

        Raises RequestError (400) or OverloadedError (503) if the engine refuses any; then none of them runs.
        """
