"""What `lfm serve` runs: the port, then the engine process beside one or more API processes, then a clean end.

The port is bound before anything slow starts, and HTTP is served while the model loads, so that probes get an answer.
"""

import asyncio
import logging
import shlex
import socket
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import orjson
import uvloop

from lfm.cli.api_process import ApiProcesses, make_app
from lfm.cli.fit_check import check_before_download
from lfm.cli.terminal import PhaseLine
from lfm.config import EngineConfig, ServerConfig
from lfm.engine.process import EngineClient
from lfm.engine.supervisor import EngineSupervisor
from lfm.model.source import ModelSource, resolve_model
from lfm.protocol import EngineInfo
from lfm.search.config import SearchConfig
from lfm.server.run import ApiServer, bind_socket

logger = logging.getLogger(__name__)

LISTEN_BACKLOG = 2048
ENGINE_EXIT_S = 1.0  # for an engine that has nothing left to do

_T = TypeVar("_T")


class Front(Protocol):
    """Whatever speaks HTTP: this process, or several others."""

    async def serve(self) -> None:
        """Serve until a signal or `begin_drain` has ended it."""

    def begin_drain(self) -> None:
        """Take no new requests, and end when the running ones have ended. Idempotent."""


def run_service(
    engine_config: EngineConfig, server_config: ServerConfig, search_config: SearchConfig | None = None
) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain. Raises LfmError if it cannot start or the engine is beyond help."""
    sock = bind_socket(server_config)
    sock.listen(LISTEN_BACKLOG)
    phases = PhaseLine()
    try:
        check_before_download(engine_config)
        source = resolve_model(engine_config.model, revision=engine_config.revision, on_progress=phases)
        if source.folder is not None:  # a restarted engine must not find another revision
            engine_config = replace(engine_config, model=str(source.folder), revision=None)
        service = _serve(
            engine_config, server_config, search_config or SearchConfig(), source=source, sock=sock, phases=phases
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            was_ready = runner.run(service)
    finally:
        phases.close()
        sock.close()
    if not was_ready:
        raise KeyboardInterrupt


async def _serve(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    search_config: SearchConfig,
    *,
    source: ModelSource,
    sock: socket.socket,
    phases: PhaseLine,
) -> bool:
    """Returns whether the model was loaded before the end."""
    port = sock.getsockname()[1]
    stuck_seconds = server_config.stuck_seconds
    async with EngineSupervisor(engine_config, stuck_seconds=stuck_seconds, on_phase=phases) as supervisor:
        opening = _open_front(
            server_config, supervisor.directory, source=source, sock=sock, search_config=search_config
        )
        async with opening as front:
            serving = asyncio.create_task(front.serve())
            try:
                info = await _unless(serving, supervisor.wait_ready())
                if info is not None:
                    phases.finish(f"{source.name} is loaded")
                    print(welcome(info, server_config, source=source, port=port), flush=True)
                    error = await _unless(serving, supervisor.wait_failed())
                    if error is not None:
                        raise error
            finally:
                front.begin_drain()
                await serving
        await supervisor.drain(ENGINE_EXIT_S)
    return info is not None


async def _unless(serving: asyncio.Task[None], other: Coroutine[Any, Any, _T]) -> _T | None:
    """The result of `other`; None if serving ends before it."""
    task = asyncio.create_task(other)
    try:
        await asyncio.wait({task, serving}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()


@asynccontextmanager
async def _open_front(
    config: ServerConfig,
    directory: Path,
    *,
    source: ModelSource,
    sock: socket.socket,
    search_config: SearchConfig,
) -> AsyncIterator[Front]:
    if config.api_workers > 1:
        yield ApiProcesses(config, directory, source=source, sock=sock, search_config=search_config)
        return
    async with EngineClient(directory) as backend:
        app = make_app(source, config=config, backend=backend, worker=0, search_config=search_config)
        yield _OwnFront(ApiServer(app, config), sock)


class _OwnFront:
    """HTTP in this process, beside the supervisor."""

    def __init__(self, server: ApiServer, sock: socket.socket) -> None:
        self._server = server
        self._sock = sock

    async def serve(self) -> None:
        await self._server.serve(sockets=[self._sock])

    def begin_drain(self) -> None:
        self._server.begin_drain()


def welcome(info: EngineInfo, config: ServerConfig, *, source: ModelSource, port: int) -> str:
    """What a user should know now: the address, the model, what was chosen and why, and a call to try."""
    name = config.served_model_name or source.name
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    lines = [f"Serving {name} at {url}"]
    if source.preset is not None:
        lines.append("  random weights: the answers are noise, for tests and benchmarks")
    lines += [f"  {reason}" for reason in info.reasons]
    return "\n".join([*lines, "", "Try it:", f"  {curl_call(url, name, api_key=config.api_key)}", ""])


def curl_call(url: str, model: str, *, api_key: str | None) -> str:
    """A command that works when pasted. Off the terminal, where it may land in a log, the key stays a variable."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}
    words = ["curl", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    call = shlex.join([*words, "-d", orjson.dumps(body).decode()])
    if api_key is None:
        return call
    shown = (
        shlex.quote(f"Authorization: Bearer {api_key}")
        if sys.stdout.isatty()
        else '"Authorization: Bearer $LFM_API_KEY"'
    )
    return f"{call} -H {shown}"
