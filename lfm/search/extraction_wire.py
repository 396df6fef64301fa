"""The messages between this process and the one that parses documents, and how they are framed.

A message is its length in four bytes, then msgpack of the struct. The lengths that are believed are bounded.
"""

import struct
from typing import Literal

import msgspec

from lfm.search.extracted import Extracted

Kind = Literal["html", "pdf"]

MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
MAX_TEXT_CHARS = 32 * 1024 * 1024
MAX_MESSAGE_BYTES = MAX_DOCUMENT_BYTES + 4 * MAX_TEXT_CHARS
LENGTH = struct.Struct("!I")


class Job(msgspec.Struct, frozen=True):
    """Take the text from `data`, in at most `cpu_s` seconds of processor time."""

    kind: Kind
    data: bytes
    cpu_s: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    extracted: Extracted


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """`cause` continues the sentence "the document ..."."""

    cause: str


_encoder = msgspec.msgpack.Encoder()
decode_job = msgspec.msgpack.Decoder(Job).decode
decode_answer = msgspec.msgpack.Decoder(Done | Failed).decode


def frame(message: Job | Done | Failed) -> bytes:
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body
