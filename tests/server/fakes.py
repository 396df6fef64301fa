"""An engine of a few lines, and apps and servers around it."""

import asyncio
import contextlib
import functools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from starlette.applications import Starlette

from lfm.chat.defaults import SamplingDefaults
from lfm.chat.tokenizer import Tokenizer
from lfm.config import ModelConfig, ServerConfig
from lfm.engine.grammar_library import TokenTable
from lfm.engine.grammar_masks import token_table
from lfm.engine.grammar_worker import try_grammar
from lfm.engine.validate import validate
from lfm.errors import LfmError, OverloadedError, RequestError
from lfm.protocol import EngineInfo, EngineRequest, EngineStats, GrammarSpec, TokenEvent, TokenLogprob
from lfm.server.app import create_app
from lfm.server.grammars import Trial
from lfm.server.run import ApiServer, bind_socket
from lfm.server.search_service import SearchService
from lfm.server.state import AppState
from lfm.service.responses_store import ResponsesStore
from tests.waiting import wait_until

MODEL_CONFIG = ModelConfig(
    model_type="lfm2",
    vocab_size=512,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    layer_types=("conv",),
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_dense_layers=1,
    max_position_embeddings=4096,
)
TOKENIZER = Tokenizer.byte_level(MODEL_CONFIG)
MODEL = "LiquidAI/LFM2-24B-A2B"
DEFAULTS = SamplingDefaults(temperature=0.1, top_k=50, repetition_penalty=1.05, origin="the tests")
MAX_MODEL_LEN = 2048
EOS = TOKENIZER.special.im_end
CHAT_PATH = "/v1/chat/completions"


def engine_info(
    *, max_queue: int = 4096, max_running: int = 8, num_blocks: int = 1000, max_model_len: int = MAX_MODEL_LEN
) -> EngineInfo:
    return EngineInfo(
        model_type="lfm2",
        vocab_size=512,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        block_size=16,
        max_running=max_running,
        max_queue=max_queue,
        device="cpu",
        dtype="float32",
        load_s=3.2,
    )


class FakeStream:
    """Each read gives one token of every running sequence, unless the backend is held; `push` adds events by hand."""

    def __init__(self, backend: "FakeBackend", requests: Sequence[EngineRequest]) -> None:
        self._backend = backend
        self.requests = list(requests)
        self.running = {request.request_id: request for request in requests}
        self._num_sent = dict.fromkeys(self.running, 0)
        self._pushed: list[TokenEvent] = []
        self._wakes = asyncio.Event()
        self._wakes.set()
        self.is_closed = False

    async def next_events(self) -> list[TokenEvent]:
        self._backend.num_reads += 1
        while self.running:
            if self._pushed:
                events, self._pushed = self._pushed, []
                for event in events:
                    if event.finish_reason is not None:
                        self.running.pop(event.request_id, None)
                return events
            if not self._backend.is_held:
                await asyncio.sleep(0)
                return [self._next_event(request) for request in list(self.running.values())]
            self._wakes.clear()
            await self._wakes.wait()
        return []

    def push(self, *events: TokenEvent) -> None:
        self._pushed += events
        self.wake()

    def wake(self) -> None:
        self._wakes.set()

    async def abort(self, request_id: str) -> None:
        if self.running.pop(request_id, None) is not None:
            self._backend.aborted.append(request_id)
        self.wake()

    async def aclose(self) -> None:
        self.is_closed = True
        for request_id in list(self.running):
            await self.abort(request_id)

    def _next_event(self, request: EngineRequest) -> TokenEvent:
        sampling = request.sampling
        position = self._num_sent[request.request_id]
        script = self._backend.script(request)
        token_id = script[position] if position < len(script) else EOS
        self._num_sent[request.request_id] += 1
        reason = "stop" if token_id in sampling.stop_token_ids else None
        if reason is None and position + 1 >= sampling.max_tokens:
            reason = "length"
        if reason is not None:
            del self.running[request.request_id]
        is_first = position == 0
        wants_prompt = is_first and sampling.prompt_logprobs is not None
        return TokenEvent(
            request_id=request.request_id,
            token_ids=[token_id],
            logprobs=[] if sampling.logprobs is None else [scored(token_id, sampling.logprobs)],
            prompt_logprobs=prompt_scores(request) if wants_prompt else None,
            num_cached_tokens=self._backend.num_cached_tokens if is_first else None,
            finish_reason=reason,
        )


def scored(token_id: int, num_top: int) -> TokenLogprob:
    top = [(token_id, -0.5), *[(100 + i, -1.0 - i) for i in range(num_top - 1)]]
    return TokenLogprob(token_id, -0.5, top[:num_top])


def prompt_scores(request: EngineRequest) -> list[TokenLogprob | None]:
    num_top = request.sampling.prompt_logprobs
    assert num_top is not None
    return [None, *(scored(token_id, num_top) for token_id in request.prompt_ids[1:])]


class FakeBackend:
    """Checks sequences as the engine does, then answers each with `text` and an EOS.

    `refusal` is raised by submits; `is_held` stops all output.
    """

    def __init__(self, text: str = "Hello!", *, info: EngineInfo | None = None) -> None:
        self.text = text
        self.reason: str | None = None
        self.engine_info: EngineInfo | None = info or engine_info()
        self.refusal: LfmError | None = None
        self.is_held = False
        self.is_submit_held = False
        self.num_cached_tokens = 0
        self.num_reads = 0
        self.streams: list[FakeStream] = []
        self.requests: list[EngineRequest] = []  # every sequence that was submitted and not refused
        self.aborted: list[str] = []
        self.num_cancelled_submits = 0
        self.engine_stats = EngineStats(num_running=2, num_blocks=100, num_blocks_used=25, prompt_tokens=7)

    @property
    def info(self) -> EngineInfo:
        if self.engine_info is None:
            raise OverloadedError("loading weights", retry_after_s=12.0)
        return self.engine_info

    @property
    def not_ready_reason(self) -> str | None:
        return self.reason

    def stats(self) -> EngineStats:
        return self.engine_stats

    def script(self, request: EngineRequest) -> list[int]:
        return TOKENIZER.encode_raw(self.text)[1:]

    async def submit(self, requests: Sequence[EngineRequest]) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        info = self.info
        for request in requests:
            validate(
                request,
                vocab_size=info.vocab_size,
                num_ids=TOKENIZER.num_ids,
                max_model_len=info.max_model_len,
                num_cache_tokens=info.num_blocks * info.block_size,
            )
        self.requests += requests
        stream = FakeStream(self, requests)
        self.streams.append(stream)
        if self.is_submit_held:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.num_cancelled_submits += 1
                raise
        return stream

    def release(self) -> None:
        self.is_held = False
        for stream in self.streams:
            stream.wake()


@functools.cache
def _table() -> TokenTable:
    return token_table(TOKENIZER, vocab_size=512)


@functools.cache
def _compiled_table() -> Any:
    return _table().compiled()


class TrialHere:
    """Tries grammars in this process, which takes far less time. What could crash it is for the real one."""

    def __init__(self) -> None:
        self.tried: list[GrammarSpec] = []

    def has_passed(self, spec: GrammarSpec) -> bool:
        return False

    def check(self, spec: GrammarSpec, *, param: str) -> None:
        self.tried.append(spec)
        error = try_grammar(_compiled_table(), spec.text, stop_ids=frozenset(_table().stop_ids))
        if error is not None:
            raise RequestError(f"{param} makes a grammar that cannot be used: {error}.", param=param)

    def close(self) -> None:
        pass


def make_app(
    backend: FakeBackend,
    config: ServerConfig | None = None,
    *,
    model_name: str = MODEL,
    responses: ResponsesStore | None = None,
    search: SearchService | None = None,
    trial: Trial | None = None,
) -> Starlette:
    """Responses are stored only if there is a store for them: no test may write into the user's own."""
    return create_app(
        backend=backend,
        tokenizer=TOKENIZER,
        model_config=MODEL_CONFIG,
        model_name=model_name,
        defaults=DEFAULTS,
        config=config or ServerConfig(),
        responses=responses or ResponsesStore(Path("/dev/null/responses.sqlite3")),
        search=search,
        grammar_trial=trial or TrialHere(),
    )


def state_of(app: Starlette) -> AppState:
    state = app.state.lfm
    assert isinstance(state, AppState)
    return state


@dataclass(slots=True)
class AppClient:
    """Calls an app in process, in a new event loop per call."""

    backend: FakeBackend = field(default_factory=FakeBackend)
    config: ServerConfig = field(default_factory=ServerConfig)
    responses: ResponsesStore | None = None
    search: SearchService | None = None
    trial: Trial = field(default_factory=TrialHere)
    app: Starlette = field(init=False)

    def __post_init__(self) -> None:
        self.app = make_app(self.backend, self.config, responses=self.responses, search=self.search, trial=self.trial)

    def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        async def call() -> httpx2.Response:
            transport = httpx2.ASGITransport(app=self.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, **options)

        return asyncio.run(asyncio.wait_for(call(), timeout=30))

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: object, **options: Any) -> httpx2.Response:
        return self.request("POST", path, json=body, **options)

    def chat(self, **fields: Any) -> httpx2.Response:
        return self.post(CHAT_PATH, chat_body(**fields))

    def complete(self, **fields: Any) -> httpx2.Response:
        return self.post("/v1/completions", {"model": MODEL, "prompt": "abc", **fields})


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **fields}


def named_events_of(response: httpx2.Response) -> list[dict[str, Any]]:
    """The JSON of each event of a stream whose events have names: always the `type` of their data."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.split("\n\n"):
        if block and not block.startswith(":") and block != "data: [DONE]":
            name, data = block.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
    return events


def events_of(response: httpx2.Response) -> list[dict[str, Any]]:
    """The JSON of each event of a stream, whose last one must be [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


@dataclass(slots=True)
class RunningServer:
    """A real uvicorn in a thread; `call` runs a function in its event loop."""

    url: str
    server: ApiServer
    backend: FakeBackend
    app: Starlette
    thread: threading.Thread
    loop: asyncio.AbstractEventLoop

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def call(self, function: Callable[[], object]) -> None:
        done = threading.Event()

        def run() -> None:
            function()
            done.set()

        self.loop.call_soon_threadsafe(run)
        assert done.wait(10)


@contextlib.contextmanager
def serving(
    backend: FakeBackend,
    config: ServerConfig | None = None,
    *,
    responses: ResponsesStore | None = None,
    search: SearchService | None = None,
) -> Iterator[RunningServer]:
    """Serve an app on a free port until the block ends."""
    config = config or ServerConfig(port=0)
    app = make_app(backend, config, responses=responses, search=search)
    server = ApiServer(app, config)
    sock = bind_socket(config)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[sock])

    def run_in_thread() -> None:
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:  # uvloop, as in production
            runner.run(run())

    thread = threading.Thread(target=run_in_thread)
    thread.start()
    try:
        wait_until(lambda: server.started, what="the start of the server")
        yield RunningServer(url=url, server=server, backend=backend, app=app, thread=thread, loop=loops[0])
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def http_scope(path: str, *, headers: Sequence[tuple[bytes, bytes]] = ()) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), *headers],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("localhost", 80),
        "client": ("127.0.0.1", 1),
    }


class AsgiCall:
    """One request to an app, with the server's part played by hand: what is received, and when a send gets through."""

    def __init__(self, app: Starlette, body: dict[str, Any] | None = None, *, path: str = CHAT_PATH) -> None:
        self._app = app
        self._scope = http_scope(path)
        self._received: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[Any] = []
        self.is_writable = asyncio.Event()
        self.is_writable.set()
        self.num_blocked_sends = 0
        if body is not None:
            self.receive({"type": "http.request", "body": json.dumps(body).encode()})

    def receive(self, message: dict[str, Any]) -> None:
        self._received.put_nowait(message)

    def disconnect(self) -> None:
        self.receive({"type": "http.disconnect"})

    async def run(self) -> None:
        await asyncio.wait_for(self._app(self._scope, self._received.get, self._send), timeout=20)

    async def _send(self, message: Any) -> None:
        if not self.is_writable.is_set():
            self.num_blocked_sends += 1
            await self.is_writable.wait()
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def is_complete(self) -> bool:
        return len(self.sent) > 1 and not self.sent[-1].get("more_body", False)


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until `condition` holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the conditions are plain values of the fakes
            await asyncio.sleep(0)
