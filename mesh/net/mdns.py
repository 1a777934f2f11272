"""Announce this node by mDNS and follow the announcements of others, on the interfaces of one ``Reach``.

A shell around zeroconf that keeps its bounds: how many nodes are remembered, how many are asked about at once, how long
a goodbye may take. What is not announced any more is forgotten by its exact name (trap 54). A ``Mdns`` is opened once;
when the network changes, ``mesh.net.discovery`` closes it and opens another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

from zeroconf import Error, IPVersion, ServiceInfo, ServiceListener, Zeroconf
from zeroconf.asyncio import AsyncZeroconf

from mesh.logs import Log
from mesh.net.mdns_records import MOST_NODES, Announcement, Reach, believable
from mesh.tasks import spawn

_log = Log(__name__)

PORT: Final = 5353
GROUP: Final = "224.0.0.251"
GROUP6: Final = "ff02::fb"
CLOSE_S: Final = 1.0  # three goodbyes take a quarter of it
_MOST_QUESTIONS = 256  # nodes that are asked for their address at the same time
_ANSWER_MS = 3000

Contacts = tuple[str, ...]


class Mdns(ServiceListener):
    """``on_change(name, contacts)`` is called when a node is found or has moved, and with no contacts once it left."""

    def __init__(
        self,
        service_type: str,
        own: Announcement,
        reach: Reach,
        on_change: Callable[[str, Contacts], None],
        *,
        responder: Callable[..., AsyncZeroconf] = AsyncZeroconf,
        check: Callable[[Reach], None] | None = None,
    ) -> None:
        self._type = service_type
        self._own = own
        self._own_name = f"{own.label}.{service_type}".lower()
        self._reach = reach
        self._on_change = on_change
        self._responder = responder
        self._check = check_multicast if check is None else check
        self._zeroconf: AsyncZeroconf | None = None
        self._announcing: asyncio.Future[Any] | None = None
        self._questions: dict[str, asyncio.Task[None]] = {}
        self._known: dict[str, Contacts] = {}

    async def open(self) -> None:
        """Announce and browse from now on; raise ``OSError`` with the reason if this network does not permit it."""
        self._check(self._reach)
        _keep_quiet()
        try:
            self._zeroconf = self._responder(interfaces=list(self._reach.interfaces))
            await self._zeroconf.async_add_service_listener(self._type, self)
            # No probing for the name first, which takes seconds: it holds a hash of our key, so nobody else has it.
            broadcast = await self._zeroconf.async_register_service(self._service(), cooperating_responders=True)
            self._announcing = asyncio.ensure_future(broadcast)  # noqa: TID251  it is a task already
            self._announcing.add_done_callback(lambda done: done.cancelled() or done.exception())
        except BaseException as error:
            await self.close()
            if isinstance(error, Error | RuntimeError):
                raise OSError(str(error) or type(error).__name__) from error
            raise

    def _service(self) -> ServiceInfo:
        return ServiceInfo(
            self._type,
            f"{self._own.label}.{self._type}",
            port=self._own.port,
            properties=self._own.txt,
            server=f"{self._own.label}.local.",  # not the machine's name, whose records belong to the system
            parsed_addresses=list(self._reach.addresses),
        )

    async def close(self) -> None:
        """Say goodbye and let go of everything, within ``CLOSE_S`` also if nothing can be sent. Idempotent."""
        zeroconf, self._zeroconf = self._zeroconf, None
        if zeroconf is None:
            return
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._stop_tasks()
                await zeroconf.async_close()
        except Exception as error:  # zeroconf fails in its own ways when the network is gone
            _log.debug("no mDNS goodbye", reason=str(error) or type(error).__name__)
        finally:
            with contextlib.suppress(Exception):
                zeroconf.zeroconf.close()  # the sockets, whatever happened above; does nothing the second time

    async def _stop_tasks(self) -> None:
        running: list[asyncio.Future[Any]] = [*self._questions.values()]
        if self._announcing is not None:
            running.append(self._announcing)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    # --- what others say

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        if name.lower() == self._own_name or self._zeroconf is None:
            return
        key = name.lower()
        if key not in self._known and len(self._known) + len(self._questions) >= MOST_NODES:
            return
        if key in self._questions:
            self._questions.pop(key).cancel()  # what it was about to learn is out of date
        elif len(self._questions) >= _MOST_QUESTIONS:
            return  # its next announcement brings it back
        question = spawn(self._ask(self._zeroconf, name), f"mDNS: ask for {key[:80]}")
        self._questions[key] = question
        question.add_done_callback(lambda task: self._answered(key, task))

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        key = name.lower()
        if key in self._questions:
            self._questions.pop(key).cancel()
        self._learned(key, ())

    async def _ask(self, zeroconf: AsyncZeroconf, name: str) -> None:
        """Most often zeroconf knows the answer: an announcement holds everything."""
        try:
            info = await zeroconf.async_get_service_info(self._type, name, timeout=_ANSWER_MS)
        except (Error, OSError, ValueError) as error:
            _log.debug("a node that was announced cannot be found", name=name, reason=str(error))
            return
        if info is not None:
            addresses = info.parsed_scoped_addresses(IPVersion.All)
            found = believable(info.port, addresses, info.properties, self._own, loopback=self._reach.loopback)
            self._learned(name.lower(), found)

    def _answered(self, key: str, task: asyncio.Task[None]) -> None:
        if self._questions.get(key) is task:
            del self._questions[key]

    def _learned(self, key: str, contacts: Contacts) -> None:
        before = self._known.pop(key, ())
        if contacts:
            self._known[key] = contacts
        if contacts != before:
            self._on_change(key, contacts)


def _keep_quiet() -> None:
    """zeroconf logs a traceback for every socket of every interface that goes away; what matters is said by us."""
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        logging.getLogger("zeroconf").setLevel(logging.CRITICAL)


def check_multicast(reach: Reach) -> None:
    """Raise ``OSError`` if multicast cannot work here. zeroconf would find that out too, but with sockets left open."""
    for where in reach.interfaces:
        family = socket.AF_INET if isinstance(where, str) else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            for level, option, value in _options(where):
                probe.setsockopt(level, option, value)
            probe.bind(("", PORT))
            probe.connect((GROUP, PORT) if isinstance(where, str) else (GROUP6, PORT, 0, where))


def _options(where: str | int) -> Iterator[tuple[int, int, int | bytes]]:
    yield socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
    if hasattr(socket, "SO_REUSEPORT"):
        yield socket.SOL_SOCKET, socket.SO_REUSEPORT, 1
    if isinstance(where, str):
        here = socket.inet_aton(where)
        yield socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP) + here
        yield socket.IPPROTO_IP, socket.IP_MULTICAST_IF, here
    else:
        here6 = struct.pack("@I", where)
        yield socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1
        yield socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(socket.AF_INET6, GROUP6) + here6
        yield socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, here6
