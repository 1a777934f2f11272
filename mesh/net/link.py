"""A link as an asyncio transport: what is written goes to a peer, encrypted, over one TCP connection.

A protocol uses a ``Link`` as it would use a TLS transport. Towards the TCP transport it is the protocol. It begins its
life when the handshake is over (``mesh.net.link_handshake``); ``peer`` is then proven and trusted.

- Back-pressure goes through in both directions: the TCP transport's ``pause_writing`` is the protocol's, and reading
  that is paused here is paused there. What was decrypted by then (one read of the socket at most) is kept.
- The end: a peer that closes says so, and the protocol sees ``eof_received`` and ``connection_lost(None)`` as with TLS.
  A connection that ends without it was cut, by whomever: ``connection_lost(LinkError)``.
- Silence: ``tick`` is called once a second by ``mesh.net.links``. A link that sent nothing for 3 s pings; one that got
  nothing for 10 s is dead. Seconds are counted in ticks, so a process that was stopped for a minute does not take all
  its peers for dead when it goes on. While reading is paused, nothing can be heard and nothing is judged.

One write is one record (more only above 64 KiB) and one write to TCP, which uvloop sends together with the others of
the same turn of the loop. Memory is that of the TCP transport's buffers; the work on 64 KiB is about 25 us.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, cast

from mesh.core.node_state import PeerIdentity
from mesh.errors import LinkError
from mesh.net.noise import Session
from mesh.net.noise_records import MAX_CONTENT, Control

PING_AFTER_TICKS = 3
DEAD_AFTER_TICKS = 10

CLOSED_AFTER_TICKS = 30  # what was left to send when it was closed should be gone by then

_JOINED_BYTES = 16384  # buffers up to this together become one record, which costs less than several
_DELIVERED_BYTES = 65536  # records up to this together are delivered as one chunk, for the same reason
_NOBODY = asyncio.Protocol()  # the protocol of a link that is lost


class Link(asyncio.Transport, asyncio.Protocol):
    """See the module. Made by ``mesh.net.links``, in both directions."""

    __slots__ = (
        "_closing",
        "_deliver",
        "_error",
        "_loop",
        "_on_lost",
        "_open",
        "_paused",
        "_peer_closed",
        "_pending",
        "_protocol",
        "_seal",
        "_session",
        "_tcp",
        "_tcp_paused",
        "_tcp_write",
        "_unheard",
        "_unsent",
        "_write_paused",
        "address",
        "peer",
    )

    def __init__(self, tcp: asyncio.Transport, session: Session, address: str, on_lost: Callable[[Link], None]) -> None:
        """Take over *tcp*; *session* is established. *address* is the other end's, for people."""
        super().__init__()
        self.address = address
        self.peer: PeerIdentity = session.peer
        self._tcp = tcp
        self._tcp_write = tcp.write
        self._session = session
        self._open = session.receive_data
        self._seal = session.sealer.seal
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._protocol: asyncio.Protocol = _NOBODY
        self._deliver: Callable[[bytes], None] = _NOBODY.data_received
        self._pending: deque[bytes | Control] = deque()  # arrived, not delivered; TCP reading is paused meanwhile
        self._paused = False  # by the protocol
        self._tcp_paused = False  # also while what is pending is not delivered
        self._write_paused = False
        self._closing = False
        self._peer_closed = False
        self._error: LinkError | None = None
        self._unheard = 0  # ticks, as the next
        self._unsent = 0
        tcp.set_protocol(self)

    def __repr__(self) -> str:
        state = "closing" if self._closing else "open"
        return f"<Link to {self.peer.node_id} at {self.address}, {state}>"

    def start(self, protocol: asyncio.Protocol, arrived: list[bytes | Control]) -> None:
        """Tell *protocol* that it is connected; *arrived* came together with the end of the handshake."""
        self.set_protocol(protocol)
        protocol.connection_made(self)
        if not self._closing:
            self._received(arrived)

    # --- to the protocol, as its transport

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        if isinstance(protocol, asyncio.BufferedProtocol):
            raise TypeError("a link delivers bytes, it does not fill buffers")
        self._protocol = cast(asyncio.Protocol, protocol)
        self._deliver = self._protocol.data_received

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """``mesh_peer`` is the ``PeerIdentity`` of the other end; everything else is the TCP connection's."""
        return self.peer if name == "mesh_peer" else self._tcp.get_extra_info(name, default)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or not data:
            return
        self._unsent = 0
        if len(data) <= MAX_CONTENT and type(data) is not memoryview:  # the length of a view need not be in bytes
            self._tcp_write(self._seal(data))
        else:
            self._tcp.writelines(self._session.sealer.seal_all(data))

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        buffers = list(list_of_data)
        if sum(map(len, buffers)) <= _JOINED_BYTES:
            self.write(b"".join(buffers))
        elif not self._closing:
            self._unsent = 0
            seal_all = self._session.sealer.seal_all
            self._tcp.writelines([record for buffer in buffers for record in seal_all(buffer)])

    def can_write_eof(self) -> bool:
        return False

    def write_eof(self) -> None:
        raise NotImplementedError("a link is never half-closed, as TLS is not")

    def get_write_buffer_size(self) -> int:
        return self._tcp.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._tcp.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._tcp.set_write_buffer_limits(high, low)

    def is_reading(self) -> bool:
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        if not self._closing:
            self._paused = True
            self._pause_tcp()

    def resume_reading(self) -> None:
        if not self._paused or self._closing:
            return
        self._paused = False
        if self._pending:  # not from here: the protocol may be in the middle of something
            self._loop.call_soon(self._deliver_pending)
        else:
            self._resume_tcp()

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Send what was written and a goodbye, then close. Nothing more is delivered."""
        if self._closing:
            return
        self._begin_to_close()
        if not self._peer_closed:
            self._tcp_write(self._session.sealer.seal_control(Control.CLOSE))
        self._tcp.close()

    def abort(self) -> None:
        """Close at once, whatever is still to be sent. The other end sees that something is missing."""
        self._begin_to_close()
        self._tcp.abort()

    def _begin_to_close(self) -> None:
        self._closing = True
        self._unheard = 0
        self._pending.clear()

    # --- to the TCP transport, as its protocol

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._unheard = 0
        try:
            arrived = self._open(data)
        except LinkError as error:
            self.fail(error.message)
            return
        self._received(arrived)

    def _received(self, arrived: list[bytes | Control]) -> None:
        if len(arrived) > 1:
            arrived = _joined(arrived)
        if self._pending or self._paused:  # TCP is paused, too, but may have read this before
            self._pending.extend(arrived)
        elif len(arrived) == 1 and type(content := arrived[0]) is bytes:
            self._deliver(content)
        elif arrived:
            self._pending.extend(arrived)
            self._deliver_pending()

    def _deliver_pending(self) -> None:
        """Deliver until the protocol pauses or closes; only when nothing is left may TCP read on."""
        pending = self._pending
        while pending and not self._paused and not self._closing:
            item = pending.popleft()
            if type(item) is bytes:
                self._deliver(item)
            elif item is Control.CLOSE:
                self._closed_by_peer()
        if not pending and not self._paused:
            self._resume_tcp()

    def _closed_by_peer(self) -> None:
        self._peer_closed = True
        self._protocol.eof_received()  # to stay open is no choice, as with TLS
        self.close()

    def _pause_tcp(self) -> None:
        if not self._tcp_paused:
            self._tcp_paused = True
            self._tcp.pause_reading()

    def _resume_tcp(self) -> None:
        if self._tcp_paused and not self._closing:
            self._tcp_paused = False
            self._unheard = 0
            self._tcp.resume_reading()

    def eof_received(self) -> bool:
        """Return whether the TCP connection stays open: only if the protocol has not yet been told that it ends."""
        if self._closing:
            return False
        try:
            self._session.receive_eof()
        except LinkError as error:
            self.fail(error.message)
            return False
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        error = self._error
        if error is None and not self._peer_closed and (exc is not None or not self._closing):
            error = self._named("it was cut" if exc is None else f"it was cut: {exc}")
            error.__cause__ = exc
        self._begin_to_close()
        protocol, self._protocol = self._protocol, _NOBODY
        self._deliver = _NOBODY.data_received  # and so no reference circle is left
        self._on_lost(self)
        protocol.connection_lost(error)

    def pause_writing(self) -> None:
        self._write_paused = True
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._write_paused = False
        self._protocol.resume_writing()

    # --- to the links

    def fail(self, reason: str) -> None:
        """End the link at once; its protocol gets a ``LinkError`` with *reason*."""
        if self._error is None:
            self._error = self._named(reason)
        self.abort()

    def _named(self, reason: str) -> LinkError:
        return LinkError(f"link to {self.peer.node_id} ({self.address}): {reason}")

    @property
    def heard_lately(self) -> bool:
        """Whether the other end gave a sign of life within the last seconds: it pings if it has nothing to say.

        Not once the link is closing: then ticks are counted from that, whoever ended it.
        """
        return not self._closing and self._unheard <= PING_AFTER_TICKS + 1

    def tick(self) -> None:
        """A second has passed."""
        self._unheard += 1
        if self._closing:
            if self._unheard >= CLOSED_AFTER_TICKS:
                self.fail(f"the peer did not take what was left to send within {CLOSED_AFTER_TICKS} s")
            return
        if not self._tcp_paused and self._unheard >= DEAD_AFTER_TICKS:
            self.fail(f"the peer said nothing for {DEAD_AFTER_TICKS} s")
            return
        self._unsent += 1
        if self._unsent >= PING_AFTER_TICKS and not self._write_paused:
            self._unsent = 0
            self._tcp_write(self._session.sealer.seal_control(Control.PING))


def _joined(arrived: list[bytes | Control]) -> list[bytes | Control]:
    """Return *arrived* without pings, and with what is small in one piece. Only its last can be the end."""
    contents = [item for item in arrived if type(item) is bytes]
    end: list[bytes | Control] = [Control.CLOSE] if arrived[-1] is Control.CLOSE else []
    if len(contents) > 1 and sum(map(len, contents)) <= _DELIVERED_BYTES:
        contents = [b"".join(contents)]
    return contents + end
