"""`lfm chat --tools` and `--mcp`: calls at the terminal, approval, interruption, history."""

import json
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lfm.agent import ToolCalled
from lfm.cli import chat_agent
from tests.agent.fakes import Refusal, calls, says, scripted
from tests.agent.test_mcp_tools import COMMAND
from tests.cli.conftest import Lfm
from tests.waiting import wait_until

FILE = '''
import time

def weather(city: str) -> str:
    """Say how warm it is."""
    return f"21 in {city} \\x1b[2J"

def slow() -> None:
    time.sleep(60)
'''
CALL = calls(("weather", {"city": "Bern"}), text="Let me look.")


@pytest.fixture
def tools(tmp_path: Path) -> str:
    path = tmp_path / "my_tools.py"
    path.write_text(FILE)
    return str(path)


@pytest.fixture
def at_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | BaseException]]:
    """What is typed: lines and answers, in the order in which they are asked for. Empty: Ctrl-D."""
    typed: list[str | BaseException] = []

    def read(prompt: str = "") -> str:
        if not typed:
            raise EOFError
        item = typed.pop(0)
        if isinstance(item, BaseException):
            raise item
        return item

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat_agent, "is_terminal", lambda: True)
    return typed


def test_yes_runs_calls_and_shows_them(lfm: Lfm, tools: str) -> None:
    with scripted(CALL, says("21."), says("Bye.")) as server:
        done = lfm("chat", "--url", server.url, "--tools", tools, "--yes", "--top-k", "7", stdin="How warm?\nThanks\n")
    assert done.code == 0
    assert done.out == "Let me look.21.\nBye.\n"
    assert "Tools: weather, slow" in done.err
    assert 'calls weather {"city": "Bern"}' in done.err
    assert "21 in Bern \ufffd[2J" in done.err
    assert "\x1b" not in done.err
    assert done.err.count("6 out") == 1
    assert server.requests[0]["top_k"] == 7
    assert [message["role"] for message in server.last] == ["user", "assistant", "tool", "assistant", "user"]
    assert server.last[2]["content"] == "21 in Bern \x1b[2J"
    assert server.last[3]["content"] == "21."


def test_without_a_terminal_calls_are_declined(lfm: Lfm, tools: str) -> None:
    with scripted(CALL, says("Then not.")) as server:
        done = lfm("chat", "--url", server.url, "--tools", tools, stdin="How warm?\n")
    assert done.out.endswith("Then not.\n")
    assert "--yes" in done.err
    assert "declined" in server.last[-1]["content"]


@pytest.mark.parametrize(
    ("answers", "results"),
    [
        (["y", "n"], ["21", "declined"]),
        (["maybe", "NO", "Yes"], ["declined", "21"]),
        (["always"], ["21", "21"]),
        ([EOFError(), "a"], ["declined", "21"]),
    ],
    ids=["yes-no", "asked-again", "always", "ctrl-d"],
)
def test_the_user_is_asked_before_each_call(
    answers: list[str | BaseException],
    results: list[str],
    lfm: Lfm,
    tools: str,
    at_terminal: list[str | BaseException],
) -> None:
    at_terminal += ["How warm?", *answers, "Thanks"]
    with scripted(CALL, CALL, says("Done."), says("Bye.")) as server:
        done = lfm("chat", "--url", server.url, "--tools", tools)
    assert done.out.endswith("Done.\nBye.\n")
    heard = [message["content"] for message in server.last if message["role"] == "tool"]
    assert len(heard) == 2
    for content, result in zip(heard, results, strict=True):
        assert result in content


def test_ctrl_c_stops_a_tool_and_the_conversation_goes_on_without_the_step(
    lfm: Lfm, tools: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = threading.get_ident()

    def interrupt_soon(event: object, turn: object) -> None:
        if isinstance(event, ToolCalled):
            threading.Timer(0.05, signal.pthread_kill, [main, signal.SIGINT]).start()

    monkeypatch.setattr(chat_agent, "_tell", interrupt_soon)
    with scripted(calls(("slow", {})), says("Bye.")) as server:
        done = lfm("chat", "--url", server.url, "--tools", tools, "--yes", stdin="Wait\nThanks\n")
    assert done.code == 0
    assert "(stopped)" in done.err
    assert done.out.endswith("Bye.\n")
    assert [message["role"] for message in server.last] == ["user", "assistant", "user"]


def test_the_servers_words_are_shown_for_a_refused_turn(lfm: Lfm, tools: str) -> None:
    with scripted(Refusal(status=400, message="tools is odd"), says("Bye.")) as server:
        done = lfm("chat", "--url", server.url, "--tools", tools, stdin="One\nTwo\n")
    assert done.code == 0
    assert "error: tools is odd" in done.err
    assert [message["content"] for message in server.last] == ["Two"]


def test_saved_conversations_hold_the_calls(lfm: Lfm, tools: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    with scripted(CALL, says("21.")) as server:
        lfm("chat", "--url", server.url, "--tools", tools, "--yes", stdin=f"How warm?\n/save {path}\n")
    messages = json.loads(path.read_text())["messages"]
    assert messages[1]["tool_calls"][0]["function"]["name"] == "weather"
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--tools", "/no/file.py"], 2, "is no file"),
        (["--mcp", "/no/such/command"], 3, "cannot be used"),
        (["--mcp", "http://127.0.0.1:1/"], 3, "cannot be used"),
        (["--mcp", ""], 2, "is empty"),
    ],
    ids=["file", "command", "address", "empty"],
)
def test_what_cannot_be_used_ends_the_command(flags: list[str], code: int, told: str, lfm: Lfm) -> None:
    with scripted(says("x")) as server:
        done = lfm("chat", "--url", server.url, *flags, stdin="Hello\n")
    assert done.code == code
    assert told in done.error
    assert server.requests == []


def test_a_server_that_is_not_there_is_the_machines_fault(lfm: Lfm, tools: str, free_port: int) -> None:
    done = lfm("chat", "--url", f"http://127.0.0.1:{free_port}", "--tools", tools, stdin="Hello\n")
    assert done.code == 3
    assert "does not answer" in done.error


@pytest.mark.slow
def test_mcp_servers_and_files_give_tools_together(lfm: Lfm, tools: str) -> None:
    first = calls(("add", {"a": 1, "b": 2}), ("weather", {"city": "Bern"}))
    with scripted(first, says("3 and 21.")) as server:
        done = lfm("chat", "--url", server.url, "--tools", tools, "--mcp", COMMAND, "--yes", stdin="Both\n")
    assert done.out == "3 and 21.\n", done.err
    assert [message["content"][:2] for message in server.last[-2:]] == ["3", "21"]


@pytest.mark.slow
def test_without_a_url_it_starts_a_server_of_its_own(lfm: Lfm, tools: str) -> None:
    before = threading.active_count()
    done = lfm("chat", "random:tiny", "--tools", tools, "--device", "cpu", "--max-tokens", "8", stdin="One\nTwo\n")
    assert done.code == 0, done.err
    assert "Talking with random:tiny" in done.err
    assert done.err.count("tokens in") == 2
    assert threading.active_count() == before


@pytest.mark.slow
def test_a_hang_up_of_the_terminal_ends_its_own_server_too(
    start_lfm: Callable[..., "subprocess.Popen[str]"], tools: str
) -> None:
    chat = start_lfm("chat", "random:tiny", "--tools", tools, "--device", "cpu")
    children = Path(f"/proc/{chat.pid}/task/{chat.pid}/children")
    if not children.exists():
        pytest.skip("needs /proc/PID/task/TID/children")
    wait_until(lambda: bool(children.read_text().split()), what="the server's process")
    (server,) = children.read_text().split()
    chat.send_signal(signal.SIGHUP)
    assert chat.wait(30) != 0
    wait_until(lambda: not Path(f"/proc/{server}").exists(), what="the end of the server")
