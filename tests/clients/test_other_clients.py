"""Clients that many people use, each against a served model, from an environment of its own: `make test-clients`.

The programs are in programs/, the locks in locks/; the environments are kept in the cache, one for each lock. What
cannot be installed is skipped, with the reason.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.clients.served import Served

HERE = Path(__file__).resolve().parent
INSTALL_S = 600
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


def environment(lock: Path) -> Path:
    """The Python of an environment with the locked packages; made at the first call. Skips if that fails."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lfm" / "tests"
    folder = cache / f"python{version}-{lock.stem}-{digest}"
    python = folder / "bin" / "python"
    if (folder / "installed").exists():
        return python
    cache.mkdir(parents=True, exist_ok=True)
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--require-hashes", "-r", str(lock)],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            pytest.skip(f"cannot be installed: {lines[-1] if lines else done.returncode}")
    (folder / "installed").touch()
    return python


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_client_works_unchanged(name: str, served: Served, flaky_url: str) -> None:
    python = environment(HERE / "locks" / f"{PROGRAMS[name]}.txt")
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
