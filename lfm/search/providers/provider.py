"""What a provider is, and the HTTP that the web ones share: one request, bounded, its failures in our words."""

import contextlib
import email.utils
import json
import ssl
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar

import httpx2
import msgspec

from lfm import __version__
from lfm.search.errors import ProviderError, ProviderReason
from lfm.search.http_body import ACCEPT_ENCODING, BodyError, read_body
from lfm.search.results import SearchQuery, SearchResult
from lfm.search.urls import server_root

_T = TypeVar("_T")

_MAX_BYTES = 4 * 1024 * 1024
_MAX_RETRY_AFTER_S = 3600.0
_IO_S = 30.0  # without a byte; the chain's deadline is shorter
_REASONS: Mapping[int, ProviderReason] = {
    401: "forbidden",
    403: "forbidden",
    402: "rate_limited",  # no credit left
    429: "rate_limited",
    432: "rate_limited",  # Tavily: the plan's limit
    433: "rate_limited",  # Tavily: the pay-as-you-go limit
}


class Provider(Protocol):
    """Answers queries. `is_cacheable`: whether an answer may be given again to the same question for a while."""

    name: str
    is_cacheable: bool

    async def search(self, query: SearchQuery) -> list[SearchResult]:
        """At most `max_results`, best first. Raises ProviderError. The caller sets the deadline."""

    async def aclose(self) -> None:
        """Release what it holds."""


class ProviderClient:
    """The connection to one provider. Redirects are not followed, cookies not kept, proxies and netrc not read."""

    def __init__(self, name: str, base_url: str, *, headers: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._root = server_root(base_url, of=name)
        self._headers = {
            "User-Agent": f"lfm/{__version__}",
            "Accept": "application/json",
            "Accept-Encoding": ACCEPT_ENCODING,
            **(headers or {}),
        }
        # On plain HTTP, as with one's own SearXNG, nobody is trusted rather than everybody's certificates loaded.
        tls = True if self._root.startswith("https") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # A kept connection may be closed just as it is used, and a search would fail for nothing.
        limits = httpx2.Limits(max_keepalive_connections=0)
        self._transport = httpx2.AsyncHTTPTransport(verify=tls, trust_env=False, limits=limits)

    async def get(self, path: str, *, params: Mapping[str, str], answer: type[_T]) -> _T:
        """GET and decode. Raises ProviderError."""
        return await self._send(self._request("GET", path, params=params), answer)

    async def post(self, path: str, *, body: Mapping[str, object], answer: type[_T]) -> _T:
        """POST JSON and decode. Raises ProviderError."""
        return await self._send(self._request("POST", path, body=body), answer)

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, object] | None = None,
    ) -> httpx2.Request:
        return httpx2.Request(
            method,
            f"{self._root}{path}",
            params=params,
            json=body,
            headers=self._headers,
            extensions={"timeout": {"connect": _IO_S, "read": _IO_S, "write": _IO_S, "pool": _IO_S}},
        )

    async def _send(self, request: httpx2.Request, answer: type[_T]) -> _T:
        try:
            response = await self._transport.handle_async_request(request)
            try:
                if response.status_code != 200:
                    raise self._refusal(response)
                data = await read_body(response, max_bytes=_MAX_BYTES)
            finally:
                await response.aclose()
        except httpx2.TimeoutException as error:
            raise ProviderError("timeout", f"{self.name} did not answer in time.") from error
        except httpx2.HTTPError as error:
            raise ProviderError("unreachable", f"{self.name} cannot be reached ({type(error).__name__}).") from error
        except BodyError as error:
            raise ProviderError("malformed", f"The answer of {self.name} {error}.") from error
        try:
            # json takes half an emoji where msgspec does not, and providers cut their snippets anywhere.
            return msgspec.convert(json.loads(data), type=answer)
        except (ValueError, RecursionError) as error:
            raise ProviderError("malformed", f"The answer of {self.name} is not what it publishes.") from error

    def well_formed(self, results: Sequence[object], kind: type[_T]) -> list[_T]:
        """The results that are what the provider publishes. Raises ProviderError if there are some, and none is."""
        kept = []
        for result in results:
            with contextlib.suppress(msgspec.ValidationError):
                kept.append(msgspec.convert(result, type=kind))
        if results and not kept:
            raise ProviderError("malformed", f"The results of {self.name} are not what it publishes.")
        return kept

    def _refusal(self, response: httpx2.Response) -> ProviderError:
        status = response.status_code
        reason = _REASONS.get(status, "failed")
        return ProviderError(
            reason,
            f"{self.name} answers with status {status}.",
            retry_after_s=_retry_after_s(response.headers) if reason == "rate_limited" else None,
        )


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds until the provider may be asked again, from Retry-After (seconds or a date) or Brave's own header."""
    text = headers.get("retry-after") or headers.get("x-ratelimit-reset", "").partition(",")[0]
    text = text.strip()
    if text.isascii() and text.isdecimal():
        seconds = float(text[:9])
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(0.0, seconds), _MAX_RETRY_AFTER_S)
