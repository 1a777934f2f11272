"""Addresses of nodes: what this machine has, which of it others can dial, and what was written down by people.

The choices are pure functions over a list of ``LocalAddress``; only ``local_addresses`` asks the system. Texts are
``host:port`` as ``mesh.config.address`` reads them: IPv6 in brackets (trap 68), a link-local one with its scope
(``[fe80::1%eth0]:8080``), since getaddrinfo cannot reach it without.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from mesh.config.address import join_address, split_address

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

DEFAULT_PORT = 8080
_MOST_OWN = 16  # in a record that every node of the mesh carries around
#: Bridges and their ends, for containers and virtual machines. Seldom reachable from outside, and docker0 has the same
#: address on every machine; so they come last.
_VIRTUAL = re.compile(r"docker|br-|virbr|veth|cni|flannel|cali|lxc|lxd|podman|nerdctl|vmnet|vboxnet|kube|dummy")


@dataclass(frozen=True, slots=True)
class LocalAddress:
    """One address of one interface that is up."""

    interface: str
    ip: str  #: without a scope
    index: int = 0  #: of the interface
    multicast: bool = True  #: whether the interface says that it can

    @property
    def parsed(self) -> IpAddress:
        return ipaddress.ip_address(self.ip)

    @property
    def virtual(self) -> bool:
        return _VIRTUAL.match(self.interface) is not None


def parse_ip(host: str) -> IpAddress | None:
    """Return *host* as an address, an IPv4 one in IPv6's clothes (``::ffff:127.0.0.1``) as IPv4; None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def without_scope(address: IpAddress) -> str:
    """Return *address* as text, without the interface that a link-local one was seen on."""
    return str(address).partition("%")[0]


def contact_address(text: str) -> str:
    """Return what somebody wrote as ``host:port``; the port may be left out. Raise ``ValueError`` if it is neither."""
    text = text.strip()
    bare = parse_ip(text[1:-1] if text.startswith("[") and text.endswith("]") else text)
    if bare is not None or ":" not in text:
        text = join_address(text, DEFAULT_PORT)
    host, port = split_address(text)
    if port == 0:
        raise ValueError("port 0 cannot be dialed")
    address = parse_ip(host)
    if address is None:
        return join_address(host.lower(), port)
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"'{host}' is not the address of a node")
    return join_address(str(address), port)


def local_addresses() -> tuple[LocalAddress, ...]:
    """Ask the system. Interfaces that are down, or have no carrier, are left out."""
    stats = psutil.net_if_stats()
    return tuple(
        LocalAddress(name, address.address.partition("%")[0], _index(name), "multicast" in stats[name].flags)
        for name, addresses in psutil.net_if_addrs().items()
        if name in stats and stats[name].isup
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    )


def _index(interface: str) -> int:
    try:
        return socket.if_nametoindex(interface)
    except OSError:  # it went away since
        return 0


def own_addresses(listen_host: str, port: int, public_url: str | None) -> tuple[str, ...]:
    """Return what others can dial to reach this node, the best first."""
    return choose_own(listen_host, port, public_url, local_addresses())


def choose_own(listen_host: str, port: int, public_url: str | None, local: Sequence[LocalAddress]) -> tuple[str, ...]:
    """Return ``own_addresses`` for a machine with these interfaces."""
    texts = [join_address(host, port) for host in _dialable(listen_host, local)]
    return tuple(dict.fromkeys([*_public(public_url, port), *texts]))[:_MOST_OWN]


def _public(url: str | None, port: int) -> Iterator[str]:
    """Without a port in *url* ours is taken: what answers at 80 or 443 is a web server, which passes no Noise on."""
    try:
        parts = urlsplit(url or "")
        if parts.hostname:
            yield join_address(parts.hostname, parts.port or port)
    except ValueError:
        return


def _dialable(listen_host: str, local: Sequence[LocalAddress]) -> list[str]:
    if not is_wildcard(listen_host):
        return [listen_host]
    heard = sorted(heard_addresses(listen_host, local), key=lambda here: (here.virtual, here.parsed.version))
    routable = [here.ip for here in heard if not here.parsed.is_link_local and not here.parsed.is_loopback]
    # Two boxes on one cable have nothing else; an IPv6 link-local address means nothing without the reader's scope.
    cable = [here.ip for here in heard if here.parsed.version == 4 and here.parsed.is_link_local]
    return routable or cable or [here.ip for here in heard if here.parsed.is_loopback]


def is_wildcard(listen_host: str) -> bool:
    address = parse_ip(listen_host)
    return address is not None and address.is_unspecified


def heard_addresses(listen_host: str, local: Iterable[LocalAddress]) -> tuple[LocalAddress, ...]:
    """Return the local addresses at which somebody who listens on *listen_host*, an address, can be reached.

    ``0.0.0.0`` means IPv4 only, ``::`` everything, as ``mesh.net.listener`` binds them.
    """
    wanted = parse_ip(listen_host)
    if wanted is None:
        return ()
    if wanted.is_loopback:  # all of 127.0.0.0/8, of which the interface only shows one
        return (LocalAddress("loopback", str(wanted), multicast=False),)
    if not wanted.is_unspecified:
        return tuple(here for here in local if here.ip == without_scope(wanted))
    return tuple(here for here in local if wanted.version == 6 or here.parsed.version == 4)


class Ourselves:
    """The contacts that lead to this node, which listens on the addresses *listening*: ``"[::1]:8080" in ourselves``.

    Only what is written as an IP address can be told here; of a name, the dialer learns it from the key that answers.
    """

    def __init__(self, listening: Iterable[str], port: int, local: Sequence[LocalAddress]) -> None:
        hosts = tuple(listening)
        self._port = port
        self._ips = frozenset(here.ip for host in hosts for here in heard_addresses(host, local))
        self._any_loopback = frozenset(ip.version for ip in map(parse_ip, hosts) if ip and ip.is_unspecified)

    def __contains__(self, contact: object) -> bool:
        host, port = split_address(str(contact))
        ip = parse_ip(host)
        if port != self._port or ip is None:
            return False
        if without_scope(ip) in self._ips:
            return True
        return ip.is_loopback and (ip.version in self._any_loopback or 6 in self._any_loopback)
