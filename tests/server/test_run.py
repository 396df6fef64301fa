"""A real uvicorn on a free port: what only sockets and signals can show."""

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lfm.config import ServerConfig
from lfm.errors import MachineError
from lfm.protocol import MAX_HEADER_BYTES
from lfm.server.run import bind_socket
from tests.server.fakes import (
    CHAT_PATH,
    FakeBackend,
    RunningServer,
    TrialHere,
    chat_body,
    engine_info,
    events_of,
    serving,
    state_of,
)
from tests.waiting import wait_until

TIMEOUT_S = 20.0


def connect(server: RunningServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S)


def post(server: RunningServer, **fields: Any) -> httpx2.Response:
    return httpx2.post(f"{server.url}{CHAT_PATH}", json=chat_body(**fields), timeout=TIMEOUT_S)


def send_request(sock: socket.socket, **fields: Any) -> None:
    body = json.dumps(chat_body(**fields)).encode()
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def in_thread(work: Callable[[], httpx2.Response]) -> tuple[threading.Thread, list[httpx2.Response]]:
    results: list[httpx2.Response] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


def test_answers_and_streams_over_a_socket() -> None:
    with serving(FakeBackend()) as server:
        assert post(server).json()["choices"][0]["message"]["content"] == "Hello!"
        response = post(server, stream=True)
        assert len(events_of(response)) == 8
        assert "server" not in response.headers


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_socket_aborts_what_was_running(stream: bool) -> None:
    backend = FakeBackend()
    backend.is_held = True
    with serving(backend) as server:
        with connect(server) as sock:
            send_request(sock, stream=stream, n=3)
            wait_until(lambda: backend.num_reads == 1, what="the request")
            assert backend.aborted == []
        wait_until(lambda: len(backend.aborted) == 3, what="the abort")
        wait_until(lambda: not state_of(server.app).works, what="the end of the request")


def test_a_reader_that_takes_nothing_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    """The stream would go on for a million chunks of 2 KB; the buffers of both sockets take some megabytes of them."""
    backend = FakeBackend(info=engine_info(num_blocks=10**6, max_model_len=10**7))
    config = ServerConfig(port=0, stalled_reader_seconds=0.3)
    with serving(backend, config) as server, connect(server) as sock:
        send_request(sock, stream=True, max_tokens=10**6, ignore_eos=True, logprobs=20)
        wait_until(lambda: bool(backend.aborted), what="the abort")
        assert b"[DONE]" not in read_all(sock)
        wait_until(lambda: not server.server.server_state.connections, what="the end of the connection")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_head_that_never_ends_is_431() -> None:
    with serving(FakeBackend()) as server, connect(server) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nX-Long: ")
        for _ in range(MAX_HEADER_BYTES // 1024):
            sock.sendall(b"a" * 1024)
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431 ")
        assert json.loads(body)["error"]["code"] == "headers_too_large"


def test_a_complete_head_that_is_too_long_is_431_and_one_that_fits_is_served() -> None:
    with serving(FakeBackend()) as server:
        for size, status in ((MAX_HEADER_BYTES + 1, 431), (MAX_HEADER_BYTES - 1000, 200)):
            headers = {"X-Long": "a" * size}
            assert httpx2.get(f"{server.url}/livez", headers=headers, timeout=TIMEOUT_S).status_code == status


def test_bytes_that_are_no_http_get_a_json_error() -> None:
    with serving(FakeBackend()) as server, connect(server) as sock:
        sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["code"] == "invalid_http"


def test_a_huge_body_is_refused_before_it_is_sent_and_the_connection_goes_on() -> None:
    num_bytes = 100 * 1024 * 1024
    with serving(FakeBackend()) as server, connect(server) as sock:
        sock.sendall(f"POST {CHAT_PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {num_bytes}\r\n\r\n".encode())
        answer = sock.recv(65536)
        assert answer.startswith(b"HTTP/1.1 413 ")
        for _ in range(num_bytes // 65536):  # a client that only reads after it has sent all
            sock.sendall(b" " * 65536)
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b"HTTP/1.1 200 " in answer + read_all(sock)


def test_drain_finishes_what_runs_and_refuses_what_comes() -> None:
    backend = FakeBackend()
    backend.is_held = True
    with serving(backend) as server:
        thread, results = in_thread(lambda: post(server, stream=True))
        wait_until(lambda: backend.num_reads == 1, what="the request")
        server.call(lambda: server.server.handle_exit(signal.SIGTERM, None))
        ready = httpx2.get(f"{server.url}/readyz", timeout=TIMEOUT_S)
        refused = post(server)
        assert (ready.status_code, refused.status_code) == (503, 503)
        assert refused.json()["error"]["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["connection"] == "close"
        assert httpx2.get(f"{server.url}/livez", timeout=TIMEOUT_S).status_code == 200
        server.call(backend.release)
        thread.join(TIMEOUT_S)
        assert "error" not in events_of(results[0])[-1]
        server.thread.join(TIMEOUT_S)
        assert not server.thread.is_alive()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("is_second_signal", [True, False])
def test_the_end_of_the_drain_cuts_off_what_still_runs(stream: bool, is_second_signal: bool) -> None:
    backend = FakeBackend()
    backend.is_held = True
    with serving(backend, ServerConfig(port=0, drain_seconds=3600 if is_second_signal else 0.2)) as server:
        thread, results = in_thread(lambda: post(server, stream=stream))
        wait_until(lambda: backend.num_reads == 1, what="the request")
        server.call(lambda: server.server.handle_exit(signal.SIGTERM, None))
        if is_second_signal:
            server.call(lambda: server.server.handle_exit(signal.SIGTERM, None))
        thread.join(TIMEOUT_S)
        (response,) = results
        assert response.status_code == (200 if stream else 503)
        error = events_of(response)[-1]["error"] if stream else response.json()["error"]
        assert error["code"] == "shutting_down"
        assert len(backend.aborted) == 1
        server.thread.join(TIMEOUT_S)
        assert not server.thread.is_alive()


def test_an_idle_server_ends_at_the_first_signal() -> None:
    with serving(FakeBackend()) as server, httpx2.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
        assert client.get("/livez").status_code == 200  # an idle keep-alive connection holds nothing up
        server.call(lambda: server.server.handle_exit(signal.SIGINT, None))
        server.thread.join(TIMEOUT_S)
        assert not server.thread.is_alive()


def test_a_taken_port_is_a_machine_error_that_says_so(free_port: int) -> None:
    with bind_socket(ServerConfig(port=free_port)) as first:
        first.listen()
        with pytest.raises(MachineError, match=f"127.0.0.1:{free_port} cannot be used"):
            bind_socket(ServerConfig(port=free_port))


SERVE = """
from lfm.config import ServerConfig
from lfm.server.run import bind_socket, run_server
from tests.server.fakes import FakeBackend, make_app
config = ServerConfig(port=0)
sock = bind_socket(config)
print(sock.getsockname()[1], flush=True)
run_server(make_app(FakeBackend(), config), config, sock=sock)
print("ended", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_without_a_traceback(sig: signal.Signals) -> None:
    command = [sys.executable, "-c", SERVE]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{int(process.stdout.readline())}/livez"
            wait_until(lambda: is_alive(url), what="the start of the server", seconds=TIMEOUT_S)
            process.send_signal(sig)
            output, errors = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert process.returncode == 0
    assert output == "ended\n"
    assert errors == ""


def is_alive(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=TIMEOUT_S).status_code == 200
    except httpx2.TransportError:
        return False


def test_the_process_that_tries_grammars_starts_once_and_when_the_model_is_ready() -> None:
    backend = FakeBackend()
    backend.reason = "loading"
    with serving(backend) as server:
        trial = state_of(server.app).grammars._trial
        assert isinstance(trial, TrialHere)
        assert post(server).status_code == 503
        assert trial.tried == []
        backend.reason = None
        wait_until(lambda: bool(trial.tried), what="the start")
        assert post(server).status_code == 200
        state_of(server.app).grammars.warm_up()
    assert len(trial.tried) == 1
