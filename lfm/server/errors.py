"""Errors on the wire: which exception gets which status, and the one shape of every error body.

A route raises; `lfm.server.context` answers. Our own bugs never show more than a fixed sentence and the request id.
"""

import math

import msgspec
from starlette.exceptions import HTTPException

from lfm.errors import LfmError, NotFoundError, OverloadedError, RequestError
from lfm.protocol import ErrorInfo

Headers = list[tuple[bytes, bytes]]

SHUTTING_DOWN = "shutting_down"  # the code of every answer of a draining server
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}


class UnauthorizedError(RequestError):
    """HTTP 401: the key is missing or wrong."""

    status = 401
    type = "authentication_error"


class ForbiddenError(RequestError):
    """HTTP 403: the Host or Origin header names a place that this server does not answer for."""

    status = 403
    type = "permission_error"


class MethodNotAllowedError(RequestError):
    """HTTP 405: the path exists, but not for this method. `allowed` goes into the Allow header."""

    status = 405

    def __init__(self, message: str, *, allowed: str) -> None:
        super().__init__(message, code="method_not_allowed")
        self.allowed = allowed


class BodyTooLargeError(RequestError):
    """HTTP 413."""

    status = 413


class HeadersTooLargeError(RequestError):
    """HTTP 431."""

    status = 431


class GenerationError(LfmError):
    """A sequence ended in an error or was aborted by the engine, as told by its terminal event."""

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info.message)
        self.info = info


class ClientLeft(Exception):
    """The client closed its connection, or took nothing for too long; there is nobody to answer.

    `cause` is "disconnect" or "stalled"; it labels the metric and the access log.
    """

    def __init__(self, cause: str = "disconnect") -> None:
        super().__init__(cause)
        self.cause = cause


def error_info(error: Exception, request_id: str) -> ErrorInfo:
    """What a client may know about `error`; anything unforeseen becomes a fixed sentence with the request id."""
    if isinstance(error, GenerationError):
        return error.info
    if isinstance(error, RequestError):
        return ErrorInfo(
            message=error.message,
            type=error.type,
            param=error.param,
            code=error.code,
            status=error.status,
            retry_after_s=error.retry_after_s if isinstance(error, OverloadedError) else None,
        )
    return ErrorInfo(
        message=f"The server failed to handle this request. It is our fault; report it with request id {request_id}.",
        code="internal_error",
    )


def error_body(info: ErrorInfo) -> dict[str, dict[str, str | None]]:
    return {"error": {"message": info.message, "type": info.type, "param": info.param, "code": info.code}}


def anthropic_error_body(info: ErrorInfo, request_id: str) -> dict[str, object]:
    """The same in Anthropic's envelope; its clients tell errors apart by `type`."""
    kind = ANTHROPIC_TYPES.get(info.status, "invalid_request_error" if info.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": info.message}, "request_id": request_id}


def error_headers(info: ErrorInfo, error: Exception) -> Headers:
    """The headers that an error demands: Retry-After, Allow, WWW-Authenticate, Connection."""
    headers: Headers = []
    if info.code == SHUTTING_DOWN:
        headers.append((b"connection", b"close"))  # the client's next connection may reach another replica
    if info.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(info.retry_after_s))))
    if isinstance(error, MethodNotAllowedError):
        headers.append((b"allow", error.allowed.encode()))
    if info.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def from_http_exception(error: HTTPException, path: str) -> RequestError:
    """Turn the router's 404 and 405 into ours."""
    shown = msgspec.json.encode(path[:200]).decode()
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return MethodNotAllowedError(f"{shown} does not take this method. Allowed: {allowed}.", allowed=allowed)
    return NotFoundError(
        f"The path {shown} does not exist here. Try POST /v1/chat/completions or GET /v1/models; "
        "GET /openapi.json lists every path.",
        code="path_not_found",
    )
