"""Environments of other projects' packages, each from a lock with hashes; kept in the cache, one for each lock."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

INSTALL_S = 600


def locked_python(lock: Path) -> Path:
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
