"""A TCP connection until it is a link, or has failed: the asyncio shell of a session's handshake, for both sides."""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

from mesh.errors import LinkError
from mesh.net.link_dial import address_text, keep_alive
from mesh.net.noise import Session, Stage
from mesh.net.noise_records import Control


class Owner(Protocol):
    """What happens to a handshake is told exactly once: established or failed."""

    def begin(self, handshake: LinkHandshake) -> Session:
        """The connection is there. Return its session, or raise ``LinkError`` to have it closed at once."""

    def established(self, handshake: LinkHandshake, session: Session, arrived: list[bytes | Control]) -> None: ...
    def failed(self, handshake: LinkHandshake, error: LinkError) -> None: ...


class LinkHandshake(asyncio.Protocol):
    """See the module. ``timeout_s`` is for the whole handshake, however it drips."""

    __slots__ = ("_over", "_owner", "_session", "_timeout_s", "_timer", "address", "host", "tcp")

    def __init__(self, owner: Owner, timeout_s: float) -> None:
        self._owner = owner
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._session: Session | None = None
        self._over = False
        self.tcp: asyncio.Transport | None = None
        self.host = ""
        self.address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        tcp = self.tcp = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        peer = tcp.get_extra_info("peername")
        self.host = str(peer[0]) if peer else ""
        self.address = address_text(peer)
        keep_alive(tcp.get_extra_info("socket"))
        try:
            if tcp.is_closing():  # already, and nobody will tell
                raise LinkError("it was closed at once")
            session = self._session = self._owner.begin(self)
        except LinkError as error:
            self.abort(error)
            return
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._timed_out)
        if message := session.data_to_send():
            tcp.write(message)

    def data_received(self, data: bytes) -> None:
        session, tcp = self._session, self.tcp
        if self._over or session is None or tcp is None:
            return
        try:
            arrived = session.receive_data(data)
        except LinkError as error:
            self._end()
            if message := session.data_to_send():  # a refusal
                tcp.write(message)
            tcp.close()
            self._owner.failed(self, error)
            return
        if message := session.data_to_send():
            tcp.write(message)
        if session.stage in (Stage.ESTABLISHED, Stage.CLOSED):
            self._end()
            self._owner.established(self, session, arrived)

    def eof_received(self) -> None:
        self._ended(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended(exc)

    def _ended(self, cause: Exception | None) -> None:
        if self._over or self._session is None:
            return
        try:
            self._session.receive_eof()
        except LinkError as error:
            error.__cause__ = cause
            self.abort(error)

    def _timed_out(self) -> None:
        self.abort(LinkError(f"the handshake was not over within {self._timeout_s:g} s"))

    def abort(self, error: LinkError) -> None:
        """Give up because of *error*, unless it is over already."""
        if self._over:
            return
        self._end()
        if self.tcp is not None:
            self.tcp.abort()
        self._owner.failed(self, error)

    def _end(self) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
