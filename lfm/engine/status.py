"""Publishes how the engine is to every API process; one that subscribes late gets the current state at once."""

import asyncio

import msgspec
import zmq
import zmq.asyncio

from lfm.engine.wire import EngineStatus

LINGER_MS = 200  # how long the last word may take to leave


class StatusBoard:
    """The supervisor's end of the status socket. Make it inside a running event loop; close it."""

    def __init__(self, address: str, *, status: EngineStatus) -> None:
        self.status = status
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # every subscription is reported, not only the first
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.bind(address)
        self._greeter = asyncio.create_task(self._greet_subscribers())

    async def publish(self, status: EngineStatus) -> None:
        """Make this the current state. Never waits for a subscriber."""
        self.status = status
        await self._socket.send(msgspec.msgpack.encode(status))

    async def close(self) -> None:
        self._greeter.cancel()
        await asyncio.gather(self._greeter, return_exceptions=True)
        self._socket.close()
        self._context.term()

    async def _greet_subscribers(self) -> None:
        while True:
            await self._socket.recv()
            await self._socket.send(msgspec.msgpack.encode(self.status))
