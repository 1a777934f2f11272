"""Where other nodes may be: addresses to try, from the settings, from the ``peers`` state file, and from mDNS.

Owns the list of contacts and the life of mDNS. A contact is a hint and nothing more: who answers there proves itself in
the handshake, and members learn each other's addresses by gossip. Names stay names; the dialer resolves them each time.
mDNS is optional: where multicast does not work that is said once, and tried again when the network changes, or later.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Protocol

from mesh.errors import ConfigError
from mesh.logs import Log
from mesh.net.addresses import LocalAddress, Ourselves, contact_address, local_addresses, parse_ip
from mesh.net.mdns import Mdns
from mesh.net.mdns_records import Announcement, Reach, plan_reach, service_type
from mesh.tasks import in_daemon_thread, spawn

_log = Log(__name__)

MOST_CONTACTS = 4096
LOOK_EVERY_S = 5.0  # at the interfaces and the file
_FIRST_RETRY_S = 10.0
_LAST_RETRY_S = 300.0


class MdnsSettings(Protocol):
    """The ``cluster.discovery:`` section."""

    @property
    def mdns(self) -> bool: ...
    @property
    def service_name(self) -> str: ...


class DiscoverySettings(Protocol):
    """The ``cluster:`` section, as far as it is needed here."""

    @property
    def peers(self) -> Sequence[str]: ...
    @property
    def discovery(self) -> MdnsSettings: ...


class Responder(Protocol):
    """What is needed of ``Mdns``."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _View:
    """What one look at the machine found."""

    local: tuple[LocalAddress, ...]
    listening: tuple[str, ...]
    peers: tuple[str, ...]


class Discovery:
    """``on_found(address)`` is called once for every contact that appears; ``contacts()`` are those of now."""

    def __init__(
        self,
        settings: DiscoverySettings,
        *,
        node_id: str,
        fingerprint: str,
        version: str,
        listen_host: str,
        port: int,
        on_found: Callable[[str], None],
        read_peers: Callable[[], Iterable[str]],
        look: Callable[[], tuple[LocalAddress, ...]] = local_addresses,
        in_thread: Callable[[Callable[[], _View], str], Awaitable[_View]] = in_daemon_thread,
        responder: Callable[[str, Announcement, Reach, Callable[[str, tuple[str, ...]], None]], Responder] = Mdns,
    ) -> None:
        """*port* is the one that the listener has got. *read_peers* may block, and is called now and then."""
        self._own = Announcement(node_id, fingerprint, version, port)
        self._service_type = _service_type(settings.discovery)
        self._listen_host = listen_host
        self._on_found = on_found
        self._read_peers = read_peers
        self._look = look
        self._in_thread = in_thread
        self._responder = responder
        self._static = _sound(settings.peers, "cluster.peers")
        self._filed: tuple[str, ...] = ()
        self._heard: dict[str, tuple[str, ...]] = {}  # by the name that mDNS gave
        self._ourselves = Ourselves(_addresses(listen_host) if parse_ip(listen_host) else (), port, ())
        self._contacts: tuple[str, ...] = self._gather()
        self._reported: set[str] = set()
        self._due: asyncio.Handle | None = None  # the next ``_refresh``, for all changes until then
        self._watching: asyncio.Task[None] | None = None
        self._mdns: Responder | None = None
        self._reach: Reach | None = None  # what mDNS was last opened, or tried, for
        self._failures = 0
        self._retry_at = 0.0

    def contacts(self) -> tuple[str, ...]:
        """Return every address to try as host:port, none twice and none our own; the ones set by people first."""
        return self._contacts

    async def start(self) -> None:
        """Look around from now on. Waits for nothing, and no trouble with the network is the caller's."""
        self._watching = spawn(self._watch(), "discovery")

    async def close(self) -> None:
        """Say goodbye and look no further. Takes a second at most. Idempotent."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
            self._watching = None
        if self._due is not None:
            self._due.cancel()
        await self._close_mdns()

    # --- looking

    async def _watch(self) -> None:
        while True:
            try:
                view = await self._in_thread(self._survey, "discovery")
                self._ourselves = Ourselves(view.listening, self._own.port, view.local)
                self._filed = view.peers
                self._refresh()
                if self._service_type is not None:
                    await self._adjust(self._service_type, plan_reach(view.listening, view.local))
            except Exception:
                _log.exception("looking for other nodes failed; trying again")
            await asyncio.sleep(LOOK_EVERY_S)

    def _survey(self) -> _View:
        try:
            peers = _sound(self._read_peers(), "peers file")
        except (OSError, ValueError) as error:
            _log.debug("cannot read the peers file", reason=str(error))
            peers = self._filed
        return _View(self._look(), _addresses(self._listen_host), peers)

    async def _adjust(self, service_type: str, reach: Reach | None) -> None:
        """Bring mDNS to *reach*: opened again when the interfaces changed, and when it failed and the pause is over."""
        loop = asyncio.get_running_loop()
        if reach != self._reach:
            self._retry_at = 0.0
        elif self._mdns is not None or loop.time() < self._retry_at:
            return
        await self._close_mdns()
        self._reach = reach
        try:
            if reach is None:
                raise OSError("no network interface that can")
            mdns = self._responder(service_type, self._own, reach, self._learned)
            await mdns.open()
        except OSError as error:
            self._retry_at = loop.time() + min(_FIRST_RETRY_S * 2 ** min(self._failures, 10), _LAST_RETRY_S)
            self._failed(str(error), loopback=reach is not None and reach.loopback)
        else:
            self._mdns = mdns
            self._succeeded(reach)

    def _failed(self, reason: str, *, loopback: bool) -> None:
        self._failures += 1
        say = _log.debug if loopback or self._failures > 1 else _log.warning
        say("nodes cannot be found by mDNS; trying again from time to time", reason=reason, fix="set cluster.peers")

    def _succeeded(self, reach: Reach) -> None:
        self._failures = 0
        _log.info("looking for nodes by mDNS", interfaces=[str(where) for where in reach.interfaces])

    async def _close_mdns(self) -> None:
        mdns, self._mdns = self._mdns, None
        if mdns is None:
            return
        try:
            await mdns.close()
        finally:
            self._heard.clear()
            self._changed()

    # --- what was found

    def _learned(self, name: str, contacts: tuple[str, ...]) -> None:
        self._heard.pop(name, None)
        if contacts:
            self._heard[name] = contacts
        self._changed()

    def _changed(self) -> None:
        """A hundred nodes may answer at once; the list is made again once for all of them."""
        if self._due is None and self._watching is not None:
            self._due = asyncio.get_running_loop().call_soon(self._refresh)

    def _refresh(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        self._contacts = self._gather()
        fresh = [contact for contact in self._contacts if contact not in self._reported]
        self._reported = set(self._contacts)
        for contact in fresh:
            self._on_found(contact)

    def _gather(self) -> tuple[str, ...]:
        known = chain(self._static, self._filed, *self._heard.values())
        others = (contact for contact in dict.fromkeys(known) if contact not in self._ourselves)
        return tuple(islice(others, MOST_CONTACTS))


def _service_type(settings: MdnsSettings) -> str | None:
    try:
        return service_type(settings.service_name) if settings.mdns else None
    except ValueError as error:
        raise ConfigError(f"cluster.discovery.service_name: {error}") from error


def _sound(texts: Iterable[str], where: str) -> tuple[str, ...]:
    """Return *texts* as host:port, without those that are not: settings are checked before, a file may say anything."""
    found: dict[str, None] = {}
    for text in islice(texts, MOST_CONTACTS):
        try:
            found[contact_address(text)] = None
        except ValueError as error:
            _log.debug("not the address of a node", where=where, reason=str(error))
    return tuple(found)


def _addresses(listen_host: str) -> tuple[str, ...]:
    """Return what *listen_host* stands for; asks DNS for a name."""
    if parse_ip(listen_host) is not None:
        return (listen_host,)
    try:
        found = socket.getaddrinfo(listen_host, None, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))
