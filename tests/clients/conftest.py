"""One served model for all client tests: the real command, in its own process, on a free port."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from tests.clients.flaky import flaky_proxy
from tests.clients.served import Served
from tests.waiting import unused_port, wait_until

START_SECONDS = 90.0
STOP_SECONDS = 30.0
MODEL = "LiquidAI/LFM2-24B-A2B"
API_KEY = "test-key"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", default=10, type=int, help="requests per operation that make test-api draws (10)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs environments of its own, unless a run asks for it: -m clients."""
    if "clients" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("clients")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("clients")]


def is_ready(process: subprocess.Popen[bytes], served: Served) -> bool:
    if process.poll() is not None:
        pytest.fail(f"lfm serve exited {process.returncode} while starting:\n{served.log.read_text()}")
    try:
        return served.get("/readyz").status_code == 200
    except httpx2.TransportError:
        return False


@contextlib.contextmanager
def served_model(log: Path, *flags: str) -> Iterator[Served]:
    """Serve the tiny model until the end of the block, in a process of its own with further flags."""
    port = unused_port()
    served = Served(url=f"http://127.0.0.1:{port}", model=MODEL, api_key=API_KEY, log=log)
    environment = {**os.environ, "XDG_DATA_HOME": str(log.parent)}  # no test stores anything among the user's own data
    flags = ("--port", str(port), "--served-model-name", MODEL, "--api-key", API_KEY, *flags)
    command = [sys.executable, "-m", "lfm.cli", "serve", "random:tiny", *flags]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            wait_until(lambda: is_ready(process, served), seconds=START_SECONDS, what=f"/readyz of the server ({log})")
            yield served
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_SECONDS) == 0, f"lfm serve exited {process.returncode}:\n{log.read_text()}"
        finally:
            process.kill()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_model(tmp_path_factory.mktemp("served") / "serve.log") as served:
        yield served


@pytest.fixture(scope="session")
def flaky_url(served: Served) -> Iterator[str]:
    """The same server behind a proxy that refuses the first POST under each path /KEY/... with a 503."""
    with flaky_proxy(served.url) as url:
        yield url


@pytest.fixture
def wait_until_idle(served: Served) -> Callable[[], None]:
    """A function that waits until the server runs nothing; fails if it goes on for 10 s."""

    def wait() -> None:
        wait_until(lambda: served.metric("vllm:num_requests_running") == 0, seconds=10, what="the end of all requests")

    return wait
