"""The engine process as one API process sees it: `EngineBackend` over ZeroMQ.

It needs nothing but the directory of the sockets, so it lives in the supervisor's process or in any other of the same
user. The supervisor says which engine process serves; requests that had no output when theirs died go on to the next.
"""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import zmq
import zmq.asyncio

from lfm.engine.connection import LINGER_MS, EngineConnection
from lfm.engine.stream import RequestStream
from lfm.engine.wire import (
    Abort,
    EngineStatus,
    FromEngine,
    Lost,
    data_address,
    encode_adds,
    status_address,
    status_decoder,
    to_request_error,
)
from lfm.errors import OverloadedError
from lfm.protocol import EngineInfo, EngineRequest, EngineStats, ErrorInfo

logger = logging.getLogger(__name__)

MAX_SUBMISSIONS = 2  # a request that killed its engine may try once more; a second time it is taken for the cause
LAST_EVENTS_MS = 200  # the events of an engine that has drained may arrive so long after the news of its end

ENGINE_DIED = ErrorInfo(
    message="The engine failed while it worked on this request. Send the request again.", code="engine_died"
)
ENGINE_GONE = ErrorInfo(message="The engine is gone.", code="engine_died", status=503, retry_after_s=5.0)
EVENTS_LOST = ErrorInfo(
    message="The server fell behind and lost this request. Send the request again.", code="events_lost"
)


class EngineClient:
    """Implements `lfm.engine.client.EngineBackend`. Make it inside a running event loop; close it, or use `async with`.

    `directory` is `EngineSupervisor.directory`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._context = zmq.asyncio.Context()
        self._subscriber = self._context.socket(zmq.SUB)
        self._subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        self._subscriber.setsockopt(zmq.LINGER, 0)
        self._subscriber.connect(status_address(directory))
        self._status = EngineStatus(epoch=0, reason="waiting for the engine")
        self._connection: EngineConnection | None = None
        self._is_connected = asyncio.Event()
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._streams: dict[str, RequestStream] = {}
        self._follower = asyncio.create_task(self._follow_status())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def info(self) -> EngineInfo:
        """See EngineBackend. Stays what it was while an engine restarts."""
        if self._info is None:
            raise self._not_ready()
        return self._info

    @property
    def not_ready_reason(self) -> str | None:
        """See EngineBackend."""
        if self._status.reason is None and self._connection is None:
            return "connecting to the engine"
        return self._status.reason

    def stats(self) -> EngineStats:
        """See EngineBackend."""
        return self._stats

    async def wait_ready(self) -> None:
        """Wait until requests can be submitted."""
        await self._is_connected.wait()

    async def submit(self, requests: Sequence[EngineRequest]) -> RequestStream:
        """See EngineBackend. If this is cancelled, none of the requests runs."""
        if self._connection is None or not self._status.is_accepting:
            raise self._not_ready()
        stream = RequestStream(requests, send_aborts=self._send_aborts)
        if len(stream.running) != len(requests) or not self._streams.keys().isdisjoint(stream.running):
            raise ValueError("request ids are used twice; each needs its own")
        self._connection.send(encode_adds(requests))
        stream.num_submissions = 1
        self._streams |= dict.fromkeys(stream.running, stream)
        try:
            refusal = await stream.wait_accepted()
        except BaseException:
            stream.close()
            raise
        if refusal is not None:
            stream.close()
            raise to_request_error(refusal)
        return stream

    async def aclose(self) -> None:
        """End every request, say goodbye to the engine, close the sockets. Idempotent."""
        self._follower.cancel()
        await asyncio.gather(self._follower, return_exceptions=True)
        self._status = EngineStatus(epoch=self._status.epoch, reason="closed", is_final=True)
        await self._leave_engine(quiet_ms=0)
        self._fail_streams(is_final=True)
        self._context.destroy(linger=LINGER_MS)

    def _not_ready(self) -> OverloadedError:
        message = f"The engine is not ready: {self.not_ready_reason}. Send the request again later."
        return OverloadedError(message, retry_after_s=self._status.retry_after_s, code="engine_not_ready")

    def _send_aborts(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._streams.pop(request_id, None)
        if self._connection is not None:
            self._connection.send([msgspec.msgpack.encode(Abort(request_ids))])

    async def _follow_status(self) -> None:
        while True:
            await self._apply_status(status_decoder.decode(await self._subscriber.recv()))

    async def _apply_status(self, status: EngineStatus) -> None:
        is_same_engine = status.info is not None and status.epoch == self._status.epoch
        self._status = status
        if not is_same_engine:
            await self._leave_engine(quiet_ms=LAST_EVENTS_MS if status.is_final and self._streams else 0)
            self._fail_streams(is_final=status.is_final)
        if status.info is not None and self._connection is None:
            self._join_engine(status.info)

    def _join_engine(self, info: EngineInfo) -> None:
        self._info = info
        address = data_address(self._directory, epoch=self._status.epoch)
        self._connection = EngineConnection(self._context, address, on_message=self._on_message)
        for stream in dict.fromkeys(self._streams.values()):
            stream.num_submissions += 1
            self._connection.send(encode_adds(list(stream.running.values())))
        self._is_connected.set()

    async def _leave_engine(self, *, quiet_ms: int) -> None:
        self._is_connected.clear()
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close(quiet_ms=quiet_ms)
            self._stats = EngineStats()

    def _fail_streams(self, *, is_final: bool) -> None:
        """End what cannot go on with another engine: all, or requests with output and those at their last attempt."""
        for stream in dict.fromkeys(self._streams.values()):
            if is_final:
                self._end(stream, ENGINE_GONE, request_ids=list(stream.running))
            elif stream.num_submissions >= MAX_SUBMISSIONS:
                self._end(stream, ENGINE_DIED, request_ids=list(stream.running))
            else:
                self._end(stream, ENGINE_DIED, request_ids=[id_ for id_ in stream.running if id_ in stream.touched])

    def _end(self, stream: RequestStream, error: ErrorInfo, *, request_ids: list[str]) -> None:
        for request_id in request_ids:
            del self._streams[request_id]
        stream.fail(error, request_ids=request_ids)

    def _on_message(self, message: FromEngine) -> None:
        if isinstance(message, Lost):
            self._lose_streams()
            return
        self._stats = message.stats
        for event in message.events:
            stream = self._streams.get(event.request_id)
            if stream is not None:
                if event.finish_reason is not None:
                    del self._streams[event.request_id]
                stream.feed(event)

    def _lose_streams(self) -> None:
        request_ids = list(self._streams)
        logger.error("this process read too slowly: its %d requests are lost", len(request_ids))
        for stream in dict.fromkeys(self._streams.values()):
            self._end(stream, EVENTS_LOST, request_ids=list(stream.running))
        self._send_aborts(request_ids)
