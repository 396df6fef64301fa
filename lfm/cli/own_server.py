"""A server of one's own for `bench serve`: `lfm serve` in a process beside this one, on a free port."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping

from lfm.cli.terminal import note
from lfm.errors import InternalError, LfmError, MachineError, UsageError

STOP_S = 30.0
_ERRORS: dict[int, type[LfmError]] = {2: UsageError, 3: MachineError}


@contextlib.contextmanager
def own_server(model: str, flags: Mapping[str, object]) -> Iterator[str]:
    """Start `lfm serve MODEL` with `flags`, yield its address when it is ready, and stop it in the end.

    Raises the LfmError that ended the server, if it could not start.
    """
    words = [text for name, value in flags.items() for text in (name, str(value))]
    command = [sys.executable, "-m", "lfm.cli", "serve", model, "--host", "127.0.0.1", "--port", "0", *words]
    note(f"starting lfm serve {model}")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:  # one line per request: not for here
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield _wait_for_address(server)
        except EOFError:
            code = server.wait()
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.startswith("error: ")]
            cause = lines[-1].removeprefix("error: ") if lines else f"lfm serve exited with code {code}."
            raise _ERRORS.get(code, InternalError)(cause) from None
        finally:
            _stop(server)


def _wait_for_address(server: "subprocess.Popen[str]") -> str:
    """The address in the server's first line. Raises EOFError if it ends without one."""
    assert server.stdout is not None
    line = server.stdout.readline()
    address = line.rpartition(" at ")[2].strip()
    if not address.startswith("http"):
        raise EOFError
    return address


def _stop(server: "subprocess.Popen[str]") -> None:
    server.terminate()
    try:
        server.wait(STOP_S)
    except subprocess.TimeoutExpired:  # it had its time to drain
        server.kill()
        server.wait()
    assert server.stdout is not None
    server.stdout.close()
