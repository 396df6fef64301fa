"""The engine in a process of its own: death, hanging, restart, giving up, drain, and what is left behind."""

import asyncio
import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lfm.engine import supervisor as supervisor_module
from lfm.engine.supervisor import RestartPolicy, make_socket_directory
from lfm.errors import InternalError, LfmError, MachineError, ModelError, OverloadedError
from lfm.protocol import TokenEvent
from tests.engine_process.fakes import DIE, DIE_ONCE, HANG, RAISE, WAIT
from tests.engine_process.support import eventually, read_all, request, run, socket_directory, supervised
from tests.waiting import wait_until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def helper(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """tests/engine_process/owner.py in a process of its own."""
    command = [sys.executable, "-m", "tests.engine_process.owner", *arguments]
    with socket_directory() as directory:  # a killed owner cannot tidy up
        environment = {**os.environ, "TMPDIR": str(directory)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def the_error(event: TokenEvent) -> str | None:
    assert event.finish_reason == "error"
    return event.error.code if event.error else None


def test_kill_9_fails_running_streams_turns_not_ready_and_restarts() -> None:
    async def scenario() -> None:
        async with supervised("fake:slow", restart=RestartPolicy(first_delay_s=1.0)) as (supervisor, client):
            info = await supervisor.wait_ready()
            await client.wait_ready()
            assert (client.info, client.not_ready_reason) == (info, None)
            stream = await client.submit([request("a", max_tokens=90_000)])
            assert (await stream.next_events())[0].token_ids[0] == 0
            first_pid = supervisor.engine_pid
            assert first_pid is not None
            killed_at = time.monotonic()
            os.kill(first_pid, signal.SIGKILL)
            event = (await read_all(stream))["a"]
            assert the_error(event) == "engine_died"
            assert time.monotonic() - killed_at < 2.0
            assert client.not_ready_reason is not None
            assert "restarts in 1 s" in client.not_ready_reason
            with pytest.raises(OverloadedError) as caught:
                await client.submit([request("b")])
            assert caught.value.retry_after_s > 0
            await client.wait_ready()
            assert supervisor.engine_pid != first_pid
            assert client.not_ready_reason is None
            again = await client.submit([request("b")])
            assert (await read_all(again))["b"].token_ids == list(range(5))

    run(scenario())


def test_requests_without_output_go_on_with_the_next_engine() -> None:
    async def scenario() -> None:
        async with supervised("fake:slow") as (supervisor, client):
            await client.wait_ready()
            running = await client.submit([request("running", max_tokens=90_000)])
            await running.next_events()
            waiting = await client.submit([request("waiting", kind=WAIT), request("waiting-1", kind=WAIT)])
            assert supervisor.engine_pid is not None
            os.kill(supervisor.engine_pid, signal.SIGKILL)
            assert the_error((await read_all(running))["running"]) == "engine_died"
            await client.wait_ready()
            await eventually(lambda: client.stats().num_running == 2)
            await waiting.abort("waiting")
            await waiting.abort("waiting-1")
            await eventually(lambda: client.stats().num_running == 0)

    run(scenario())


def test_a_resubmitted_request_ends_with_all_its_tokens(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervised(f"fake:marker={tmp_path / 'died'}") as (_, client):
            await client.wait_ready()
            stream = await client.submit([request("a", kind=DIE_ONCE, max_tokens=20)])
            event = (await read_all(stream))["a"]
            assert (event.token_ids, event.finish_reason) == (list(range(20)), "length")

    run(scenario())


def test_a_request_that_kills_every_engine_ends_in_error_and_the_service_survives() -> None:
    async def scenario() -> None:
        async with supervised() as (_, client):
            await client.wait_ready()
            stream = await client.submit([request("poison", kind=DIE)])
            assert the_error((await read_all(stream))["poison"]) == "engine_died"
            await client.wait_ready()
            again = await client.submit([request("b")])
            assert (await read_all(again))["b"].finish_reason == "length"

    run(scenario())


@pytest.mark.parametrize("kind", [RAISE, HANG])
def test_a_step_that_raises_or_hangs_ends_in_a_restart(kind: int, capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with supervised(stuck_seconds=0.5) as (_, client):
            await client.wait_ready()
            stream = await client.submit([request("a", kind=kind)])
            assert the_error((await read_all(stream))["a"]) == "engine_died"
            await client.wait_ready()

    run(scenario())
    log = capfd.readouterr().err
    assert ("ZeroDivisionError: a bug in step" if kind == RAISE else "_make_trouble") in log  # says where it was


def test_a_stopped_engine_is_noticed_in_time_and_replaced() -> None:
    async def scenario() -> None:
        async with supervised("fake:slow", stuck_seconds=1.0) as (supervisor, client):
            await client.wait_ready()
            stream = await client.submit([request("a", max_tokens=90_000)])
            await stream.next_events()
            pid = supervisor.engine_pid
            assert pid is not None
            stopped_at = time.monotonic()
            os.kill(pid, signal.SIGSTOP)
            assert the_error((await read_all(stream))["a"]) == "engine_died"
            assert 0.5 < time.monotonic() - stopped_at < 5.0
            await client.wait_ready()
            assert not is_alive(pid)

    run(scenario())


def test_a_load_longer_than_the_stuck_time_is_not_stuck() -> None:
    async def scenario() -> None:
        phases: list[str] = []
        async with supervised("fake:load=1.5", stuck_seconds=0.5, on_phase=phases.append) as (supervisor, client):
            await eventually(lambda: client.not_ready_reason == "reading fake weights")
            await supervisor.wait_ready()
            await client.wait_ready()
            assert phases == ["reading fake weights"]

    run(scenario())


def test_too_many_failures_are_the_end_with_the_last_cause() -> None:
    async def scenario() -> None:
        restart = RestartPolicy(max_failures=3, first_delay_s=0.01)
        async with supervised("fake:die", restart=restart) as (supervisor, client):
            error = await supervisor.wait_failed()
            assert error.exit_code == 1
            assert "3 times in 10 minutes" in str(error)
            assert "SIGKILL" in str(error)
            with pytest.raises(InternalError, match="SIGKILL"):
                await supervisor.wait_ready()
            await eventually(lambda: client.not_ready_reason == "the engine cannot run")

    run(scenario())


def test_failures_far_apart_are_not_too_many() -> None:
    async def scenario() -> None:
        restart = RestartPolicy(max_failures=2, window_s=0.2, first_delay_s=0.3)
        async with supervised(restart=restart) as (supervisor, client):
            for _ in range(3):
                await client.wait_ready()
                pid = supervisor.engine_pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await eventually(lambda pid=pid: supervisor.engine_pid not in (None, pid))  # type: ignore[misc]

    run(scenario())


def test_restart_delays_double_up_to_a_limit() -> None:
    delays_s = [RestartPolicy().delay_s(number) for number in range(1, 9)]
    assert delays_s == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_giving_up_ends_waiting_requests() -> None:
    async def scenario() -> None:
        restart = RestartPolicy(max_failures=1, first_delay_s=0.01)
        async with supervised(restart=restart) as (supervisor, client):
            await client.wait_ready()
            waiting = await client.submit([request("waiting", kind=WAIT)])
            assert supervisor.engine_pid is not None
            os.kill(supervisor.engine_pid, signal.SIGKILL)
            event = (await read_all(waiting))["waiting"]
            assert event.error is not None
            assert (event.error.code, event.error.status) == ("engine_died", 503)

    run(scenario())


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("fake:refuse", ModelError, "fake shard 2 of 3 is missing. Download it again."),
        ("fake:machine", MachineError, "needed 48 GB, had 24 GB. Use a smaller model."),
        ("fake:crash", InternalError, "ZeroDivisionError: a bug in build"),
    ],
)
def test_an_error_of_the_first_load_comes_back_as_itself(model: str, kind: type[LfmError], message: str) -> None:
    async def scenario() -> None:
        async with supervised(model) as (supervisor, _):
            with pytest.raises(kind) as caught:
                await supervisor.wait_ready()
            assert (type(caught.value), str(caught.value)) == (kind, message)

    run(scenario())


def test_drain_lets_requests_finish_and_aborts_the_rest() -> None:
    async def scenario() -> None:
        async with supervised("fake:slow") as (supervisor, client):
            await client.wait_ready()
            short = await client.submit([request("short", max_tokens=40)])
            endless = await client.submit([request("endless", kind=WAIT)])
            draining = asyncio.create_task(supervisor.drain(1.0))
            await eventually(lambda: client.not_ready_reason == "shutting down")
            with pytest.raises(OverloadedError, match="shutting down"):
                await client.submit([request("late")])
            assert (await read_all(short))["short"].token_ids == list(range(40))
            assert (await read_all(endless))["endless"].finish_reason == "abort"
            await draining
            assert supervisor.engine_pid is None
            await eventually(lambda: client.not_ready_reason == "shut down")

    run(scenario())


def test_drain_of_an_idle_engine_is_quick_and_of_a_loading_one_too() -> None:
    async def scenario(model: str) -> None:
        async with supervised(model) as (supervisor, client):
            if model == "fake:":
                await client.wait_ready()
            else:
                await eventually(lambda: client.not_ready_reason == "reading fake weights")
            started_at = time.monotonic()
            await supervisor.drain(30.0)
            assert time.monotonic() - started_at < 5.0

    run(scenario("fake:"))
    run(scenario("fake:load=60"))


def test_the_engine_dies_with_its_parent() -> None:
    with helper("owner") as owner:
        assert owner.stdout is not None
        engine_pid = int(owner.stdout.readline())
        assert is_alive(engine_pid)
        owner.kill()
        wait_until(lambda: not is_alive(engine_pid))


def test_signals_meant_for_the_command_do_not_end_the_engine() -> None:
    async def scenario() -> None:
        async with supervised("fake:slow") as (supervisor, client):
            await client.wait_ready()
            stream = await client.submit([request("a", max_tokens=100)])
            assert supervisor.engine_pid is not None
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(supervisor.engine_pid, number)
            assert (await read_all(stream))["a"].token_ids == list(range(100))

    run(scenario())


def test_clients_in_two_processes_live_and_die_apart() -> None:
    async def scenario() -> None:
        async with supervised("fake:slow") as (supervisor, client):
            await client.wait_ready()
            mine = await client.submit([request("mine", max_tokens=90_000)])
            with helper("client", str(supervisor.directory)) as other:
                assert other.stdout is not None
                assert await asyncio.to_thread(other.stdout.readline) == "1 token\n"
                await eventually(lambda: client.stats().num_running == 3)
                other.kill()
                await eventually(lambda: client.stats().num_running == 1)
            assert (await mine.next_events())[0].finish_reason is None
            await mine.aclose()

    run(scenario())


def test_a_client_in_another_process_learns_of_a_death_and_of_the_restart() -> None:
    async def scenario() -> None:
        async with supervised("fake:slow") as (supervisor, client):
            await client.wait_ready()
            with helper("client", str(supervisor.directory)) as other:
                assert other.stdout is not None
                assert await asyncio.to_thread(other.stdout.readline) == "1 token\n"
                assert supervisor.engine_pid is not None
                os.kill(supervisor.engine_pid, signal.SIGKILL)
                while (line := await asyncio.to_thread(other.stdout.readline)) == "1 token\n":
                    pass
                assert line == "1 engine_died\n"
                await client.wait_ready()
                await eventually(lambda: client.stats().num_running == 1)  # the one that had no output yet

    run(scenario())


def test_an_idle_engine_sleeps() -> None:
    async def scenario() -> None:
        async with supervised() as (supervisor, client):
            await client.wait_ready()
            stream = await client.submit([request("a")])
            await read_all(stream)
            assert supervisor.engine_pid is not None
            before_s = cpu_seconds(supervisor.engine_pid)
            until = time.monotonic() + 2.0
            await eventually(lambda: time.monotonic() > until)
            assert cpu_seconds(supervisor.engine_pid) - before_s <= 0.05

    run(scenario())


def test_the_sockets_are_private_and_gone_afterwards() -> None:
    async def scenario() -> None:
        async with supervised() as (supervisor, client):
            await client.wait_ready()
            directory = supervisor.directory
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            assert (directory / "status").exists()
        assert not directory.exists()

    run(scenario())


def test_a_socket_path_too_long_for_the_system_goes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(supervisor_module.tempfile, "tempdir", str(deep))
    directory = make_socket_directory()
    directory.rmdir()
    assert directory.parent == Path("/tmp")


def test_an_api_process_loads_no_torch() -> None:
    code = "import sys, lfm.engine.process, lfm.engine.supervisor, lfm.engine.child; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == "False\n"
