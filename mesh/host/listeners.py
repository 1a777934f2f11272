"""Who listens on a port. A server that sets SO_REUSEPORT shares its port with whoever does the same, unnoticed.

Linux only; elsewhere, and for what cannot be read, nothing is known. Blocks.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_LISTEN: Final = "0A"
_SOCKET: Final = re.compile(r"socket:\[(\d+)\]")
_PROC: Final = Path("/proc")


def is_crowded(port: int, proc: Path = _PROC) -> bool:
    """Whether more than one listens on *port*, on whatever address: cheap, for it need not be known who they are."""
    return len(dict(_listening(port, proc))) > 1


def other_sockets(port: int, pids: Iterable[int], proc: Path = _PROC) -> frozenset[str]:
    """Return the sockets (their inodes) of others than *pids* that listen on *port* where they do, and may get
    connections from this machine.

    The kernel prefers a socket of exactly the address: one on another address gets none that are for theirs, and one
    on every address only what is left. Where *pids* listen on every address, connections come in by loopback.
    """
    listening = dict(_listening(port, proc))
    own = {socket for pid in pids for socket in _sockets(pid, proc)} & listening.keys()
    others = listening.keys() - own
    reached = {address for socket in own for address in _reached(listening[socket])}
    return frozenset(socket for socket in others if not own or listening[socket] in reached)


def holders(sockets: Collection[str], proc: Path = _PROC) -> tuple[int, ...]:
    """Return the processes that have one of *sockets* open; not those that this user may not look into."""
    with contextlib.suppress(OSError):
        pids = (int(name) for name in os.listdir(proc) if name.isdecimal())
        return tuple(sorted(pid for pid in pids if not set(sockets).isdisjoint(_sockets(pid, proc))))
    return ()


def _reached(address: IpAddress) -> Iterator[IpAddress]:
    yield address
    if address.is_unspecified:
        yield ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")


def _listening(port: int, proc: Path) -> Iterator[tuple[str, IpAddress]]:
    """Yield inode and address of each socket that listens on *port*."""
    mark = f":{port:04X} "
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            lines = (proc / "net" / table).read_text().splitlines()[1:]
            for line in (line for line in lines if mark in line):  # of as many as there are connections
                words = line.split()  # sl local_address rem_address st ... inode
                address, _, number = words[1].rpartition(":")
                if words[3] == _LISTEN and int(number, 16) == port:
                    yield words[9], _address(address)


def _address(digits: str) -> IpAddress:
    """Return an address that the kernel prints as hexadecimal numbers of 32 bits, each in the machine's byte order."""
    numbers = (int(digits[start : start + 8], 16) for start in range(0, len(digits), 8))
    found = ipaddress.ip_address(b"".join(number.to_bytes(4, sys.byteorder) for number in numbers))
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def _sockets(pid: int, proc: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for name in os.listdir(proc / str(pid) / "fd"):
            with contextlib.suppress(OSError):
                if (found := _SOCKET.fullmatch(os.readlink(proc / str(pid) / "fd" / name))) is not None:
                    yield found[1]
