"""`--api-workers N`: several API processes on one listening socket, each with its own event loop and engine client.

The parent keeps the socket, the engine's supervisor and this list of processes. A worker gets its settings on stdin,
drains at SIGTERM, and dies with its parent; one that dies by itself is replaced.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import msgspec
import uvloop
from starlette.applications import Starlette

from lfm.chat.defaults import defaults_for_source
from lfm.chat.tokenizer import Tokenizer
from lfm.config import ServerConfig
from lfm.engine.client import EngineBackend
from lfm.engine.lifeline import follow_parent
from lfm.engine.process import EngineClient
from lfm.model.source import ModelSource, resolve_model
from lfm.search.config import SearchConfig
from lfm.server.app import create_app
from lfm.server.run import serve
from lfm.server.search_service import SearchService

logger = logging.getLogger(__name__)

RESTART_S = 1.0
EXIT_S = 10.0  # for a worker that has drained and only has to end


class WorkerSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told on stdin: the keys in it must not be seen in a list of processes."""

    config: ServerConfig
    search_config: SearchConfig
    model: str
    model_name: str
    directory: str
    socket_fd: int
    worker: int
    parent_pid: int
    log_level: int


def make_app(
    source: ModelSource,
    *,
    config: ServerConfig,
    backend: EngineBackend,
    worker: int,
    search_config: SearchConfig,
    name: str | None = None,
) -> Starlette:
    """The app of one API process. `name` None: the configured name, else the model's own."""
    return create_app(
        backend=backend,
        tokenizer=Tokenizer.for_source(source.folder, source.config),
        model_config=source.config,
        model_name=name or config.served_model_name or source.name,
        defaults=defaults_for_source(source.folder, source.config),
        config=config,
        worker=worker,
        search=SearchService(search_config),
    )


class ApiProcesses:
    """Starts the workers, replaces dead ones, and ends them all."""

    def __init__(
        self,
        config: ServerConfig,
        directory: Path,
        *,
        source: ModelSource,
        sock: socket.socket,
        search_config: SearchConfig,
    ) -> None:
        self._config = config
        self._search_config = search_config
        self._directory = directory
        self._source = source
        self._sock = sock
        self._processes: dict[int, Process] = {}
        self._draining = asyncio.Event()

    async def serve(self) -> None:
        """Serve until a signal or `begin_drain` has ended every worker."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            await asyncio.gather(*(self._keep(worker) for worker in range(self._config.api_workers)))
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def begin_drain(self) -> None:
        """Have every worker take no new requests and end with its last one. Idempotent."""
        if not self._draining.is_set():
            self._draining.set()
            self._terminate_all()

    def _on_signal(self) -> None:
        if self._draining.is_set():
            self._terminate_all()  # a second SIGTERM tells a worker to cut its requests off
        self.begin_drain()

    def _terminate_all(self) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                process.terminate()

    async def _keep(self, worker: int) -> None:
        while not self._draining.is_set():
            process = await self._start(worker)
            if self._draining.is_set():
                process.terminate()
            code = await process.wait()
            if not self._draining.is_set():
                logger.error("API process %d exited with code %d; a new one starts", worker, code)
                await asyncio.wait({asyncio.ensure_future(self._draining.wait())}, timeout=RESTART_S)

    async def _start(self, worker: int) -> Process:
        setup = WorkerSetup(
            config=self._config,
            search_config=self._search_config,
            model=self._source.name if self._source.folder is None else str(self._source.folder),
            model_name=self._config.served_model_name or self._source.name,
            directory=str(self._directory),
            socket_fd=self._sock.fileno(),
            worker=worker,
            parent_pid=os.getpid(),
            log_level=logging.getLogger("lfm").getEffectiveLevel(),
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lfm.cli.api_process"),
            stdin=PIPE,
            pass_fds=[self._sock.fileno()],
            start_new_session=True,  # Ctrl-C reaches the parent only, which then tells the workers once
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "PYTHONSAFEPATH": "1"},
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(setup))
        process.stdin.close()
        self._processes[worker] = process
        return process


def main() -> None:
    """Run one worker: `python -m lfm.cli.api_process`, with its WorkerSetup on stdin."""
    setup = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerSetup)
    follow_parent(setup.parent_pid)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("lfm").setLevel(setup.log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_work(setup))


async def _work(setup: WorkerSetup) -> None:
    source = resolve_model(setup.model)
    sock = socket.socket(fileno=setup.socket_fd)
    async with EngineClient(Path(setup.directory)) as backend:
        app = make_app(
            source,
            config=setup.config,
            backend=backend,
            worker=setup.worker,
            search_config=setup.search_config,
            name=setup.model_name,
        )
        await serve(app, setup.config, sock=sock)


if __name__ == "__main__":
    main()
