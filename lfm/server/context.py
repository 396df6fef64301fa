"""The outermost middleware: request id, the answer to every exception, one access-log line, metrics.

Pure ASGI. An exception becomes a JSON body, or, once an event stream has begun, the event that its API family has for
errors. No traceback ever reaches a client.
"""

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lfm.errors import LfmError, OverloadedError
from lfm.server.asgi import send_json
from lfm.server.dialect import is_anthropic
from lfm.server.errors import (
    ClientLeft,
    GenerationError,
    anthropic_error_body,
    error_body,
    error_headers,
    error_info,
)
from lfm.server.patience import Patience
from lfm.server.state import AppState, RequestRecord, attach_record

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("lfm.server.access")

SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
QUIET_ROUTES = frozenset({"/livez", "/readyz", "/health", "/metrics"})  # probes, every few seconds
CLIENT_LEFT_STATUS = 499  # only in logs and metrics


class RequestContext:
    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = _new_record(Headers(scope=scope), path=scope["path"])
        attach_record(scope, record)
        watched_send = _WatchedSend(send, record, self._state.config.stalled_reader_seconds)
        try:
            await self._app(scope, receive, watched_send)
        except ClientLeft as left:
            await self._close(scope, record, left)
        except LfmError as error:
            await self._answer(error, record, watched_send)
        except Exception as error:  # a bug of ours; the client still gets its answer
            logger.exception("request_id=%s failed", record.request_id)
            await self._answer(error, record, watched_send)
        finally:
            self._finish(record, scope["method"])

    async def _answer(self, error: Exception, record: RequestRecord, send: Send) -> None:
        info = error_info(error, record.request_id)
        if isinstance(error, OverloadedError):
            self._state.metrics.count_rejection(info.code or "overloaded")
        elif isinstance(error, LfmError) and info.status >= 500:
            logger.error("request_id=%s failed: %s", record.request_id, error)
        if isinstance(error, GenerationError):
            self._state.metrics.count_abort("engine")
        record.finish = "error"
        try:
            if not record.is_started:
                body = anthropic_error_body(info, record.request_id) if record.is_anthropic else error_body(info)
                await send_json(send, body, status=info.status, headers=error_headers(info, error))
            elif record.stream_failure is not None:
                await send({"type": "http.response.body", "body": record.stream_failure(info, record.request_id)})
        except ClientLeft:
            record.status = CLIENT_LEFT_STATUS

    async def _close(self, scope: Scope, record: RequestRecord, left: ClientLeft) -> None:
        record.status = CLIENT_LEFT_STATUS
        record.finish = left.cause
        self._state.metrics.count_abort(left.cause)
        if left.cause == "stalled" and "lfm.abort" in scope:
            scope["lfm.abort"]()  # a plain close would wait for its buffer to drain, that is: for ever
            await asyncio.sleep(0)  # the server notes the loss before it asks why no response was completed

    def _finish(self, record: RequestRecord, method: str) -> None:
        duration_s = time.monotonic() - record.started_s
        metrics = self._state.metrics
        metrics.count_http(record.route, record.status)
        if record.is_complete and record.first_token_s is not None:
            metrics.request_s.observe(duration_s)
        access_logger.log(
            logging.DEBUG if record.route in QUIET_ROUTES else logging.INFO,
            "request_id=%s method=%s route=%s status=%d duration_ms=%.1f ttft_ms=%s prompt_tokens=%d cached_tokens=%d "
            "completion_tokens=%d finish=%s retry=%s",
            record.request_id,
            method,
            record.route,
            record.status,
            duration_s * 1e3,
            "-" if record.first_token_s is None else f"{record.first_token_s * 1e3:.1f}",
            record.num_prompt_tokens,
            record.num_cached_tokens,
            record.num_output_tokens,
            record.finish,
            record.retry_count,
        )


class _WatchedSend:
    """Adds X-Request-Id, notes how far the response is, and gives up on a reader that takes nothing."""

    def __init__(self, send: Send, record: RequestRecord, stalled_s: float) -> None:
        self._send = send
        self._record = record
        self._patience = Patience(stalled_s)

    async def __call__(self, message: Message) -> None:
        record = self._record
        if message["type"] == "http.response.start":
            names = (b"x-request-id", b"request-id") if record.is_anthropic else (b"x-request-id",)
            message["headers"] = [*message["headers"], *((name, record.request_id.encode()) for name in names)]
            record.status = message["status"]
            record.is_started = True
        elif not message.get("more_body", False):
            record.is_complete = True
        try:
            await self._patience.wait(self._send(message))
        except TimeoutError:
            record.is_complete = False
            raise ClientLeft("stalled") from None


def _new_record(headers: Headers, *, path: str) -> RequestRecord:
    """A client's own request id is echoed if it is short and plain; it labels logs and nothing else."""
    given = headers.get("x-request-id", "")
    retry_count = headers.get("x-stainless-retry-count", "0")
    return RequestRecord(
        request_id=given if SANE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}",
        started_s=time.monotonic(),
        retry_count=retry_count if re.fullmatch(r"[0-9]{1,3}", retry_count) else "0",
        is_anthropic=is_anthropic(path),
    )
