"""The events of one group of requests on their way from the engine connection to the HTTP handler that reads them.

What the reader has not taken yet is joined, one event per request: a slow reader costs no more memory than its tokens.
"""

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from lfm.protocol import EngineRequest, ErrorInfo, TokenEvent


class RequestStream:
    """Implements `lfm.engine.client.EventStream` for `EngineClient`, which feeds it.

    `send_aborts` is called with the ids of requests that have to be ended.
    """

    def __init__(self, requests: Sequence[EngineRequest], *, send_aborts: Callable[[list[str]], None]) -> None:
        self.running = {request.request_id: request for request in requests}
        self.touched: set[str] = set()  # requests with output: they cannot start again unnoticed
        self.num_submissions = 0  # engine processes that have got these requests
        self._unaccepted = set(self.running)
        self._refusal: ErrorInfo | None = None
        self._unread: dict[str, TokenEvent] = {}
        self._changed = asyncio.Event()
        self._send_aborts = send_aborts

    def feed(self, event: TokenEvent) -> None:
        """Take an event of the engine. Events of requests that have ended are dropped."""
        request_id = event.request_id
        if request_id not in self.running:
            return
        if event.is_accepted:
            self._unaccepted.discard(request_id)
        if event.token_ids or event.prompt_logprobs is not None:
            self.touched.add(request_id)
        if event.finish_reason is not None:
            del self.running[request_id]
            if request_id in self._unaccepted:
                self._refusal = (
                    self._refusal or event.error or ErrorInfo(message="The engine is shutting down.", status=503)
                )
        if event.finish_reason is not None or event.token_ids or event.prompt_logprobs is not None:
            earlier = self._unread.get(request_id)
            self._unread[request_id] = event if earlier is None else join_events(earlier, event)
        self._changed.set()

    def fail(self, error: ErrorInfo, *, request_ids: Sequence[str]) -> None:
        """End these requests with a terminal error event."""
        for request_id in request_ids:
            self.feed(TokenEvent(request_id=request_id, finish_reason="error", error=error))

    async def wait_accepted(self) -> ErrorInfo | None:
        """Wait until the engine has accepted every request (None) or has refused one (why)."""
        while self._unaccepted and self._refusal is None:
            await self._wait_for_change()
        return self._refusal

    async def next_events(self) -> list[TokenEvent]:
        """See EventStream."""
        while self.running and not self._unread:
            await self._wait_for_change()
        events = list(self._unread.values())
        self._unread.clear()
        return events

    async def abort(self, request_id: str) -> None:
        """See EventStream."""
        self._end([request_id])

    async def aclose(self) -> None:
        """See EventStream."""
        self.close()

    def close(self) -> None:
        """Abort whatever has not ended, and forget what has not been read."""
        self._end(list(self.running))
        self._unread.clear()

    def _end(self, request_ids: list[str]) -> None:
        running = [request_id for request_id in request_ids if self.running.pop(request_id, None) is not None]
        for request_id in request_ids:
            self._unread.pop(request_id, None)
        if running:
            self._send_aborts(running)
        self._changed.set()

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def join_events(first: TokenEvent, second: TokenEvent) -> TokenEvent:
    """One event that says what two successive ones of a request say. Takes over the lists of `first`."""
    first.token_ids.extend(second.token_ids)
    first.logprobs.extend(second.logprobs)
    return msgspec.structs.replace(
        first,
        prompt_logprobs=first.prompt_logprobs if second.prompt_logprobs is None else second.prompt_logprobs,
        num_cached_tokens=first.num_cached_tokens if second.num_cached_tokens is None else second.num_cached_tokens,
        finish_reason=second.finish_reason,
        error=second.error,
    )
