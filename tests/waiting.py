"""How tests wait for other threads and processes, and find a port for them."""

import socket
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], *, what: str = "the condition", seconds: float = 30.0) -> None:
    """Return as soon as `condition` holds. Fails the test, naming `what`, when it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        time.sleep(0.005)


def unused_port() -> int:
    """A port of 127.0.0.1 that nothing listened on a moment ago; from the system's ephemeral range, so never 8000."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
