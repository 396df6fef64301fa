"""The engine process: `python -m lfm.engine.child`, started by `lfm.engine.supervisor` and by nobody else.

stdin brings the Setup and then commands, stdout carries reports, stderr is the log. Signals that end a command line
program are ignored: the supervisor decides, and if it goes away, so does this process.
"""

import faulthandler
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, cast

import msgspec
import zmq

from lfm.config import EngineConfig
from lfm.engine.lifeline import Heartbeat, follow_parent
from lfm.engine.loop import CommandPipe, EngineLoop, SteppedEngine, open_router
from lfm.engine.wire import MAX_REQUEST_FRAME_BYTES, Phase, Ready, Report, Setup, setup_decoder, to_failure
from lfm.errors import InternalError, LfmError

logger = logging.getLogger(__name__)

PHASE_S = 3600.0  # loading, compiling or capturing may be silent for so long before it counts as stuck
IDLE_POLL_S = 1.0  # an idle engine renews its promise at least so often
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STACK_DUMP_SIGNAL = signal.SIGUSR1

EngineFactory = Callable[[EngineConfig, Callable[[str], None]], SteppedEngine]


class ReportPipe:
    """The supervisor's view of this process: one JSON line per report."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def send(self, report: Report) -> None:
        line = msgspec.json.encode(report) + b"\n"
        while line:
            line = line[os.write(self._fd, line) :]


def main() -> NoReturn:
    """Run the engine process until it has drained (exit 0), failed (the error's code) or lost its parent (1)."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    reports = ReportPipe(_take_stdout())
    commands = CommandPipe(sys.stdin.fileno())
    setup = _read_setup(commands)
    follow_parent(setup.parent_pid)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("lfm").setLevel(setup.log_level)
    faulthandler.enable()
    faulthandler.register(STACK_DUMP_SIGNAL)  # the supervisor asks for it before it kills a stuck engine
    try:
        _serve(setup, commands=commands, reports=reports)
        code = 1 if commands.is_closed else 0
    except LfmError as error:
        reports.send(to_failure(error))
        code = error.exit_code
    except Exception as error:  # reported, and its traceback is in the log
        logger.exception("the engine failed")
        reports.send(to_failure(error))
        code = InternalError.exit_code
    logging.shutdown()
    os._exit(code)  # a device in a bad state can hang a normal exit; nothing here is left to be written


def _serve(setup: Setup, *, commands: CommandPipe, reports: ReportPipe) -> None:
    with Heartbeat(Path(setup.heartbeat_path)) as heartbeat:

        def on_phase(text: str) -> None:
            heartbeat.promise(PHASE_S)
            reports.send(Phase(text))

        engine = load_factory(setup.factory)(setup.config, on_phase)
        context = zmq.Context()
        router = open_router(context, setup.address, max_request_bytes=MAX_REQUEST_FRAME_BYTES)
        loop = EngineLoop(
            engine,
            router,
            commands=commands,
            on_progress=lambda: heartbeat.promise(setup.stuck_seconds),
            idle_poll_s=min(IDLE_POLL_S, setup.stuck_seconds / 4),
        )
        reports.send(Ready(engine.info))
        loop.run()
        router.close()
        context.term()  # waits for the last events to leave, at most CLOSE_LINGER_MS


def load_factory(name: str) -> EngineFactory:
    """The engine factory "module:function" as a function of the config and of on_phase. The parent chooses the name."""
    module, _, function = name.partition(":")
    build = getattr(importlib.import_module(module), function)

    def factory(config: EngineConfig, on_phase: Callable[[str], None]) -> SteppedEngine:
        return cast(SteppedEngine, build(config, on_phase=on_phase))

    return factory


def _take_stdout() -> int:
    """A private copy of stdout for the reports; whatever any library prints goes to the log from now on."""
    reports_fd = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return reports_fd


def _read_setup(commands: CommandPipe) -> Setup:
    while not commands.is_closed:
        for line in commands.read_lines():
            return setup_decoder.decode(line)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
