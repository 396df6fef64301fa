"""The engine process's only loop: read what clients sent, step the engine, hand each client what its requests did.

It never waits for a client. Sends do not block; a client that reads nothing fills its bounded queue, is dropped, and
finds that out (Lost) once it reads again. A client whose process ended is noticed by the next send to it.
Knows nothing of models, devices or how the process was started.
"""

import errno
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import zmq

from lfm.engine.wire import (
    MAX_UNREAD_MESSAGES,
    Abort,
    Add,
    Events,
    Goodbye,
    Hello,
    Lost,
    client_frame_decoder,
    command_decoder,
    requests_of,
    to_error_info,
)
from lfm.errors import OverloadedError, RequestError
from lfm.protocol import EngineInfo, EngineRequest, EngineStats, ErrorInfo, TokenEvent

logger = logging.getLogger(__name__)

MAX_MESSAGES_PER_STEP = 256  # a flood of messages delays a step by a few ms at most
STATS_INTERVAL_S = 0.25  # for clients that none of the step's events concern
BARREN_STEPS = 2  # so many steps in a row without progress, and the loop waits a moment for messages
CLOSE_LINGER_MS = 2000  # the last events may take that long to leave

encoder = msgspec.msgpack.Encoder()
LOST_FRAME = encoder.encode(Lost())


class SteppedEngine(Protocol):
    """What the loop needs of `lfm.engine.engine.Engine`."""

    @property
    def info(self) -> EngineInfo: ...
    def add(self, request: EngineRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[TokenEvent]: ...
    def has_work(self) -> bool: ...
    def prepare(self) -> bool: ...
    def stats(self) -> EngineStats: ...


@dataclass(slots=True)
class ClientState:
    """One API process: the requests it has running and the events it has not been sent yet."""

    running: set[str] = field(default_factory=set)
    unsent: list[TokenEvent] = field(default_factory=list)
    is_lost: bool = False
    sent_at: float = 0.0


class CommandPipe:
    """The supervisor's end of the engine process's stdin: a line is a command, its end is the parent's end."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""
        self.is_closed = False

    def fileno(self) -> int:
        return self._fd

    def read_lines(self) -> list[bytes]:
        """Whole lines that have arrived. Waits for some bytes; an empty list may mean a part of a line, or the end."""
        data = os.read(self._fd, 65536)
        self.is_closed = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines


class EngineLoop:
    """Drives one engine for any number of clients until it has drained or its parent is gone.

    `router` is a bound ROUTER socket (see `open_router`). `on_progress` is called whenever the loop is idle or a step
    got something done: this is the liveness signal.
    """

    def __init__(
        self,
        engine: SteppedEngine,
        router: zmq.SyncSocket,
        *,
        commands: CommandPipe,
        on_progress: Callable[[], None],
        idle_poll_s: float,
    ) -> None:
        self._engine = engine
        self._router = router
        self._commands = commands
        self._on_progress = on_progress
        self._idle_poll_ms = max(1, int(idle_poll_s * 1000))
        self._clients: dict[bytes, ClientState] = {}
        self._owners: dict[str, bytes] = {}
        self._drain_deadline: float | None = None
        self._num_steps = -1
        self.num_barren = 0  # steps in a row that got nothing done
        self._is_preparing = True  # whether the engine may have something to do while it has no work
        self._poller = zmq.Poller()
        self._poller.register(router, zmq.POLLIN)
        self._poller.register(commands.fileno(), zmq.POLLIN)

    def run(self) -> None:
        """Serve until drained (every event sent) or until the parent is gone. An exception of a step passes through."""
        has_work = False
        self._on_progress()
        while True:
            self._receive(self._poll_ms(has_work=has_work))
            if self._commands.is_closed:
                return
            self._abort_after_drain()
            self._flush()  # acceptances and refusals leave before a step that may take long
            has_work = self._engine.has_work()
            if has_work:
                self._step()
            elif self._drain_deadline is not None:
                return
            else:
                self._on_progress()
                self._is_preparing = self._engine.prepare()

    def _poll_ms(self, *, has_work: bool) -> int:
        if not has_work:
            return 0 if self._is_preparing else self._idle_poll_ms
        return 0 if self.num_barren < BARREN_STEPS else 1

    def _receive(self, timeout_ms: int) -> None:
        for ready, _ in self._poller.poll(timeout_ms):
            if ready is self._router:
                self._receive_messages()
            else:
                for line in self._commands.read_lines():
                    self._drain_deadline = time.monotonic() + command_decoder.decode(line).seconds

    def _receive_messages(self) -> None:
        for _ in range(MAX_MESSAGES_PER_STEP):
            try:
                identity, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            for frame in frames:
                self._receive_frame(identity, frame)

    def _receive_frame(self, identity: bytes, frame: bytes) -> None:
        try:
            message = client_frame_decoder.decode(frame)
            if isinstance(message, Hello):
                self._clients.setdefault(identity, ClientState())
            elif identity not in self._clients:  # it takes us for one that knows its requests: tell it otherwise
                self._clients[identity] = ClientState(is_lost=True)
            elif isinstance(message, Add):
                for request in requests_of(message):
                    self._add(identity, request)
            elif isinstance(message, Abort):
                self._abort(identity, message.request_ids)
            elif isinstance(message, Goodbye):
                self._forget(identity)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            logger.warning("dropped %d unreadable bytes of client %s: %s", len(frame), identity.hex(), error)

    def _add(self, identity: bytes, request: EngineRequest) -> None:
        client = self._clients[identity]
        if client.is_lost:
            return  # Lost, still to be sent, covers this request too
        try:
            if request.request_id in self._owners:
                raise RequestError(f"request id {request.request_id} is running already. Send another id.")
            if self._drain_deadline is not None:
                raise OverloadedError("The server is shutting down. Send the request again.", retry_after_s=5.0)
            self._engine.add(request)
        except RequestError as error:
            client.unsent.append(_error_event(request.request_id, to_error_info(error)))
        except Exception:  # one request must not end the others; the traceback goes to the log
            logger.exception("request %s could not be added", request.request_id)
            self._engine.abort(request.request_id)
            info = ErrorInfo(message="The engine failed on this request.", code="engine_error")
            client.unsent.append(_error_event(request.request_id, info))
        else:
            self._owners[request.request_id] = identity
            client.running.add(request.request_id)
            client.unsent.append(TokenEvent(request_id=request.request_id, is_accepted=True))

    def _abort(self, identity: bytes, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if self._owners.get(request_id, identity) == identity:  # nobody ends another client's requests
                self._engine.abort(request_id)

    def _abort_after_drain(self) -> None:
        if self._drain_deadline is not None and time.monotonic() >= self._drain_deadline:
            for request_id in self._owners:
                self._engine.abort(request_id)

    def _step(self) -> None:
        events = self._engine.step()
        stats = self._engine.stats()
        for event in events:
            self._collect(event)
        self._flush(stats)
        if events or stats.steps != self._num_steps:
            self._num_steps = stats.steps
            self.num_barren = 0
            self._on_progress()
        else:
            self.num_barren += 1

    def _collect(self, event: TokenEvent) -> None:
        identity = self._owners.get(event.request_id)
        if identity is None:
            return  # its client is gone
        client = self._clients[identity]
        client.unsent.append(event)
        if event.finish_reason is not None:
            del self._owners[event.request_id]
            client.running.discard(event.request_id)

    def _flush(self, stats: EngineStats | None = None) -> None:
        """Send each client its events, or just the newest statistics now and then (always when the work is done)."""
        now = time.monotonic()
        is_idle = stats is not None and not self._engine.has_work()
        for identity, client in list(self._clients.items()):
            is_due = stats is not None and (is_idle or now - client.sent_at >= STATS_INTERVAL_S)
            if client.is_lost:
                client.is_lost = not self._send(identity, LOST_FRAME)
            elif client.unsent or is_due:
                frame = encoder.encode(Events(client.unsent, stats or self._engine.stats()))
                client.unsent.clear()
                client.sent_at = now
                if not self._send(identity, frame):
                    self._lose(identity)

    def _send(self, identity: bytes, frame: bytes) -> bool:
        """Queue one frame. False: the client's queue is full. A client that is gone is forgotten."""
        try:
            self._router.send_multipart([identity, frame], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self._forget(identity)
        return True

    def _lose(self, identity: bytes) -> None:
        """A client reads nothing: end what it runs, and tell it when it reads again."""
        logger.warning("client %s reads nothing; its requests are aborted", identity.hex())
        self._forget(identity)
        self._clients[identity] = ClientState(is_lost=True)

    def _forget(self, identity: bytes) -> None:
        client = self._clients.pop(identity, None)
        for request_id in client.running if client else ():
            del self._owners[request_id]
            self._engine.abort(request_id)


def open_router(context: zmq.SyncContext, address: str, *, max_request_bytes: int) -> zmq.SyncSocket:
    """A bound ROUTER that refuses larger frames, reports unreachable clients and never waits for one."""
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.MAXMSGSIZE, max_request_bytes)
    router.setsockopt(zmq.SNDHWM, MAX_UNREAD_MESSAGES)
    router.setsockopt(zmq.LINGER, CLOSE_LINGER_MS)
    router.bind(address)
    return router


def _error_event(request_id: str, info: ErrorInfo) -> TokenEvent:
    return TokenEvent(request_id=request_id, finish_reason="error", error=info)
