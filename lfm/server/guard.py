"""What a request must pass before any route sees it: header size, Host and Origin, the API key.

Default-deny: every path needs the key but the three probes, so a route added later is protected without a thought.
"""

import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lfm.config import ServerConfig
from lfm.protocol import MAX_HEADER_BYTES
from lfm.server.errors import ForbiddenError, HeadersTooLargeError, UnauthorizedError
from lfm.server.state import record_of

PUBLIC_PATHS = frozenset({"/livez", "/readyz", "/health"})


class Guard:
    """Pure ASGI middleware; raises RequestError, which the outer `RequestContext` turns into the answer."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._config = config
        self._key_digest = _digest(config.api_key.strip().encode()) if config.api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            check_header_size(scope["headers"])
            self._check_host(headers)
            self._check_origin(headers)
            # scope["path"] is what the router matches; the raw target or the Host header could say something else.
            if scope["path"] not in PUBLIC_PATHS:
                record_of(scope).owner = self._check_key(headers)
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        """A web page whose name an attacker points at 127.0.0.1 reaches a loopback server, but under its own name.

        A request without a Host header (HTTP/1.0 probes) comes from no browser.
        """
        host = headers.get("host")
        if not self._config.is_loopback or host is None or self._is_own_host(_hostname(host)):
            return
        raise ForbiddenError(
            f"Host {host[:100]!r} is not allowed: this server listens on {self._config.host} only. "
            "Use http://localhost, or start it with --host to serve other names.",
            code="host_not_allowed",
        )

    def _check_origin(self, headers: Headers) -> None:
        """Browsers name the page that sends a request; without a key only pages of this very server may."""
        origin = headers.get("origin")
        if origin is None or not (self._config.is_loopback or self._key_digest is None):
            return
        origin_host = _hostname(origin.partition("://")[2])
        own_host = _hostname(headers.get("host", ""))
        if origin_host and (origin_host == own_host or (self._config.is_loopback and self._is_own_host(origin_host))):
            return
        raise ForbiddenError(
            f"Origin {origin[:100]!r} is not allowed: pages of other sites may not call this server. "
            "Call it from a program, or from a page that it serves itself.",
            code="origin_not_allowed",
        )

    def _is_own_host(self, hostname: str) -> bool:
        if hostname in ("localhost", self._config.host.lower()):
            return True
        try:
            return ipaddress.ip_address(hostname).is_loopback
        except ValueError:  # a name, not an address
            return False

    def _check_key(self, headers: Headers) -> str:
        """Whose request this is: a digest of the key, or nothing where no key is asked for."""
        if self._key_digest is None:
            return ""
        key = _credential(headers)
        if not key:
            raise UnauthorizedError(
                "There is no API key. Send the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
                code="missing_api_key",
            )
        if not hmac.compare_digest(_digest(key), self._key_digest):
            raise UnauthorizedError("The API key is wrong. Use the key that --api-key gave.", code="invalid_api_key")
        return hashlib.sha256(b"owner:" + key).hexdigest()


def _credential(headers: Headers) -> bytes:
    """The one place that reads keys: OpenAI's and Together's header, else Anthropic's; empty if there is none."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    key = bearer.strip() if scheme.lower() == "bearer" else ""
    return (key or headers.get("x-api-key", "").strip()).encode("latin-1")


def check_header_size(headers: list[tuple[bytes, bytes]]) -> None:
    """Raises HeadersTooLargeError. Counts names, values and the four bytes around them."""
    num_bytes = sum(len(name) + len(value) + 4 for name, value in headers)
    if num_bytes > MAX_HEADER_BYTES:
        raise HeadersTooLargeError(
            f"The headers hold {num_bytes} bytes. Allowed: {MAX_HEADER_BYTES}. Send fewer or shorter headers.",
            code="headers_too_large",
        )


def _digest(key: bytes) -> bytes:
    """Equal lengths for `compare_digest`, and no plain key kept. Keys are random, so no slow hash is needed."""
    return hashlib.sha256(key).digest()


def _hostname(netloc: str) -> str:
    try:
        return (urlsplit(f"//{netloc}").hostname or "").rstrip(".")
    except ValueError:  # unbalanced brackets
        return ""
