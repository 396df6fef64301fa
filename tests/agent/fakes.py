"""A scripted model behind OpenAI's streaming form, on loopback."""

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "scripted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An answer that is no success."""

    status: int
    message: str = "no"
    headers: dict[str, str] = field(default_factory=dict)


class HangUp:
    """The connection ends without an answer."""


Chunks = list[dict[str, Any]]
Script = Sequence[Chunks | Refusal | HangUp]


def chunk(delta: dict[str, Any] | None = None, *, finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]}


def usage(*, prompt: int = 10, cached: int = 4, output: int = 3) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return {**chunk(), "choices": [], "usage": {**counts, "prompt_tokens_details": {"cached_tokens": cached}}}


def says(*pieces: str, finish_reason: str = "stop") -> Chunks:
    texts = [chunk({"content": piece}) for piece in pieces]
    return [chunk({"role": "assistant", "content": ""}), *texts, chunk(finish_reason=finish_reason), usage()]


def calls(*named: tuple[str, object], text: str = "", finish_reason: str = "tool_calls") -> Chunks:
    """Calls, each as (name, arguments); a str is sent as it is. Arguments arrive in pieces of three characters."""
    chunks = [chunk({"role": "assistant", "content": text or None})]
    for index, (name, arguments) in enumerate(named):
        written = arguments if isinstance(arguments, str) else json.dumps(arguments)
        head = {"index": index, "id": f"call_{name}_{index}", "type": "function"}
        chunks.append(chunk({"tool_calls": [{**head, "function": {"name": name, "arguments": ""}}]}))
        for at in range(0, len(written), 3):
            chunks.append(chunk({"tool_calls": [{"index": index, "function": {"arguments": written[at : at + 3]}}]}))
    return [*chunks, chunk(finish_reason=finish_reason), usage()]


@dataclass(slots=True)
class ScriptedServer:
    """Gives the answers of its script in turn, and remembers what it was sent."""

    script: Script
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    @property
    def last(self) -> list[dict[str, Any]]:
        """The messages of the last request."""
        messages: list[dict[str, Any]] = self.requests[-1]["messages"]
        return messages


def _handler(server: ScriptedServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.requests.append(body)
            server.headers.append(dict(self.headers))
            answer = server.script[min(len(server.requests), len(server.script)) - 1]
            if isinstance(answer, HangUp):
                self.close_connection = True
            elif isinstance(answer, Refusal):
                self._send(answer.status, {"error": {"message": answer.message}}, answer.headers)
            else:
                self._stream(answer)

        def _stream(self, chunks: Chunks) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("connection", "close")
            self.end_headers()
            events = [": ping\n\n", *(f"data: {json.dumps(item)}\n\n" for item in chunks), "data: [DONE]\n\n"]
            self.wfile.write("".join(events).encode())
            self.close_connection = True

        def _send(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"content-length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextlib.contextmanager
def scripted(*script: Chunks | Refusal | HangUp) -> Iterator[ScriptedServer]:
    """Serve a script; its last answer is repeated."""
    server = ScriptedServer(script)
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(server)) as listener:
        server.url = f"http://127.0.0.1:{listener.server_address[1]}"
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()
