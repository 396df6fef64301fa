"""`lfm serve`: what it prints, how it ends, and several API processes on one socket."""

import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lfm.cli import service
from lfm.cli.service import curl_call, welcome
from lfm.config import EngineConfig, ServerConfig
from lfm.engine.supervisor import EngineSupervisor, RestartPolicy
from lfm.model.source import resolve_model
from tests.cli.conftest import Lfm
from tests.server.fakes import engine_info
from tests.waiting import wait_until

Start = Callable[..., "subprocess.Popen[str]"]
START_S = 60.0
STOP_S = 30.0
TINY = resolve_model("random:tiny")


def words_of(call: str) -> tuple[str, dict[str, str], str]:
    """Address, headers and body of a curl command, as the shell would hand them over."""
    words = shlex.split(call)
    assert words[0] == "curl"
    headers = dict(words[i + 1].split(": ", 1) for i, word in enumerate(words) if word == "-H")
    return words[1], headers, words[words.index("-d") + 1]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8123"),
        ("0.0.0.0", "http://127.0.0.1:8123"),
        ("::", "http://[::1]:8123"),
        ("::1", "http://[::1]:8123"),
        ("localhost", "http://localhost:8123"),
    ],
)
def test_the_address_shown_is_one_that_can_be_called(host: str, url: str) -> None:
    text = welcome(engine_info(), ServerConfig(host=host, insecure=True), source=TINY, port=8123)
    assert text.startswith(f"Serving random:tiny at {url}\n")
    assert words_of(text.splitlines()[-1].strip())[0] == f"{url}/v1/chat/completions"


def test_the_model_is_shown_under_its_served_name_with_every_reason() -> None:
    info = engine_info()
    text = welcome(info, ServerConfig(served_model_name="it's mine"), source=TINY, port=1)
    assert text.startswith("Serving it's mine at")
    assert "random weights" in text
    url, _, body = words_of(text.splitlines()[-1].strip())
    assert '"model":"it\'s mine"' in body
    assert url == "http://127.0.0.1:1/v1/chat/completions"


def test_the_key_is_shown_on_a_terminal_and_stays_a_variable_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    call = curl_call("http://x", "m", api_key="it's secret")
    assert "secret" not in call
    assert call.endswith('-H "Authorization: Bearer $LFM_API_KEY"')
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert words_of(curl_call("http://x", "m", api_key="it's secret"))[1]["Authorization"] == "Bearer it's secret"
    assert "Authorization" not in curl_call("http://x", "m", api_key=None)


def read_welcome(process: "subprocess.Popen[str]") -> list[str]:
    """The lines that a server prints when it is ready."""
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or "curl " not in lines[-1]:
        line = process.stdout.readline()
        assert line, f"lfm serve ended with {process.wait()}: {lines}"
        lines.append(line.rstrip("\n"))
    return lines


def answers(call: str, *, key: str | None = None) -> str:
    """Do what pasting `call` would do."""
    url, headers, body = words_of(call.strip())
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    response = httpx2.post(url, headers=headers, content=body, timeout=60)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["finish_reason"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_prints_a_call_that_works_when_pasted_and_ends_cleanly(
    start_lfm: Start, tmp_path: Path, number: signal.Signals
) -> None:
    process = start_lfm("serve", "random:tiny", "--port", "0", LFM_DEVICE="cpu")
    lines = read_welcome(process)
    assert lines[0].startswith("Serving random:tiny at http://127.0.0.1:")
    text = "\n".join(lines)
    for choice in ("device cpu", "dtype float32", "context 32,768 tokens", "64 sequences at once", "cache blocks"):
        assert choice in text
    assert answers(lines[-1]) in ("length", "stop")
    process.send_signal(number)
    assert process.wait(STOP_S) == 0
    log = (tmp_path / "stderr.txt").read_text()
    assert "Traceback" not in log
    assert "random:tiny is loaded" in log


@pytest.mark.slow
def test_a_running_stream_is_drained(start_lfm: Start) -> None:
    process = start_lfm("serve", "random:tiny", "--port", "0", LFM_DEVICE="cpu")
    url, _, _ = words_of(read_welcome(process)[-1].strip())
    body = {
        "model": "random:tiny",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 100,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx2.stream("POST", url, json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    assert process.wait(STOP_S) == 0


@pytest.mark.slow
def test_ctrl_c_while_the_model_loads_ends_with_130(start_lfm: Start, free_port: int) -> None:
    process = start_lfm("serve", "--port", str(free_port), LFM_DEVICE="cpu")

    def is_alive() -> bool:
        assert process.poll() is None
        try:
            return httpx2.get(f"http://127.0.0.1:{free_port}/livez").status_code == 200
        except httpx2.TransportError:
            return False

    wait_until(is_alive, what="/livez of a server that loads", seconds=START_S)
    assert httpx2.get(f"http://127.0.0.1:{free_port}/readyz").status_code == 503
    process.send_signal(signal.SIGINT)
    assert process.wait(STOP_S) == 130


@pytest.mark.slow
def test_what_keeps_the_engine_from_loading_is_one_line_and_its_exit_code(start_lfm: Start, tmp_path: Path) -> None:
    process = start_lfm("serve", "--port", "0", "--max-model-len", "40000", LFM_DEVICE="cpu")
    assert process.wait(START_S) == 2
    errors = [line for line in (tmp_path / "stderr.txt").read_text().splitlines() if line.startswith("error: ")]
    assert errors == ["error: --max-model-len 40000 is beyond the model's 32768 positions. Give at most 32768."]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "code", "message"),
    [
        ("die", 1, "The engine failed 3 times in 10 minutes. The last cause: the engine process was killed by SIGKILL"),
        ("refuse", 2, "fake shard 2 of 3 is missing. Download it again."),
        ("machine", 3, "needed 48 GB, had 24 GB. Use a smaller model."),
    ],
)
def test_an_engine_beyond_help_ends_the_service_with_the_last_cause(
    lfm: Lfm, monkeypatch: pytest.MonkeyPatch, trouble: str, code: int, message: str
) -> None:
    def supervisor(config: EngineConfig, **options: Any) -> EngineSupervisor:
        return EngineSupervisor(
            replace(config, model=f"fake:{trouble}"),
            factory="tests.engine_process.fakes:build_fake",
            restart=RestartPolicy(max_failures=3, first_delay_s=0.01),
            **options,
        )

    monkeypatch.setattr(service, "EngineSupervisor", supervisor)
    done = lfm("serve", "--port", "0")
    assert done.code == code
    assert message in done.error
    assert "Serving" not in done.out


@pytest.mark.slow
def test_several_api_processes_share_a_port_and_dead_ones_are_replaced(start_lfm: Start, tmp_path: Path) -> None:
    process = start_lfm("serve", "--port", "0", "--api-workers", "2", "--api-key", "secret", LFM_DEVICE="cpu")
    call = read_welcome(process)[-1]
    assert "secret" not in call
    call = call.replace("$LFM_API_KEY", "secret")
    assert answers(call) in ("length", "stop")
    workers = wait_for_workers(process.pid, count=2)
    os.kill(workers[0], signal.SIGKILL)
    wait_until(
        lambda: len(set(api_processes(process.pid)) - {workers[0]}) == 2, what="the replacement", seconds=START_S
    )
    for _ in range(4):
        assert answers(call) in ("length", "stop")
    last = api_processes(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(STOP_S) == 0
    assert not [pid for pid in last if Path(f"/proc/{pid}").exists()]
    assert "a new one starts" in (tmp_path / "stderr.txt").read_text()


@pytest.mark.slow
def test_api_processes_do_not_outlive_a_killed_parent(start_lfm: Start) -> None:
    process = start_lfm("serve", "--port", "0", "--api-workers", "2", LFM_DEVICE="cpu")
    read_welcome(process)
    workers = wait_for_workers(process.pid, count=2)
    process.kill()
    process.wait(STOP_S)
    wait_until(lambda: not any(is_running(pid) for pid in workers), what="the end of the workers", seconds=STOP_S)


def wait_for_workers(parent: int, *, count: int) -> list[int]:
    wait_until(lambda: len(api_processes(parent)) == count, what=f"{count} workers", seconds=START_S)
    return api_processes(parent)


def api_processes(parent: int) -> list[int]:
    """The ids of a server's API processes that run."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    found = []
    for pid in map(int, children):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile
        if b"lfm.cli.api_process" in command and is_running(pid):
            found.append(pid)
    return found


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
