"""What a result says of where it was measured: what git and other commands tell. No torch here."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND_S = 10.0


def git_commit() -> str | None:
    """The commit of this checkout, marked if it was changed since; None outside a checkout."""
    commit = run("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = run("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changes else commit


def run(*command: str) -> str | None:
    """The first line that a command prints; empty if it prints nothing, None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=True)
    except (OSError, subprocess.SubprocessError):  # not installed, or not applicable here: the fact stays unknown
        return None
    return done.stdout.strip().partition("\n")[0]
