"""Opens a TCP connection to a name: its addresses in turn, a quarter second apart, the first that answers wins.

As RFC 8305 has it ("happy eyeballs"): a dead IPv6 route costs 250 ms and not the whole timeout. uvloop's
``create_connection`` cannot do that. Nor is it given sockets of ours: cancelled at the wrong moment it would close the
descriptor and leave the socket object, which later closes whoever got the same number.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

from mesh.config.address import join_address
from mesh.tasks import spawn

_STAGGER_S = 0.25

_Attempt = asyncio.Task[asyncio.Transport | OSError]


async def connect(host: str, port: int) -> asyncio.Transport:
    """Return a connection that has no protocol yet; raise ``OSError``, that of the first address if all failed."""
    addresses = await _resolve(host, port)
    attempts: set[_Attempt] = set()
    errors: list[OSError] = []
    try:
        while addresses or attempts:
            if addresses:
                attempts.add(spawn(_attempt(addresses.pop(0), port), f"connect to {host}"))
            done, attempts = await _first(attempts, _STAGGER_S if addresses else None)
            while done:
                result = done.pop().result()
                if not isinstance(result, OSError):
                    attempts |= done
                    return result
                errors.append(result)
    finally:
        await _give_up(attempts)
    raise errors[0] if errors else OSError("the name stands for no address")


async def _first(attempts: set[_Attempt], timeout_s: float | None) -> tuple[set[_Attempt], set[_Attempt]]:
    return await asyncio.wait(attempts, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


async def _give_up(attempts: set[_Attempt]) -> None:
    for task in attempts:
        task.cancel()
    for result in await asyncio.gather(*attempts, return_exceptions=True):
        if not isinstance(result, BaseException):  # it succeeded, too late
            result.abort()


async def _attempt(host: str, port: int) -> asyncio.Transport | OSError:
    try:
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, host, port)
    except OSError as error:
        return error
    return transport


async def _resolve(host: str, port: int) -> list[str]:
    """Return the addresses of *host*, IPv6 and IPv4 in turn, beginning with what the system prefers."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # the codec for host names refuses what DNS could never hold
        raise OSError("this is no name of a host") from error
    addresses = dict.fromkeys((family, _numeric(address)) for family, _, _, _, address in found)
    first = [text for family, text in addresses if family == found[0][0]]
    rest = [text for family, text in addresses if family != found[0][0]]
    return [text for text in chain.from_iterable(zip_longest(first, rest)) if text is not None]


def _numeric(address: Sequence[object]) -> str:
    """Return the host part of a socket's address, with its zone: a link-local address means nothing without."""
    zone = address[3] if len(address) == 4 else 0
    return f"{address[0]}%{zone}" if zone and "%" not in str(address[0]) else str(address[0])


def why(error: OSError) -> str:
    """Return what went wrong without the address, which the loops put into it in ways of their own."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error)


def keep_alive(sock: socket.socket | None) -> None:
    """Let small writes go out at once, and let the kernel notice a peer that vanished."""
    if sock is None:  # a transport without one
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def address_text(address: Sequence[Any] | None) -> str:
    """Return a socket's address, as its transport tells it, as text (trap 68)."""
    if not address or isinstance(address, str | bytes):
        return "an unknown address"
    return join_address(str(address[0]), int(address[1]))
