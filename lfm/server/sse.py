"""Server-sent events: JSON data lines, keep-alive comments, `[DONE]`. One socket write per batch of events."""

import orjson
from starlette.types import Send

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would otherwise collect events
]
KEEP_ALIVE = b": keep-alive\n\n"  # a comment: every client skips it, proxies and idle timers see traffic
DONE = b"data: [DONE]\n\n"


def data_event(payload: object) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def named_event(payload: dict[str, object]) -> bytes:
    """An event that also has its payload's `type` as its name: some clients read one, some the other."""
    return b"event: %b\n" % str(payload["type"]).encode() + data_event(payload)


class EventWriter:
    """Writes one event stream. `send` is the one of `RequestContext`, which gives up on a reader that takes nothing."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def start(self) -> None:
        """Send the headers at once: the client knows now that its request was accepted."""
        await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes) -> None:
        """Write the last bytes of the stream."""
        await self._send({"type": "http.response.body", "body": data})
