"""What the routes of one app share (`AppState`) and what is known about one request (`RequestRecord`).

Nothing here is global: two apps in one process have two states.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import Scope

from lfm.chat.defaults import SamplingDefaults
from lfm.chat.tokenizer import Tokenizer
from lfm.config import ModelConfig, ServerConfig
from lfm.engine.client import EngineBackend
from lfm.errors import OverloadedError
from lfm.protocol import ErrorInfo
from lfm.server.errors import SHUTTING_DOWN
from lfm.server.grammars import Grammars
from lfm.server.metrics import Metrics
from lfm.server.search_service import SearchService
from lfm.service.responses_store import ResponsesStore

_RECORD_KEY = "lfm.record"


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One HTTP request: what the access log and the metrics say about it at its end. Never any text of it."""

    request_id: str
    started_s: float  # time.monotonic()
    retry_count: str = "0"
    route: str = "unknown"
    status: int = 0
    is_started: bool = False  # the response's status line is out
    is_complete: bool = False  # its last byte was handed to the server
    stream_failure: Callable[[ErrorInfo, str], bytes] | None = None  # how its event stream tells of an error
    is_anthropic: bool = False  # errors and headers in Anthropic's form
    owner: str = ""  # a digest of its API key, empty on a server without one
    first_token_s: float | None = None  # seconds after the start
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    finish: str = "-"


@dataclass(slots=True, kw_only=True, eq=False)
class AppState:
    """The engine, the tokenizer and the settings behind one app, and whether it still takes requests."""

    backend: EngineBackend
    tokenizer: Tokenizer
    model_config: ModelConfig
    model_name: str
    defaults: SamplingDefaults
    config: ServerConfig
    metrics: Metrics
    responses: ResponsesStore
    grammars: Grammars
    search: SearchService
    packing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))  # large documents: one at a time
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    works: set[asyncio.Task[None]] = field(default_factory=set)  # generations in flight

    def check_ready(self) -> None:
        """Raises OverloadedError while loading, stuck, restarting or draining."""
        if self.is_draining:
            raise self.draining_error()
        reason = self.backend.not_ready_reason
        if reason is not None:
            raise self.not_ready_error(reason)

    def not_ready_error(self, reason: str) -> OverloadedError:
        """The wait: `info` knows its own while nothing is loaded; afterwards a restart costs what the load cost."""
        try:
            retry_after_s = self.backend.info.load_s
        except OverloadedError as error:
            retry_after_s = error.retry_after_s
        message = f"The engine is not ready: {reason}. Try again later."
        return OverloadedError(message, retry_after_s=retry_after_s, code="not_ready")

    def draining_error(self) -> OverloadedError:
        return OverloadedError(
            "The server is shutting down. Try again later, or another replica now.",
            retry_after_s=self.config.drain_seconds,
            code=SHUTTING_DOWN,
        )

    def cut_off(self) -> None:
        """End every generation in flight now: the time to drain is over."""
        for task in self.works:
            task.cancel()


def record_of(scope: Scope) -> RequestRecord:
    record = scope[_RECORD_KEY]
    assert isinstance(record, RequestRecord)
    return record


def attach_record(scope: Scope, record: RequestRecord) -> None:
    scope[_RECORD_KEY] = record
