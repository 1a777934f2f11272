"""What nodes say of themselves by mDNS, and how far what others say is believed. Pure: names, TXT, addresses.

Everything that is received was sent by anybody on the network. It can only ever become an address to dial, where the
handshake decides; so all that is checked is that it is an address, not our own, and how much of it there is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mesh.config.address import join_address
from mesh.core.node_state import PROTOCOL
from mesh.net.addresses import IpAddress, LocalAddress, heard_addresses, parse_ip, without_scope

MOST_NODES = 4096
_MOST_ADDRESSES = 16  # of one node
_MOST_INTERFACES = 16  # Linux lets a socket join 20 multicast groups
_LONGEST_TXT = 255  # of "key=value", in bytes: a length byte stands before it
_LONGEST_SLUG = 40
_SERVICE_NAME = re.compile(
    r"_(?!-)(?!.*--)(?=[a-z0-9-]*[a-z])[a-z0-9-]{1,15}(?<!-)\._(tcp|udp)\.local\.", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Announcement:
    """This node, as others may know it before they have proven anything: nothing here is secret (trap 101)."""

    node_id: str
    fingerprint: str
    version: str
    port: int

    @property
    def label(self) -> str:
        """One DNS label that no other node has: names may be equal, long or hold dots, keys do not (trap 54)."""
        slug = re.sub(r"[^A-Za-z0-9]+", "-", self.node_id)[:_LONGEST_SLUG].strip("-").lower() or "node"
        return f"{slug}-{hashlib.sha256(self.fingerprint.encode()).hexdigest()[:16]}"

    @property
    def txt(self) -> dict[str, str]:
        facts = {"id": self.node_id, "key": self.fingerprint, "protocol": str(PROTOCOL), "version": self.version}
        return {name: _cut(value, _LONGEST_TXT - len(name) - 1) for name, value in facts.items()}


def _cut(text: str, most_bytes: int) -> str:
    return text.encode(errors="replace")[:most_bytes].decode(errors="ignore")


def service_type(name: str) -> str:
    """Return the setting ``cluster.discovery.service_name`` as DNS writes it; raise ``ValueError`` if it is none."""
    full = name.strip().rstrip(".") + "."
    if not _SERVICE_NAME.fullmatch(full):
        raise ValueError(f"'{name}' is not an mDNS service type; expected one like _llama-mesh._tcp.local")
    return full


@dataclass(frozen=True, slots=True)
class Reach:
    """Where to speak mDNS, and the addresses to announce. Another one than before means that the network changed."""

    interfaces: tuple[str | int, ...]  #: IPv4 addresses, and indices of interfaces for IPv6
    addresses: tuple[str, ...]
    loopback: bool = False  #: among the nodes of this machine


def plan_reach(listening: Sequence[str], local: Sequence[LocalAddress]) -> Reach | None:
    """Return where a node that listens on the addresses *listening* can be found; None if there is no such place."""
    heard = list(dict.fromkeys(here for where in listening for here in heard_addresses(where, local)))
    outside = [here for here in heard if not here.parsed.is_loopback and here.multicast]
    if outside:
        outside.sort(key=lambda here: (here.virtual, here.parsed.is_link_local, here.parsed.version))
        one_each = {(here.interface, here.parsed.version): here for here in reversed(outside)}
        chosen = sorted(one_each.values(), key=outside.index)[:_MOST_INTERFACES]
        interfaces = tuple(here.ip if here.parsed.version == 4 else here.index for here in chosen)
        return Reach(interfaces, _few(here.parsed for here in outside))
    inside = [here.parsed for here in heard if here.parsed.is_loopback]
    if not inside:
        return None
    return Reach(("127.0.0.1",), _few(sorted(inside, key=lambda ip: ip.version)), loopback=True)


def _few(addresses: Iterable[IpAddress]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(without_scope(address) for address in addresses))[:_MOST_ADDRESSES]


def believable(
    port: int | None, addresses: Iterable[str], txt: Mapping[bytes, bytes | None], own: Announcement, *, loopback: bool
) -> tuple[str, ...]:
    """Return the contacts in one received answer: none if it is our own, or if nothing in it can be dialed.

    *loopback*: whether we speak mDNS on the loopback interface; from anywhere else 127.0.0.1 would mean ourselves.
    """
    if port is None or not 1 <= port <= 65535 or txt.get(b"key") == own.txt["key"].encode():
        return ()
    found = [ip for ip in map(parse_ip, addresses) if ip is not None and _is_dialable(ip, loopback=loopback)]
    found.sort(key=lambda ip: (ip.is_link_local, ip.version))
    hosts = (str(ip) if ip.is_link_local else without_scope(ip) for ip in found)
    return tuple(dict.fromkeys(join_address(host, port) for host in hosts))[:_MOST_ADDRESSES]


def _is_dialable(ip: IpAddress, *, loopback: bool) -> bool:
    if ip.is_unspecified or ip.is_multicast or (ip.is_loopback and not loopback):
        return False
    if ip.version == 4:
        return not ip.is_reserved
    return not ip.is_link_local or "%" in str(ip)  # without its scope, nobody knows on which interface it is
