"""An API process's socket to one engine process. What waits to be sent leaves as one message."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio

from lfm.engine.wire import (
    MAX_EVENT_FRAME_BYTES,
    MAX_UNREAD_MESSAGES,
    FromEngine,
    Goodbye,
    Hello,
    Lost,
    engine_frame_decoder,
)

logger = logging.getLogger(__name__)

LINGER_MS = 200  # how long a goodbye may take to leave


class EngineConnection:
    """A DEALER socket that says hello. `on_message` is called in the event loop with each message of the engine."""

    def __init__(self, context: zmq.asyncio.Context, address: str, *, on_message: Callable[[FromEngine], None]) -> None:
        self._on_message = on_message
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_EVENT_FRAME_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, MAX_UNREAD_MESSAGES)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.connect(address)
        self._unsent = [msgspec.msgpack.encode(Hello())]
        self._has_unsent = asyncio.Event()
        self._has_unsent.set()
        self._tasks = [asyncio.create_task(self._send_unsent()), asyncio.create_task(self._receive())]

    def send(self, frames: list[bytes]) -> None:
        """Queue frames; they leave in order, in one message with whatever else is queued by then."""
        if frames:
            self._unsent += frames
            self._has_unsent.set()

    async def close(self, *, quiet_ms: int = 0) -> None:
        """Hand on what has arrived, until nothing has for `quiet_ms`; then say goodbye and leave."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while await self._socket.poll(quiet_ms):
            self._hand_on(await self._socket.recv())
        with contextlib.suppress(zmq.Again):
            await self._socket.send(msgspec.msgpack.encode(Goodbye()), zmq.NOBLOCK)
        self._socket.close()

    async def _send_unsent(self) -> None:
        while True:
            await self._has_unsent.wait()
            self._has_unsent.clear()
            frames, self._unsent = self._unsent, []
            await self._socket.send_multipart(frames)

    async def _receive(self) -> None:
        while True:
            self._hand_on(await self._socket.recv())

    def _hand_on(self, frame: bytes) -> None:
        try:
            message = engine_frame_decoder.decode(frame)
        except msgspec.MsgspecError:
            logger.exception("the engine sent %d unreadable bytes", len(frame))
            message = Lost()  # whatever it said, it is lost
        self._on_message(message)
