"""Triton's interpreter: kernels on a CPU, in fp32. Triton reads the variable when a kernel is declared, so the tests of
a file run in a process of their own, started by the one test that the file has otherwise.
"""

import os
import subprocess
import sys

import pytest

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(path: str) -> None:
    """Run the tests of the file at `path` under the interpreter; fail with their output if one fails."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", path]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
