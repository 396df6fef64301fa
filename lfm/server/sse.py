"""Server-sent events: JSON data lines, keep-alive comments, `[DONE]`. One socket write per batch of events."""

from collections.abc import Sequence

import orjson
from starlette.types import Send

from lfm.server.state import RequestRecord

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would otherwise collect events
]
KEEP_ALIVE = b": keep-alive\n\n"  # a comment: every client skips it, proxies and idle timers see traffic
DONE = b"data: [DONE]\n\n"


def data_event(payload: object) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


class EventWriter:
    """Writes one event stream. `send` is the one of `RequestContext`, which gives up on a reader that takes nothing."""

    def __init__(self, send: Send, record: RequestRecord) -> None:
        self._send = send
        self._record = record

    async def start(self) -> None:
        """Send the headers at once: the client knows now that its request was accepted."""
        self._record.is_event_stream = True
        await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})

    async def send(self, payloads: Sequence[object]) -> None:
        await self._write(b"".join(map(data_event, payloads)))

    async def keep_alive(self) -> None:
        await self._write(KEEP_ALIVE)

    async def finish(self) -> None:
        await self._send({"type": "http.response.body", "body": DONE})

    async def _write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
