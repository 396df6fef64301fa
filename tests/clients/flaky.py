"""A proxy that refuses the first POST under each path /KEY/... as a full server does, and passes everything else on."""

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

REFUSAL = {"error": {"message": "The queue is full.", "type": "overloaded_error", "param": None, "code": None}}
NOT_PASSED = {"connection", "host", "transfer-encoding", "content-length", "keep-alive"}
PASS_ON_S = 60.0


class _Handler(BaseHTTPRequestHandler):
    server_url = ""
    refused: set[str]

    def do_GET(self) -> None:
        self._pass_on(b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        key = self.path.split("/")[1]
        if key in self.refused:
            self._pass_on(body)
            return
        self.refused.add(key)
        data = json.dumps(REFUSAL).encode()
        self.send_response(503)
        headers = {"content-type": "application/json", "content-length": str(len(data))}
        for name, value in {**headers, "retry-after": "1", "retry-after-ms": "10"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _pass_on(self, body: bytes) -> None:
        target = urlsplit(self.server_url)
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=PASS_ON_S)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in NOT_PASSED}
        with contextlib.closing(connection):
            connection.request(self.command, "/" + self.path.split("/", 2)[2], body, headers)
            response = connection.getresponse()
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in NOT_PASSED:
                    self.send_header(name, value)
            self.end_headers()
            while piece := response.read1():
                self.wfile.write(piece)
                self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def flaky_proxy(server_url: str) -> Iterator[str]:
    """Serve the proxy of a server; yields its address."""
    handler = type("Handler", (_Handler,), {"server_url": server_url, "refused": set()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.server_address[1]}"
        finally:
            listener.shutdown()
            thread.join()
