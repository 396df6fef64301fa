"""Reads the body of an HTTP response under a bound that holds after decompression, whatever the headers say."""

import zlib
from collections.abc import AsyncIterator

import httpx2

ACCEPT_ENCODING = "gzip, identity"
_GZIP_WBITS = 16 + zlib.MAX_WBITS


class BodyError(Exception):
    """The body is no use. The text ends the sentence "the answer ..."."""


class BodyTooLarge(BodyError):
    """The body is larger than it may be."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"is larger than {max_bytes:,} bytes")


async def read_body(response: httpx2.Response, *, max_bytes: int) -> bytes:
    """The decompressed body. Nothing beyond `max_bytes` is ever in memory, but for one chunk of the connection.

    Raises BodyTooLarge, and BodyError for a compression that was not asked for or is damaged.
    """
    announced = response.headers.get("content-length", "")
    if announced.isdecimal() and len(announced) < 20 and int(announced) > max_bytes:
        raise BodyTooLarge(max_bytes)
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("gzip", "x-gzip"):
        return await _read_gzip(response.aiter_raw(), max_bytes)
    if encoding not in ("", "identity"):
        raise BodyError(f"is compressed as {encoding[:20]!r}, which was not asked for")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise BodyTooLarge(max_bytes)
    return bytes(body)


async def _read_gzip(chunks: AsyncIterator[bytes], max_bytes: int) -> bytes:
    unpacker = zlib.decompressobj(_GZIP_WBITS)
    body = bytearray()
    num_packed = 0
    try:
        async for chunk in chunks:
            num_packed += len(chunk)
            body += unpacker.decompress(chunk, max_bytes + 1 - len(body))
            if len(body) > max_bytes or num_packed > max_bytes:
                raise BodyTooLarge(max_bytes)
    except zlib.error as error:
        raise BodyError("is damaged") from error
    if not unpacker.eof:
        raise BodyError("ends too early")
    return bytes(body)
