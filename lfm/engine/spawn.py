"""One life of the engine process, seen from its parent: start it, follow its reports, notice its end, bury it.

To be used in a thread that outlives the process: on Linux the kernel kills the child when that thread ends.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from lfm.config import EngineConfig
from lfm.engine.child import PHASE_S, STACK_DUMP_SIGNAL
from lfm.engine.lifeline import Heartbeat
from lfm.engine.threads import WAIT_ENVIRONMENT
from lfm.engine.wire import Drain, Failed, Report, Setup, data_address, report_decoder, to_exception
from lfm.errors import InternalError, LfmError

STDERR_TAIL_BYTES = 4096
MAX_REPORT_BYTES = 4 * 1024 * 1024  # a ModelError may list every tensor of a checkpoint
CHECKS_PER_STUCK_TIME = 10
MAX_CHECK_INTERVAL_S = 1.0
EXIT_S = 5.0  # a process that has closed its report pipe is given so long to end by itself
LAST_WORDS_S = 0.2  # so long is waited for the rest of its log; a grandchild may hold that open
STACK_DUMP_S = 0.2  # and one that was asked where it is stuck, so long to answer

OnReport = Callable[[Report], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Death:
    """Why an engine process ended. `is_reported`: it said so itself, while one that was killed or stuck cannot."""

    error: LfmError
    is_reported: bool


class EngineProcess:
    """A started engine process. `watch` returns when it is dead or as good as dead; `bury` makes sure that it is."""

    def __init__(self, process: asyncio.subprocess.Process, *, heartbeat: Heartbeat, stuck_seconds: float) -> None:
        self._process = process
        self._heartbeat = heartbeat
        self._stuck_seconds = stuck_seconds
        self._stderr_tail = b""
        self._stderr_pump = asyncio.create_task(self._pump_stderr())

    @classmethod
    async def start(
        cls, config: EngineConfig, *, factory: str, directory: Path, epoch: int, stuck_seconds: float
    ) -> Self:
        """Start engine process number `epoch`, which will listen in `directory`."""
        heartbeat_path = directory / f"heartbeat-{epoch}"
        setup = Setup(
            config=config,
            factory=factory,
            address=data_address(directory, epoch=epoch),
            heartbeat_path=str(heartbeat_path),
            parent_pid=os.getpid(),
            stuck_seconds=stuck_seconds,
            log_level=logging.getLogger("lfm").getEffectiveLevel(),
        )
        # The child imports what its parent imports, and nothing from the working directory besides.
        paths = os.pathsep.join(map(os.path.abspath, sys.path))
        heartbeat = Heartbeat.create(heartbeat_path, first_within_s=PHASE_S)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lfm.engine.child"),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            limit=MAX_REPORT_BYTES,
            env={**WAIT_ENVIRONMENT, **os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
        )
        engine = cls(process, heartbeat=heartbeat, stuck_seconds=stuck_seconds)
        engine._send(setup)
        return engine

    @property
    def pid(self) -> int:
        return self._process.pid

    def drain(self, seconds: float) -> None:
        """Tell it to finish what runs within `seconds` and to exit."""
        self._send(Drain(seconds))

    def _send(self, command: Setup | Drain) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(command) + b"\n")

    async def watch(self, on_report: OnReport) -> Death:
        """Follow the process until it is dead or stuck, and return the cause."""
        reports = asyncio.create_task(self._read_reports(on_report))
        stuck = asyncio.create_task(self._wait_until_stuck())
        try:
            await asyncio.wait({reports, stuck}, return_when=asyncio.FIRST_COMPLETED)
            return reports.result() if reports.done() else stuck.result()
        finally:
            reports.cancel()
            stuck.cancel()
            await asyncio.gather(reports, stuck, return_exceptions=True)

    async def bury(self, *, after_s: float) -> None:
        """Wait `after_s` for the process to end, kill it if it has not, and free what belongs to it."""
        try:
            await asyncio.wait({asyncio.ensure_future(self._process.wait())}, timeout=after_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self._heartbeat.close()
            assert self._process.stdin is not None
            self._process.stdin.close()
            await asyncio.wait({self._stderr_pump}, timeout=LAST_WORDS_S)
            self._stderr_pump.cancel()
            await asyncio.gather(self._stderr_pump, return_exceptions=True)

    async def _read_reports(self, on_report: OnReport) -> Death:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            report = report_decoder.decode(line)
            if isinstance(report, Failed):
                return Death(to_exception(report), is_reported=True)
            await on_report(report)
        await asyncio.wait({asyncio.ensure_future(self._process.wait())}, timeout=EXIT_S)
        await asyncio.wait({self._stderr_pump}, timeout=LAST_WORDS_S)
        return Death(InternalError(self._describe_exit()), is_reported=False)

    def _describe_exit(self) -> str:
        code = self._process.returncode
        if code is None:
            cause = "the engine process closed its report pipe and did not exit"
        elif code == -signal.SIGKILL:
            cause = "the engine process was killed by SIGKILL, which is what the system does when memory runs out"
        elif code < 0:
            cause = f"the engine process was killed by {signal.Signals(-code).name}"
        else:
            cause = f"the engine process exited with code {code}"
        lines = self._stderr_tail.decode(errors="replace").strip().splitlines()
        return f"{cause} (its last words: {lines[-1].strip()})" if lines else cause

    async def _wait_until_stuck(self) -> Death:
        interval_s = min(self._stuck_seconds / CHECKS_PER_STUCK_TIME, MAX_CHECK_INTERVAL_S)
        broken_promise = None
        while True:
            await asyncio.sleep(interval_s)
            promised_at = self._heartbeat.promised_at
            if not self._heartbeat.is_broken:
                continue
            # Seen twice: if this process was stopped as well, the engine first gets an interval to catch up.
            if promised_at == broken_promise:
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(STACK_DUMP_SIGNAL)
                cause = f"the engine process is stuck: no step has finished for {self._stuck_seconds:g} s"
                return Death(InternalError(cause), is_reported=False)
            broken_promise = promised_at

    async def _pump_stderr(self) -> None:
        assert self._process.stderr is not None
        while data := await self._process.stderr.read(65536):
            self._stderr_tail = (self._stderr_tail + data)[-STDERR_TAIL_BYTES:]
            sys.stderr.write(data.decode(errors="replace"))
            sys.stderr.flush()
