"""What the tests of the engine process share: requests, deadlines, an engine in a thread, an engine in a process."""

import asyncio
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path

import zmq

from lfm.config import EngineConfig
from lfm.engine.loop import CommandPipe, EngineLoop, open_router
from lfm.engine.process import EngineClient
from lfm.engine.status import StatusBoard
from lfm.engine.stream import RequestStream, join_events
from lfm.engine.supervisor import EngineSupervisor, RestartPolicy
from lfm.engine.wire import MAX_REQUEST_FRAME_BYTES, EngineStatus, data_address, status_address
from lfm.protocol import EngineRequest, SamplingParams, TokenEvent
from tests.engine_process.fakes import COUNT, FakeEngine

FAKE_FACTORY = "tests.engine_process.fakes:build_fake"
DEADLINE_S = 30.0
QUICK_RESTART = RestartPolicy(first_delay_s=0.05)


def run(scenario: Coroutine[None, None, None]) -> None:
    """Run an async test with a deadline."""
    asyncio.run(asyncio.wait_for(scenario, 100))


def request(request_id: str, *, kind: int = COUNT, max_tokens: int = 5) -> EngineRequest:
    return EngineRequest(
        request_id=request_id, prompt_ids=[kind, 11, 12], sampling=SamplingParams(max_tokens=max_tokens)
    )


async def read_all(stream: RequestStream) -> dict[str, TokenEvent]:
    """Everything that the stream still says, one joined event per request."""
    joined: dict[str, TokenEvent] = {}
    while events := await stream.next_events():
        for event in events:
            earlier = joined.get(event.request_id)
            joined[event.request_id] = event if earlier is None else join_events(earlier, event)
    return joined


async def eventually(is_true: Callable[[], bool], *, within_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline, "did not become true in time"
        await asyncio.sleep(0.005)


class LoopInThread:
    """An EngineLoop over a FakeEngine, driven by a thread of this process."""

    def __init__(self, engine: FakeEngine, directory: Path, *, epoch: int = 1) -> None:
        self.engine = engine
        self.address = data_address(directory, epoch=epoch)
        self.num_promises = 0
        self.error: Exception | None = None
        self._command_read, self.command_write = os.pipe()
        self._context = zmq.Context()
        router = open_router(self._context, self.address, max_request_bytes=MAX_REQUEST_FRAME_BYTES)
        self.router = router
        self._loop = EngineLoop(
            engine,
            router,
            commands=CommandPipe(self._command_read),
            on_progress=self._promise,
            idle_poll_s=0.05,
        )
        self.thread = threading.Thread(target=self._run)

    @property
    def num_barren_steps(self) -> int:
        """Steps in a row that got nothing done."""
        return self._loop.num_barren

    def _promise(self) -> None:
        self.num_promises += 1

    def _run(self) -> None:
        try:
            self._loop.run()
        except Exception as error:  # noqa: BLE001  handed to the test
            self.error = error
        finally:
            self.router.close()
            self._context.term()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.command_write)
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        os.close(self._command_read)


@contextlib.contextmanager
def socket_directory() -> Iterator[Path]:
    """Short enough for socket paths, which pytest's tmp_path may not be."""
    with tempfile.TemporaryDirectory(prefix="lfm-test-", dir="/tmp") as name:
        yield Path(name)


@contextlib.contextmanager
def looping(engine: FakeEngine) -> Iterator[LoopInThread]:
    with socket_directory() as directory:
        loop = LoopInThread(engine, directory)
        loop.thread.start()
        try:
            yield loop
        finally:
            loop.close()


@contextlib.asynccontextmanager
async def connected(engine: FakeEngine) -> AsyncIterator[tuple[LoopInThread, EngineClient]]:
    """An EngineClient of an engine loop in a thread, with a status board in place of the supervisor."""
    with looping(engine) as loop:
        directory = Path(loop.address.removeprefix("ipc://")).parent
        status = EngineStatus(epoch=1, reason=None, info=engine.info)
        board = StatusBoard(status_address(directory), status=status)
        try:
            async with EngineClient(directory) as client:
                await client.wait_ready()
                yield loop, client
        finally:
            await board.close()


@contextlib.asynccontextmanager
async def supervised(
    model: str = "fake:",
    *,
    stuck_seconds: float = 20.0,
    restart: RestartPolicy = QUICK_RESTART,
    on_phase: Callable[[str], None] = lambda text: None,
) -> AsyncIterator[tuple[EngineSupervisor, EngineClient]]:
    """A fake engine in a process of its own, with a supervisor and a client here."""
    opening = EngineSupervisor(
        EngineConfig(model=model),
        stuck_seconds=stuck_seconds,
        on_phase=on_phase,
        restart=restart,
        factory=FAKE_FACTORY,
    )
    async with opening as supervisor, EngineClient(supervisor.directory) as client:
        yield supervisor, client
