"""The one parser of web addresses. What it does not understand is refused, and only what it returns is connected to.

Validators and HTTP clients that parse an address each for themselves have been led apart by backslashes, user names,
odd digits and encoded hosts. Here nothing parses after this.
"""

import re
import string
import unicodedata
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import quote, urljoin

from lfm.errors import UsageError
from lfm.search.errors import FetchError

DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_URL_CHARS = 2048

_URL = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://"
    r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<host>[^\s:/?#\[\]@\\%]+))(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>[/?][^#]*)?(?:#.*)?",
    re.IGNORECASE | re.DOTALL,
)
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_MAX_HOST_CHARS = 253
_SAFE_IN_TARGET = string.punctuation.replace('"', "").replace("<", "").replace(">", "").replace("`", "")


@dataclass(frozen=True, slots=True)
class WebUrl:
    """A parsed address. `host` is a name in small ASCII letters, or an IP address without brackets."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def address(self) -> IPv4Address | IPv6Address | None:
        """The host, where it is an address and needs no resolution."""
        if ":" in self.host:
            return IPv6Address(self.host)
        return IPv4Address(self.host) if _NUMBER.fullmatch(self.host.rpartition(".")[2]) else None

    @property
    def authority(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"

    def joined(self, location: str) -> "WebUrl":
        """Where a redirect to `location` leads. Raises FetchError."""
        if "\\" in location or _has_hidden(location):  # urljoin would drop some of these
            raise FetchError("refused", f"{self} redirects to {_shown(location)}, which is no web address.")
        try:
            return parse_url(urljoin(str(self), location))
        except ValueError as error:
            raise FetchError("refused", f"{self} redirects to {_shown(location)}, which is no web address.") from error


def parse_url(text: str) -> WebUrl:
    """Parse an http or https address. Raises FetchError, which says what is wrong with it."""
    if len(text) > MAX_URL_CHARS:
        raise FetchError("refused", f"The address has {len(text):,} characters. Allowed: {MAX_URL_CHARS:,}.")
    match = _URL.fullmatch(text)
    if match is None or _has_hidden(text):
        raise FetchError("refused", f"{_shown(text)} is no web address. Give one such as https://example.org/page.")
    scheme = match["scheme"].lower()
    if scheme not in DEFAULT_PORTS:
        raise FetchError("refused", f"{_shown(text)} is not fetched. Allowed: http and https addresses.")
    host = _ipv6(match["v6"], text) if match["v6"] else _host(match["host"], text)
    port = int(match["port"] or DEFAULT_PORTS[scheme])
    if not 0 < port <= 65_535:
        raise FetchError("refused", f"{_shown(text)} names port {port}. Allowed: 1 to 65535.")
    target = quote(match["target"] or "/", safe=_SAFE_IN_TARGET)
    return WebUrl(scheme, host, port, target if target.startswith("/") else f"/{target}")


def server_root(address: str, *, of: str) -> str:
    """The address of a server that the operator names, without a slash at its end.

    Raises UsageError, which says what it is the address `of`, where it is none or has a query.
    """
    try:
        url = parse_url(address)
    except FetchError as error:
        raise UsageError(f"The address of {of} cannot be used: {error}") from error
    if "?" in url.target:
        raise UsageError(f"The address of {of} cannot be used: {_shown(address)} has a query. Leave it out.")
    return str(url).rstrip("/")


def _has_hidden(text: str) -> bool:
    """Whether there is white space, or what cannot be seen at all."""
    return any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs") for char in text)


def _ipv6(text: str, url: str) -> str:
    try:
        return str(IPv6Address(text))
    except ValueError as error:
        raise FetchError("refused", f"{_shown(url)} holds a malformed IPv6 address.") from error


def _host(text: str, url: str) -> str:
    """A host name in ASCII, or an IPv4 address in its one usual form."""
    try:
        name = text.lower() if text.isascii() else text.encode("idna").decode("ascii").lower()
    except UnicodeError as error:
        raise FetchError("refused", f"{_shown(url)} names a host that cannot exist.") from error
    name = name.removesuffix(".")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return _ipv4(name, url, is_plain=text.isascii())
    if len(name) > _MAX_HOST_CHARS or not all(_LABEL.fullmatch(label) for label in labels):
        raise FetchError("refused", f"{_shown(url)} names a host that cannot exist.")
    return name


def _ipv4(name: str, url: str, *, is_plain: bool) -> str:
    try:
        address = str(IPv4Address(name))
    except ValueError:
        address = ""
    if not is_plain or address != name:
        raise FetchError("refused", f"{_shown(url)} writes an address in an odd way. Allowed: four decimal numbers.")
    return address


def _shown(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 120 else f"{shown[:117]}..."
