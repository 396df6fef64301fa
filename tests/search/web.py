"""Web servers on loopback for tests: one that answers as a table says, and one that writes raw bytes."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ssl import SSLContext


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """A response. `raw` replaces everything, status line included; `holds` keeps the connection open after it."""

    status: int = 200
    body: bytes = b""
    content_type: str = "text/plain"
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    holds: bool = False


class Web:
    """What the server answers, by path without its query, and the requests that it saw."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer | Callable[[Seen], Answer]] = {}
        self.seen: list[Seen] = []
        self.port = 0
        self.closing = threading.Event()

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        seen = Seen(self.command, self.path, dict(self.headers), self.rfile.read(length))
        self.web.seen.append(seen)
        answer = self.web.answers.get(self.path.partition("?")[0], Answer(status=404))
        if callable(answer):
            answer = answer(seen)
        if answer.raw is None:
            self.send_response(answer.status)
            for name, value in {"Content-Type": answer.content_type, "Connection": "close", **answer.headers}.items():
                self.send_header(name, value)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)
        else:
            self.wfile.write(answer.raw)
        self.wfile.flush()
        if answer.holds:
            self.web.closing.wait(30)
        self.close_connection = True

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error here."""


@contextmanager
def serve(tls: SSLContext | None = None) -> Iterator[Web]:
    web = Web()
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"web": web}))
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    web.port = server.server_address[1]
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02))
    thread.start()
    try:
        yield web
    finally:
        web.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
