"""Which addresses a page may be fetched from: public ones, and what the operator allows besides.

Everything inside is refused: loopback, private networks, link-local with the clouds' metadata services, shared address
space, and the forms in which such an address can hide (mapped, translated and tunnelled ones). Only the operator's
allow-list opens a way, never a request.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from lfm.errors import UsageError
from lfm.search.errors import FetchError
from lfm.search.urls import DEFAULT_PORTS, WebUrl

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# What `is_global` lets through, or did in some Python that we support.
_NOT_PUBLIC: tuple[Network, ...] = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",
        "100.64.0.0/10",  # shared address space; some clouds keep their metadata service there
        "168.63.129.16/32",  # Azure's host
        "192.0.0.0/24",
        "192.88.99.0/24",  # relays of 6to4
        "198.18.0.0/15",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::/96",  # IPv4-compatible
        "::ffff:0:0/96",  # IPv4-mapped
        "::ffff:0:0:0/96",  # IPv4-translated
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",  # Teredo and other special uses
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "3fff::/20",
        "5f00::/16",
        "fc00::/7",
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
    )
)


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet and cannot stand for another one."""
    return address.is_global and not any(_contains(network, address) for network in _NOT_PUBLIC)


@dataclass(frozen=True, slots=True)
class AllowList:
    """What may be fetched although it is not public: servers by name and port, and networks.

    A server is trusted whatever its name resolves to. A network is reached on the usual ports only.
    """

    servers: frozenset[tuple[str, int]] = frozenset()
    networks: tuple[Network, ...] = ()

    @classmethod
    def parse(cls, rules: Iterable[str]) -> "AllowList":
        """Read rules such as docs.internal:8080, [::1]:8080 and 10.1.0.0/16. Raises UsageError."""
        servers, networks = set(), []
        for rule in rules:
            if "/" in rule:
                networks.append(_network(rule))
            else:
                servers.add(_server(rule))
        return cls(frozenset(servers), tuple(networks))

    def check(self, url: WebUrl, addresses: Sequence[Address]) -> None:
        """Raises FetchError unless `url`, which resolves to `addresses`, may be fetched from every one of them.

        Names, addresses and ports that an error tells are the request's own: what a name resolves to is not shown.
        """
        if (url.host, url.port) in self.servers:
            return
        if url.port not in DEFAULT_PORTS.values():
            raise FetchError("refused", f"{url} asks for port {url.port}. Allowed: 80 and 443.")
        if not addresses:
            raise FetchError("unreachable", f"{url.host} has no address.")
        for address in addresses:
            if not is_public(address) and not any(_contains(network, address) for network in self.networks):
                raise FetchError("refused", f"{url.host} is not on the public internet.")


def _contains(network: Network, address: Address) -> bool:
    return network.version == address.version and address in network


def _network(rule: str) -> Network:
    try:
        return ip_network(rule)
    except ValueError as error:
        raise UsageError(f"The allowed network {rule!r} is none ({error}). Give one such as 10.1.0.0/16.") from error


def _server(rule: str) -> tuple[str, int]:
    match = re.fullmatch(r"\[?([^\s/@]+?)\]?:(\d{1,5})", rule)
    if match is None or not 0 < int(match[2]) <= 65_535:
        raise UsageError(
            f"The allowed server {rule!r} is none. Give a name or address with a port, such as docs.internal:8080, "
            "or a network such as 10.1.0.0/16."
        )
    host = match[1].lower().rstrip(".")
    try:
        return str(ip_address(host)), int(match[2])
    except ValueError:
        return host, int(match[2])
