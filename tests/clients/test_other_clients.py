"""Clients that many people use, each against a served model, from an environment of its own: `make test-clients`.

The programs are in programs/, the locks in locks/; the environments are kept in the cache, one for each lock. What
cannot be installed is skipped, with the reason.
"""

import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.clients.environments import INSTALL_S, locked_python
from tests.clients.served import Served

HERE = Path(__file__).resolve().parent
RUN_S = 300

# Which lock each program runs with. Two clients have an environment for themselves: they pin others' needs elsewhere.
PROGRAMS = {
    "anthropic": "agents",
    "openai_agents": "agents",
    "langchain_openai": "agents",
    "pydantic_ai": "agents",
    "smolagents": "agents",
    "mcp": "agents",
    "instructor": "instructor",
    "litellm": "litellm",
}

pytestmark = [pytest.mark.slow, pytest.mark.clients, pytest.mark.timeout(INSTALL_S + RUN_S)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_client_works_unchanged(name: str, served: Served, flaky_url: str) -> None:
    python = locked_python(HERE / "locks" / f"{PROGRAMS[name]}.txt")
    with tempfile.TemporaryDirectory() as folder:  # some of them write to the folder where they run
        done = subprocess.run(
            [str(python), str(HERE / "programs" / f"{name}_client.py"), served.model],
            env=served.environment(flaky_url=flaky_url),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=RUN_S,
        )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("passed\n")
