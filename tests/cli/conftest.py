"""Running `lfm` in this process (fast) or as a user does, in its own (marked slow)."""

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lfm.cli.app import run

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what went wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("error: ")


Lfm = Callable[..., Done]


@pytest.fixture(autouse=True)
def kept_log_level() -> Iterator[None]:
    """`run` sets the package's log level; other tests must not see that."""
    logger = logging.getLogger("lfm")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def lfm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lfm:
    """Run a command line in this process: lfm("serve", "--port", "0", stdin="...")."""

    def call(*args: str, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = run(args)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


@pytest.fixture
def start_lfm(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start a command line in a process of its own; stdout is a pipe, stderr goes to stderr.txt in tmp_path."""
    started: list[subprocess.Popen[str]] = []
    log = (tmp_path / "stderr.txt").open("w")

    def start(*args: str, **environment: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "lfm.cli", *args],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    log.close()
