"""One HTTP/1.1 call at a time on one link: h11 between a link's bytes and an ``Answer``. Knows no pool and no retry."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from time import perf_counter
from typing import cast

import h11

from mesh.core.node_state import PeerIdentity
from mesh.errors import LinkError, PeerError
from mesh.net.link import Link


@dataclass(frozen=True, slots=True)
class Answer:
    """``rtt_s`` is from the request to the first byte of the answer; the handshake of a new link is not in it."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    peer: PeerIdentity
    rtt_s: float


@dataclass(frozen=True, slots=True)
class Call:
    method: str
    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...]
    first_byte_s: float
    max_body_bytes: int


@dataclass(slots=True)
class _Reply:
    """What came so far."""

    done: asyncio.Future[None]
    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    body: bytearray = field(default_factory=bytearray)


class CallConnection(asyncio.Protocol):
    """One link, one call at a time."""

    __slots__ = ("_first_byte", "_h11", "_max_body_bytes", "_reply", "answered", "idle_since", "link", "reusable")

    link: Link

    def __init__(self) -> None:
        self._h11 = h11.Connection(h11.CLIENT)
        self._reply: _Reply | None = None
        self._first_byte: asyncio.Future[float] | None = None
        self._max_body_bytes = 0
        self.answered = False  # whether a byte of the answer to the present call came
        self.reusable = False
        self.idle_since = 0.0

    async def ask(self, address: str, call: Call) -> Answer:
        loop = asyncio.get_running_loop()
        self.answered = self.reusable = False
        if self.link.is_closing():
            raise LinkError("the link was closed")
        reply = self._reply = _Reply(loop.create_future())
        first_byte = self._first_byte = loop.create_future()
        self._max_body_bytes = call.max_body_bytes
        try:
            request = self._encoded(address, call)
            sent = perf_counter()  # uvloop's clock counts milliseconds
            self.link.write(request)
            try:
                async with asyncio.timeout(call.first_byte_s):
                    began = await first_byte
            except TimeoutError as error:
                raise PeerError(f"no answer to {call.method} {call.path} within {call.first_byte_s:g} s") from error
            await reply.done
            return Answer(reply.status, reply.headers, bytes(reply.body), self.link.peer, began - sent)
        finally:
            self._reply = self._first_byte = None
            _forget(first_byte)
            _forget(reply.done)

    def _encoded(self, address: str, call: Call) -> bytes:
        headers = [("Host", address), ("Content-Length", str(len(call.body))), *call.headers]
        try:
            parts = (
                self._h11.send(h11.Request(method=call.method, target=call.path, headers=headers)),
                self._h11.send(h11.Data(call.body)) if call.body else b"",
                self._h11.send(h11.EndOfMessage()),
            )
        except h11.LocalProtocolError as error:
            raise ValueError(f"{call.method} {call.path} is no request: {error}") from error
        return b"".join(part for part in parts if part)

    # --- the link's events

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.link = cast(Link, transport)

    def data_received(self, data: bytes) -> None:
        reply = self._reply
        if reply is None:  # nobody asked: the next answer could be mistaken for it
            self.link.abort()
            return
        if not self.answered and self._first_byte is not None and not self._first_byte.done():
            self.answered = True
            self._first_byte.set_result(perf_counter())
        try:
            self._h11.receive_data(data)
            self._read(reply)
        except h11.RemoteProtocolError as error:
            self._fail(PeerError(f"it does not answer in HTTP: {error}"))

    def eof_received(self) -> None:
        if self._reply is not None:
            try:
                self._h11.receive_data(b"")
                self._read(self._reply)
            except h11.RemoteProtocolError as error:
                self._fail(LinkError(f"it closed the link within its answer: {error}" if self.answered else "closed"))

    def connection_lost(self, exc: Exception | None) -> None:
        error = LinkError(exc.message if isinstance(exc, LinkError) else "the link was closed before the answer's end")
        error.__cause__ = exc
        self._fail(error)

    def _read(self, reply: _Reply) -> None:
        while True:
            match self._h11.next_event():
                case h11.Response(status_code=status, headers=headers):
                    reply.status = status
                    reply.headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in headers)
                case h11.Data(data=data):
                    reply.body += data
                    if len(reply.body) > self._max_body_bytes:
                        self._fail(PeerError(f"its answer is larger than {self._max_body_bytes} bytes"))
                        return
                case h11.EndOfMessage():
                    self._end(reply)
                    return
                case h11.InformationalResponse():
                    pass
                case _:  # more is needed
                    return

    def _end(self, reply: _Reply) -> None:
        if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
            self._h11.start_next_cycle()
            self.reusable = self._h11.trailing_data == (b"", False) and not self.link.is_closing()
        if not reply.done.done():
            reply.done.set_result(None)

    def _fail(self, error: PeerError) -> None:
        self.reusable = False
        reply, first_byte = self._reply, self._first_byte
        if first_byte is not None and not first_byte.done():
            first_byte.set_exception(error)
        if reply is not None and not reply.done.done():
            reply.done.set_exception(error)
        self.link.abort()


def _forget(future: asyncio.Future[None] | asyncio.Future[float]) -> None:
    """Drop *future*, whose failure somebody else has told already."""
    if not future.cancel() and not future.cancelled():
        future.exception()
