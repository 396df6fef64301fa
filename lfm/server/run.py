"""uvicorn around one app: header limit, drain on SIGTERM or Ctrl-C, errors as JSON even where no app is reached.

Several API processes may serve one socket, each with its own app. A first signal drains: `/readyz` turns red, new
requests get a 503, running ones go on; after `drain_seconds`, or at a second signal, they are cut off with an error.
"""

import logging
import socket
import time
from types import FrameType

import orjson
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lfm.config import ServerConfig
from lfm.errors import MachineError, RequestError
from lfm.protocol import MAX_HEADER_BYTES
from lfm.server.errors import HeadersTooLargeError, error_body, error_info
from lfm.server.state import AppState

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # longer than the SDKs keep idle connections, so that none is closed under a request just sent
CUT_OFF_S = 5  # what cut-off requests have to send their last event


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with a limit on heads that never end; `Guard` checks the complete ones."""

    _is_in_head = False
    _num_head_bytes = 0

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._num_head_bytes = True, 0
        self.scope["lfm.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._num_head_bytes += len(data)
        if self._is_in_head and self._num_head_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            message = f"The headers hold more than {MAX_HEADER_BYTES} bytes. Send fewer or shorter headers."
            self._refuse(
                b"431 Request Header Fields Too Large", HeadersTooLargeError(message, code="headers_too_large")
            )

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for bytes that are no HTTP."""
        self._refuse(b"400 Bad Request", RequestError(f"{msg} Speak HTTP/1.1.", code="invalid_http"))

    def _refuse(self, status: bytes, error: RequestError) -> None:
        body = orjson.dumps(error_body(error_info(error, request_id="")))
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, len(body)) + body)
        self.transport.close()


class ApiServer(uvicorn.Server):
    """Serves one app until a signal, or `begin_drain`, ends it."""

    def __init__(self, app: Starlette, config: ServerConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=LimitedHttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CUT_OFF_S,
            )
        )
        state = app.state.lfm
        assert isinstance(state, AppState)
        self._state = state
        self._drain_seconds = config.drain_seconds
        self._drain_until: float | None = None

    def begin_drain(self) -> None:
        """Take no new requests; exit when the running ones have ended or the time is over. Idempotent."""
        if self._drain_until is None:
            self._drain_until = time.monotonic() + self._drain_seconds
            self._state.is_draining = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's signal handler. Unlike its own it keeps the socket open for the 503s of the drain."""
        if self._drain_until is None:
            self.begin_drain()
        else:
            self._drain_until = time.monotonic()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._state.responses.close()
        self._state.grammars.close()
        await self._state.search.aclose()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        if await super().on_tick(counter):
            return True
        if self._drain_until is None:
            if self._state.backend.not_ready_reason is None:
                self._state.grammars.warm_up()
            return False
        num_running = len(self._state.works)
        if num_running and time.monotonic() < self._drain_until:
            return False
        if num_running:
            logger.warning("%d requests are cut off after draining for %.0f s", num_running, self._drain_seconds)
            self._state.cut_off()
        return True


async def serve(app: Starlette, config: ServerConfig, *, sock: socket.socket) -> None:
    """Serve `app` on a bound socket in the running event loop until SIGTERM, SIGINT, or a drain has ended.

    The socket is closed at the end. Signals are handled only in the main thread.
    """
    await ApiServer(app, config).serve(sockets=[sock])


def run_server(app: Starlette, config: ServerConfig, *, sock: socket.socket) -> None:
    """`serve` in an event loop of its own (uvloop where it is installed)."""
    ApiServer(app, config).run(sockets=[sock])


def bind_socket(config: ServerConfig) -> socket.socket:
    """Bind host and port before anything slow starts. Raises MachineError if the port is taken or not allowed."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.host, config.port))
    except OSError as error:
        sock.close()
        raise MachineError(
            f"{config.host}:{config.port} cannot be used ({error.strerror}). Choose another --port (0: a free one)."
        ) from error
    return sock
