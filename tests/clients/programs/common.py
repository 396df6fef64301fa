"""What the programs of this folder share. Each runs in an environment of its own, without pytest, and says what it did.

    python NAME_client.py MODEL      with SERVER_URL, SERVER_KEY and FLAKY_URL in the environment

FLAKY_URL is the same server behind a proxy that refuses the first POST under each path /KEY/... with a 503.
Random weights write nonsense, so whatever is well formed is so because the server holds the model to it; where a test
needs more (two calls at once) seeds are tried in turn.
"""

import importlib.metadata
import os
import sys
import time
import urllib.request

MODEL = sys.argv[1]
URL = os.environ["SERVER_URL"]
V1 = f"{URL}/v1"
KEY = os.environ["SERVER_KEY"]
FLAKY_URL = os.environ["FLAKY_URL"]
QUESTION = "How warm is it in Bern and in Thun?"
SEEDS = range(1, 40)
WAIT_S = 20.0

CITIES = ("Bern", "Thun")
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": list(CITIES), "description": "Where."},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Say how warm it is.", "parameters": PARAMETERS},
}


def check_arguments(arguments: dict[str, object]) -> None:
    assert set(arguments) == {"city", "days"}, arguments
    assert arguments["city"] in CITIES, arguments
    assert arguments["days"] in range(10), arguments


def did(what: str) -> None:
    """Say that something worked."""
    print(f"  {what}", flush=True)


def begin(*packages: str) -> None:
    """Say which versions run."""
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages), flush=True)


class raises:
    """A block that must raise an error of this kind whose text has this part."""

    def __init__(self, kind: type[BaseException], part: str = "") -> None:
        self._kind = kind
        self._part = part

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None:
            raise AssertionError(f"no {self._kind.__name__} was raised")
        if isinstance(error, self._kind) and self._part not in str(error):
            raise AssertionError(f"{self._part!r} is not in {error}")
        return isinstance(error, self._kind)


def num_running() -> float:
    request = urllib.request.Request(f"{URL}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running"))


def wait_for_running(number: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while num_running() != number:
        assert time.monotonic() < deadline, f"the server still runs {num_running()} requests, not {number}"
        time.sleep(0.01)
