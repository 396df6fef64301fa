"""Keeps one engine process alive: starts it, tells every API process how it is, restarts it, gives up in the end.

    async with EngineSupervisor(config, stuck_seconds=60.0) as supervisor:
        info = await supervisor.wait_ready()          # raises what the engine process raised while it loaded
        client = EngineClient(supervisor.directory)   # here, or in any other process of the same user
        error = await supervisor.wait_failed()        # returns only when no restart will follow

It runs in the process that owns the service, and imports no torch.
"""

import asyncio
import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from lfm.config import EngineConfig
from lfm.engine.spawn import EXIT_S, STACK_DUMP_S, Death, EngineProcess
from lfm.engine.status import StatusBoard
from lfm.engine.wire import EngineStatus, Phase, Ready, Report, status_address
from lfm.errors import InternalError, LfmError, MachineError
from lfm.protocol import EngineInfo

logger = logging.getLogger(__name__)

ENGINE_FACTORY = "lfm.engine.build:build_engine"
MAX_SOCKET_PATH_BYTES = 100  # Linux allows 107, macOS 103
SOCKET_NAME_BYTES = len("/lfm-12345678/engine-1000000")
UNKNOWN_LOAD_S = 10.0  # what clients are told to wait before a first load has been measured


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """A dead engine is started again after a delay that doubles, until `max_failures` fall into `window_s`."""

    max_failures: int = 5
    window_s: float = 600.0
    first_delay_s: float = 0.5
    max_delay_s: float = 30.0

    def delay_s(self, num_failures: int) -> float:
        """Seconds to wait before the restart that follows failure number `num_failures` of the window."""
        return min(self.max_delay_s, self.first_delay_s * 2.0 ** (num_failures - 1))


class EngineSupervisor:
    """Owner of the engine process and of the directory (mode 0700) with the sockets.

    `stuck_seconds` without progress count as death. `on_phase` gets one line for each phase of a load. An error that
    the engine process reports during its first load is final; any other death is followed by a restart.
    Make it inside the event loop of a thread that lives as long as the service.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        stuck_seconds: float,
        on_phase: Callable[[str], None] = lambda text: None,
        restart: RestartPolicy = RestartPolicy(),
        factory: str = ENGINE_FACTORY,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._config = config
        self._stuck_seconds = stuck_seconds
        self._on_phase = on_phase
        self._restart = restart
        self._factory = factory
        self._epoch = 0
        self._engine: EngineProcess | None = None
        self._failures: deque[float] = deque()
        self._load_s = UNKNOWN_LOAD_S
        self._is_draining = False
        self._first_info: asyncio.Future[EngineInfo] = loop.create_future()
        self._final_error: asyncio.Future[LfmError] = loop.create_future()
        self.directory = make_socket_directory()
        status = EngineStatus(epoch=0, reason="the engine starts", retry_after_s=UNKNOWN_LOAD_S)
        self._board = StatusBoard(status_address(self.directory), status=status)
        self._life = asyncio.create_task(self._keep_alive())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def engine_pid(self) -> int | None:
        """The engine process's id, None while there is none."""
        return self._engine.pid if self._engine else None

    async def wait_ready(self) -> EngineInfo:
        """Wait for the first load. Raises the LfmError that ended it, with its own class and message."""
        either: set[asyncio.Future[EngineInfo] | asyncio.Future[LfmError]] = {self._first_info, self._final_error}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._final_error.done():
            raise self._final_error.result()
        return self._first_info.result()

    async def wait_failed(self) -> LfmError:
        """Wait until restarting is given up, and return the error with the last cause (`serve` exits with its code)."""
        return await asyncio.shield(self._final_error)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, let the running ones finish for `seconds`, abort the rest, end the engine process."""
        self._is_draining = True
        if self._engine is not None and self._board.status.info is not None:
            status = msgspec.structs.replace(self._board.status, is_accepting=False, reason="shutting down")
            await self._board.publish(status)
            self._engine.drain(seconds)
            await asyncio.wait({self._life}, timeout=seconds + EXIT_S)
        await self._end_life("shut down")

    async def aclose(self) -> None:
        """Kill the engine process if it still runs, and remove the directory. Idempotent."""
        self._is_draining = True
        await self._end_life("shut down")
        await self._board.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def _end_life(self, reason: str) -> None:
        self._life.cancel()
        await asyncio.gather(self._life, return_exceptions=True)
        if not self._board.status.is_final:
            await self._board.publish(EngineStatus(epoch=self._epoch, reason=reason, is_final=True))

    async def _keep_alive(self) -> None:
        try:
            while not self._final_error.done() and not self._is_draining:
                self._epoch += 1
                delay_s = await self._live_once()
                await asyncio.sleep(delay_s)
        except Exception as error:  # ours, and the service must not go on without a supervisor
            logger.exception("the supervisor failed")
            await self._give_up(InternalError(f"The supervisor of the engine failed: {error}"))

    async def _live_once(self) -> float:
        """One life of an engine process, from its start to its burial. Returns the seconds until the next one."""
        started_at = time.monotonic()

        async def on_report(report: Report) -> None:
            match report:
                case Phase(text):
                    await self._report_phase(text)
                case Ready(info):
                    self._load_s = time.monotonic() - started_at
                    await self._report_ready(info)

        await self._publish_waiting("the model is loading", wait_s=self._load_s)
        self._engine = await EngineProcess.start(
            self._config,
            factory=self._factory,
            directory=self.directory,
            epoch=self._epoch,
            stuck_seconds=self._stuck_seconds,
        )
        try:
            death = await self._engine.watch(on_report)
            return 0.0 if self._is_draining else await self._report_death(death)
        finally:
            engine, self._engine = self._engine, None
            await engine.bury(after_s=STACK_DUMP_S)

    async def _report_phase(self, text: str) -> None:
        self._on_phase(text)
        if self._board.status.info is None:
            await self._publish_waiting(text, wait_s=self._load_s)

    async def _report_ready(self, info: EngineInfo) -> None:
        logger.info("engine process %d is ready after %.1f s", self._epoch, self._load_s)
        await self._board.publish(EngineStatus(epoch=self._epoch, reason=None, info=info))
        if not self._first_info.done():
            self._first_info.set_result(info)

    async def _report_death(self, death: Death) -> float:
        """Tell every API process at once. Returns the seconds until the restart."""
        now = time.monotonic()
        while self._failures and now - self._failures[0] > self._restart.window_s:
            self._failures.popleft()
        self._failures.append(now)
        num_failures = len(self._failures)
        if death.is_reported and not self._first_info.done():  # whoever waits for the first load shows the error
            await self._give_up(death.error)
            return 0.0
        logger.error("engine process %d failed (%d of late): %s", self._epoch, num_failures, death.error)
        if num_failures >= self._restart.max_failures:
            minutes = self._restart.window_s / 60
            text = f"The engine failed {num_failures} times in {minutes:g} minutes. The last cause: {death.error}"
            await self._give_up(InternalError(text))
            return 0.0
        delay_s = self._restart.delay_s(num_failures)
        reason = f"the engine failed and restarts in {delay_s:g} s"  # the cause is for the log, not for the network
        await self._publish_waiting(reason, wait_s=delay_s + self._load_s)
        return delay_s

    async def _give_up(self, error: LfmError) -> None:
        await self._board.publish(EngineStatus(epoch=self._epoch, reason="the engine cannot run", is_final=True))
        self._final_error.set_result(error)

    async def _publish_waiting(self, reason: str, *, wait_s: float) -> None:
        await self._board.publish(EngineStatus(epoch=self._epoch, reason=reason, retry_after_s=wait_s))


def make_socket_directory() -> Path:
    """A fresh directory of mode 0700 whose socket paths fit into the system's limit. Raises MachineError."""
    bases = [tempfile.gettempdir(), "/tmp"]
    for base in bases:
        if len(os.fsencode(base)) + SOCKET_NAME_BYTES <= MAX_SOCKET_PATH_BYTES and os.access(base, os.W_OK):
            return Path(tempfile.mkdtemp(prefix="lfm-", dir=base))
    raise MachineError(
        f"No folder for sockets: {' and '.join(bases)} have too long a name or cannot be written to. "
        "Set TMPDIR to a writable folder with a short name."
    )
