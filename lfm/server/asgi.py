"""The few ASGI helpers that the routes share: JSON out, and a body with a limit in."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import orjson
from starlette.types import Receive, Scope, Send

from lfm.errors import RequestError
from lfm.protocol import MAX_BODY_BYTES
from lfm.server.errors import BodyTooLargeError, ClientLeft

# What orjson makes of 32 MiB of brackets takes seconds and a gigabyte; of this many, 0.3 s. Brackets inside of texts
# count as well, but no context holds a text with so many.
MAX_BRACKETS = 1_000_000


class JsonBody(NamedTuple):
    """A request body. `num_bytes` is its size on the wire."""

    value: dict[str, object]
    num_bytes: int


async def send_bytes(
    send: Send,
    body: bytes,
    *,
    status: int = 200,
    content_type: bytes = b"application/json",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    """Send one whole response."""
    start_headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": start_headers})
    await send({"type": "http.response.body", "body": body})


async def send_json(
    send: Send, payload: object, *, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    await send_bytes(send, orjson.dumps(payload), status=status, headers=headers)


async def read_json_object(scope: Scope, receive: Receive, *, stalled_s: float) -> JsonBody:
    """The request body as a JSON object, whatever the content type says.

    Raises BodyTooLargeError as soon as the limit is known to be passed, RequestError for anything but one JSON object,
    ClientLeft if the client goes away while sending, or sends nothing for `stalled_s` seconds.
    """
    body = await _read_body(scope, receive, stalled_s)
    num_brackets = body.count(b"[") + body.count(b"{")
    if num_brackets > MAX_BRACKETS:
        raise RequestError(
            f"The request body holds {num_brackets} brackets. Allowed: {MAX_BRACKETS}. Send less.", code="invalid_json"
        )
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(
            f"The request body is not valid JSON: {error}. Send one JSON object in UTF-8, without NaN or Infinity.",
            code="invalid_json",
        ) from None
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", type(None): "null"}.get(type(value), "a single value")
        raise RequestError(f"The request body is {kind}. Send one JSON object.", code="invalid_json")
    return JsonBody(value, len(body))


async def _read_body(scope: Scope, receive: Receive, stalled_s: float) -> bytes:
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")[:20]
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _body_too_large(int(declared))
    chunks: list[bytes] = []
    num_bytes = 0
    while True:
        try:
            async with asyncio.timeout(stalled_s):
                message = await receive()
        except TimeoutError:
            raise ClientLeft("stalled") from None
        if message["type"] == "http.disconnect":
            raise ClientLeft
        chunk = message.get("body", b"")
        num_bytes += len(chunk)
        if num_bytes > MAX_BODY_BYTES:  # a chunked body declares no length
            raise _body_too_large(num_bytes)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _body_too_large(num_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"The request body holds {num_bytes} bytes or more. Allowed: {MAX_BODY_BYTES}. Send a shorter prompt.",
        code="body_too_large",
    )
