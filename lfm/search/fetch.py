"""Fetches one web page for a reader: checked, bounded, and turned into text in another process.

An address is parsed once, its name resolved once, every address it has checked, and the connection made to one of
these, with the name kept for the Host header and the certificate. Redirects are followed here, one by one, each through
the same checks. No cookies, no credentials, no proxy from the environment, no connection used twice.
"""

import asyncio
import hashlib
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from types import TracebackType
from typing import Self

import httpx2

from lfm import __version__
from lfm.search.addresses import Address, AllowList
from lfm.search.clean import clean_line, clean_text
from lfm.search.errors import ExtractionError, FetchError
from lfm.search.extracted import Extracted
from lfm.search.extraction import Extractor
from lfm.search.extraction_wire import Kind
from lfm.search.http_body import ACCEPT_ENCODING, BodyError, BodyTooLarge, read_body
from lfm.search.urls import WebUrl, parse_url

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

_HTML, _PDF = ("text/html", "application/xhtml+xml"), ("application/pdf",)
_TEXT = ("text/plain", "text/markdown", "text/x-markdown", "text/csv", "application/json")
_CHARSETS = re.compile(
    r"utf-?8|utf-16(le|be)?|us-ascii|iso-8859-\d{1,2}|windows-125\d|koi8-[ru]|shift_jis|euc-(jp|kr)|gb2312|gbk|gb18030"
    r"|big5|tis-620",
    re.IGNORECASE,
)
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_ADDRESSES = 3  # that are tried; one family of addresses may have no route here
_MAX_TITLE_CHARS = 300
_HEADERS = {
    "User-Agent": f"lfm/{__version__} (fetches pages that its user asks about)",
    "Accept": ", ".join((*_HTML, *_PDF, *_TEXT)),
    "Accept-Encoding": ACCEPT_ENCODING,
    "Connection": "close",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """What one page may cost. `timeout_s` is for the network, redirects included; parsing has its own limit."""

    timeout_s: float = 15.0
    connect_s: float = 5.0
    max_bytes: int = 8 * 1024 * 1024
    max_text_chars: int = 400_000
    max_redirects: int = 3
    max_at_once: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page as text. `hops` are all addresses that were asked, the first as given and the last the page's own.

    `sha256` and `num_bytes` are of the body as it was parsed, so that a trace can say what exactly was read.
    """

    url: str
    title: str
    text: str
    content_type: str
    sha256: str
    num_bytes: int
    hops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Body:
    content_type: str  # without parameters
    charset: str | None
    data: bytes


class PageFetcher:
    """Fetches pages; many at once may share it. Close it, or use `async with`."""

    def __init__(
        self,
        extractor: Extractor,
        *,
        allow: AllowList | None = None,
        limits: FetchLimits | None = None,
        resolver: Resolver | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`allow` None: the public internet only. `resolver` None: the system's. `tls` None: the usual authorities."""
        self._extractor = extractor
        self._allow = allow or AllowList()
        self._limits = limits = limits or FetchLimits()
        self._resolve = resolver or _resolve
        self._transport = httpx2.AsyncHTTPTransport(
            verify=tls or True,
            trust_env=False,
            limits=httpx2.Limits(max_connections=limits.max_at_once, max_keepalive_connections=0),
        )
        self._slots = asyncio.Semaphore(limits.max_at_once)
        # Documents are parsed one by one. Those that wait must not take the threads that others need.
        self._parsing = ThreadPoolExecutor(1, thread_name_prefix="lfm-page")

    async def fetch(self, text: str) -> Page:
        """Fetch the page at an address that a model or a user wrote. Raises FetchError, whose text they may read."""
        async with self._slots:
            try:
                async with asyncio.timeout(self._limits.timeout_s):
                    body, hops = await self._follow(parse_url(text.strip()))
            except TimeoutError:
                raise FetchError("timeout", f"The page took longer than {self._limits.timeout_s:g} s.") from None
            extracted = await self._extract(body, hops[-1])
        return Page(
            url=str(hops[-1]),
            title=clean_line(extracted.title, max_chars=_MAX_TITLE_CHARS),
            text=clean_text(extracted.text, max_chars=self._limits.max_text_chars),
            content_type=body.content_type,
            sha256=hashlib.sha256(body.data).hexdigest(),
            num_bytes=len(body.data),
            hops=tuple(map(str, hops)),
        )

    async def aclose(self) -> None:
        """Close what is open. The extractor is the caller's."""
        await self._transport.aclose()
        self._parsing.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _follow(self, url: WebUrl) -> tuple[_Body, list[WebUrl]]:
        hops = [url]
        while True:
            answer = await self._ask(hops[-1])
            if isinstance(answer, _Body):
                return answer, hops
            if len(hops) > self._limits.max_redirects:
                raise FetchError("refused", f"{url} redirects more than {self._limits.max_redirects} times.")
            hops.append(hops[-1].joined(answer))

    async def _ask(self, url: WebUrl) -> _Body | str:
        """The body of a page, or where it redirects to."""
        for address in await self._checked_addresses(url):
            request = _request(url, address, connect_s=self._limits.connect_s, read_s=self._limits.timeout_s)
            try:
                response = await self._transport.handle_async_request(request)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                if _has_bad_certificate(error):
                    raise FetchError("unreachable", f"{url.host} has no valid certificate.") from error
                continue
            except httpx2.HTTPError as error:
                raise FetchError("unreachable", f"{url.host} gave no proper answer.") from error
            try:
                return await self._read(response, url)
            finally:
                await response.aclose()
        raise FetchError("unreachable", f"{url.host} does not answer.")

    async def _checked_addresses(self, url: WebUrl) -> Sequence[Address]:
        """The addresses of the host, all of which may be connected to. The only place that resolves a name."""
        if url.address is not None:
            addresses: Sequence[Address] = (url.address,)
        else:
            try:
                texts = await self._resolve(url.host, url.port)
            except OSError as error:
                raise FetchError("unreachable", f"There is no host {url.host}.") from error
            addresses = tuple(dict.fromkeys(ip_address(text.partition("%")[0]) for text in texts))
        self._allow.check(url, addresses)
        return addresses[:_MAX_ADDRESSES]

    async def _read(self, response: httpx2.Response, url: WebUrl) -> _Body | str:
        if response.status_code in _REDIRECTS:
            if location := response.headers.get("location"):
                return location
            raise FetchError("status", f"{url} redirects to nowhere.")
        if response.status_code != 200:
            raise FetchError("status", f"{url} answers with status {response.status_code}.")
        content_type, _, parameters = response.headers.get("content-type", "").partition(";")
        content_type = content_type.strip().lower()
        if content_type not in (*_HTML, *_PDF, *_TEXT):
            shown = repr(content_type[:60]) if content_type else "of no stated type"
            raise FetchError("content_type", f"{url} is {shown}. Allowed: web pages, PDF and plain text.")
        try:
            data = await read_body(response, max_bytes=self._limits.max_bytes)
        except BodyTooLarge as error:
            raise FetchError("too_large", f"{url} {error}.") from error
        except BodyError as error:
            raise FetchError("unreadable", f"{url} {error}.") from error
        except httpx2.HTTPError as error:
            raise FetchError("unreachable", f"{url.host} broke off its answer.") from error
        return _Body(content_type, _charset(parameters), data)

    async def _extract(self, body: _Body, url: WebUrl) -> Extracted:
        if body.content_type in _TEXT:
            return Extracted(text=body.data.decode(body.charset or "utf-8", "replace"))
        kind: Kind = "pdf" if body.content_type in _PDF else "html"
        data = body.data
        if kind == "html" and body.charset is not None:  # the header wins over what the page says of itself
            data = data.decode(body.charset, "replace").encode()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._parsing, self._extractor.extract, data, kind)
        except ExtractionError as error:
            raise FetchError("unreadable", f"{url} cannot be read. {error}") from error


async def _resolve(host: str, port: int) -> Sequence[str]:
    """Every address of a host, by the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _request(url: WebUrl, address: Address, *, connect_s: float, read_s: float) -> httpx2.Request:
    """A request to `address` that asks for `url`: nothing of the URL's host is left for the client to look up."""
    target = httpx2.URL(scheme=url.scheme, host=str(address), port=url.port, raw_path=url.target.encode("ascii"))
    timeout = {"connect": connect_s, "read": read_s, "write": read_s, "pool": read_s}
    return httpx2.Request(
        "GET",
        target,
        headers={"Host": url.authority, **_HEADERS},
        extensions={"timeout": timeout, "sni_hostname": url.host},
    )


def _has_bad_certificate(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def _charset(parameters: str) -> str | None:
    """The charset of a Content-Type, if it is one that pages use. Python knows others that are slow, or no charsets."""
    match = re.search(r"charset\s*=\s*[\"']?([\w-]{1,20})", parameters, re.IGNORECASE)
    return match[1] if match and _CHARSETS.fullmatch(match[1]) else None
