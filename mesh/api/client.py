"""One client's connection: who serves each request, the client's deadlines, refusals and every way to close.

Reading is the ``RequestReader``'s, inference the ``Exchange``'s, everything else the ``AppSession``'s. Nothing here
knows instances.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from functools import partial
from typing import TYPE_CHECKING, cast

from mesh.api.body import requested_model, without_stream
from mesh.api.exchange import Exchange
from mesh.api.handoff import AppSession
from mesh.api.http1 import RequestHead
from mesh.api.request_reader import RequestReader, Stage
from mesh.api.responses import STATUS_LINES, HeadTimeoutError, ProtocolError, error_response, internal_error
from mesh.api.routes import Dialect, Route
from mesh.core.node_state import PeerIdentity
from mesh.errors import (
    AuthError,
    BodyTimeoutError,
    DrainedError,
    DrainingError,
    MeshError,
    TooManyHopsError,
    UnknownModelError,
)
from mesh.logs import Log

if TYPE_CHECKING:
    from mesh.api.dataplane import DataPlane

_log = Log(__name__)

_DRIP_BYTES = 4096  # less of a body than this in body_read_timeout_ms counts as silence: nobody may drip for ever
_LINGER_S = 2.0  # how long a client may go on sending what nobody will read, so that it gets to read the answer
_FIRST_REQUEST_S = 1.0  # how long a drain waits for the first request of a connection that was just made
#: Refusals that another node may not have for the same request: failures, and limits of this one.
_OF_THIS_NODE = frozenset({408, 413, 431, *range(500, 600)})
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_NEVER = float("inf")
_RESET = struct.pack("ii", 1, 0)  # a plain close is a clean end to whoever was told no length


class ClientConnection(asyncio.Protocol):
    """See the module. It is the ``Client`` of its exchanges and the ``Owner`` of its reader."""

    __slots__ = (
        "_app",
        "_closing",
        "_deadline",
        "_exchange",
        "_paused_since",
        "_plane",
        "_progress",
        "_reader",
        "_reading_paused",
        "_request_id",
        "_since",
        "_transport",
        "address",
        "peer",
        "write",
        "write_paused",
    )

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._reader = RequestReader(self, plane.limits)
        self._exchange: Exchange | None = None
        self._app: AppSession | None = None
        self._request_id = b""  # of the request under way, as is _since
        self._since = 0.0
        self._closing = False
        self._reading_paused = False
        self._deadline = _NEVER  # for what the client owes us
        self._progress = 0  # of the body, when it was last looked at
        self._paused_since = 0.0
        self.write_paused = False
        self.address = ""
        self.peer: PeerIdentity | None = None  #: the node at the other end, if this is a link

    # --- transport events

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self.write = partial(self._plane.outbox.write, self._transport)
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else ""
        self.peer = transport.get_extra_info("mesh_peer")
        self._reader.of_peer = self.peer is not None
        plane = self._plane
        self._deadline = plane.now() + (_FIRST_REQUEST_S if plane.ctx.draining else plane.head_timeout_s)
        plane.opened(self)

    def data_received(self, data: bytes) -> None:
        self._reader.receive(data)

    def eof_received(self) -> None:
        """The client will not send more. With a request under way that means it left, as nginx sees it too."""
        if self._exchange is not None:
            self._leave()
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._leave()
        app, self._app = self._app, None
        if app is not None:
            app.connection_lost(exc)
        self._reader.stop()
        self._plane.closed(self)

    def _leave(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.client_gone()

    def pause_writing(self) -> None:
        self.write_paused = True
        self._paused_since = self._plane.now()
        if self._exchange is not None:
            self._exchange.pause()
        if self._app is not None:
            self._app.pause_writing()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._exchange is not None:
            self._exchange.resume()
        if self._app is not None:
            self._app.resume_writing()

    # --- what the reader tells

    def judge(self, head: RequestHead, length: int) -> MeshError | None:
        """Begin a request, and return why it is refused on its head alone, None if it is not."""
        plane = self._plane
        self._request_id = head.request_id or plane.next_id()
        self._since = plane.now()
        self._deadline = _NEVER
        if head.expect is not None and head.expect.lower() != b"100-continue":
            return ProtocolError("unknown expectation", 417)
        if head.route is not None:  # the app checks keys and the drain by itself
            if plane.ctx.draining:
                return DrainingError("Node is draining for shutdown")
            if plane.ctx.drained and (self.peer is not None or plane.forwarder is None):
                return DrainedError()
            if self.peer is None and not plane.authenticator.allows_digests(head.credentials):
                return AuthError("Unauthorized")
            if head.mesh is not None and head.mesh.hops > plane.ctx.settings.max_hops:
                return TooManyHopsError("Too many hops (loop detected)")
        return plane.limits.body_error() if length > plane.limits.body_bytes else None

    def body_awaited(self, expects_continue: bool) -> None:
        plane, partial = self._plane, self._reader.stage is Stage.PARTIAL_HEAD
        self._deadline = plane.now() + (plane.head_timeout_s if partial else plane.body_timeout_s)
        self._progress = self._reader.progress
        if expects_continue:
            self.write(_CONTINUE)

    def complete(self, head: RequestHead, body: bytes | memoryview) -> None:
        """The request is complete: find its profile and start the exchange."""
        route: Route = head.route
        self._deadline = _NEVER
        try:
            name, stream = requested_model(route, head.query, body)
            passed_on = head.mesh if self.peer is not None else None
            if passed_on is not None and passed_on.model is not None:
                name = passed_on.model
            profile, metrics = self._plane.find(name, route)
            if stream and not route.may_stream:
                body = without_stream(body)
        except MeshError as error:
            self.refused(error, in_step=True)
            return
        exchange = Exchange(self._plane, self, head, profile, metrics, body, self._request_id, self._since)
        self._exchange = exchange
        if (forwarder := self._plane.forwarder) is not None:
            exchange.trip = forwarder.trip(exchange, self.peer, head.mesh)
        try:
            exchange.start()
        except Exception:
            _log.exception("a request failed unexpectedly", request_id=self._request_id.decode("latin-1"))
            exchange.fail(internal_error())

    def refused(self, error: MeshError, in_step: bool) -> None:
        """Answer a request that never became an exchange."""
        if self._app is not None:
            if not self._app.withdraw():  # its answer has begun, so nothing else can be answered
                self._transport.abort()
                return
            self._app = None
        head = self._reader.head
        if self._since == 0.0:  # its head was not understood
            head = self._reader.head = None
            self._request_id = self._plane.next_id()
            self._since = self._plane.now()
        self._plane.refused(head, self.address, self._request_id, self._since, error)
        if in_step:
            self.answer_error(error)
        else:
            self._write_error(error, keep_alive=False)
            self._linger()

    def too_far_ahead(self) -> None:
        if not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()

    # --- requests for the app

    def take(self, raw_head: bytes, head: RequestHead, length: int) -> AppSession:
        """Let the app answer; this stays the transport's protocol and passes on the bytes of this request only."""
        self._plane.outbox.flush()  # the app writes to the transport itself
        app = self._plane.gateway.open(self._transport, head, length, self._plane.limits.body_bytes)
        self._app = app
        app.start(raw_head, self._app_responded, self._plane.ctx.draining)
        return app

    def _app_responded(self) -> None:
        if self._app is not None and self._app.body_complete:
            self._app_done()
        # else the rest of the body is read and dropped: the answer did not say that the connection ends

    def taken(self) -> None:
        if self._app is not None and self._app.responded:
            self._app_done()

    def _app_done(self) -> None:
        self._app = None
        if not self._closing:
            self.answered(not self._transport.is_closing(), self._plane.now())

    # --- what the exchange tells

    def answered(self, keep_alive: bool, now: float) -> None:
        """The answer was written; go on with the next request."""
        self._exchange = None
        if not keep_alive or self._plane.ctx.draining:
            self._close()
            return
        self._since = 0.0
        self._deadline = now + self._plane.idle_timeout_s
        self._reader.next()
        if self._reading_paused:
            self._reading_paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def answer_error(self, error: MeshError) -> None:
        """Answer a request that was read to its end."""
        self._exchange = None
        head = self._reader.head
        keep_alive = head is not None and head.keep_alive and not self._plane.ctx.draining
        self._write_error(error, keep_alive)
        self.answered(keep_alive, self._plane.now())

    def cut_off(self, last_words: bytes) -> None:
        """End an answer that is not complete, so that the client can tell."""
        self._exchange = None
        if last_words:
            self.write(last_words)
            self._close()  # the framing is left open: not a clean end, yet the words arrive
        else:
            self._closing = True
            self._plane.outbox.flush()
            if (sock := self._transport.get_extra_info("socket")) is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()

    # --- the end

    def _write_error(self, error: MeshError, keep_alive: bool) -> None:
        head = self._reader.head
        dialect = head.route.dialect if head is not None and head.route is not None else Dialect.OPENAI
        status, headers, body = error_response(error, dialect, self._request_id.decode("latin-1"))
        lines = [STATUS_LINES[status], *(b"%b: %b\r\n" % header for header in headers)]
        lines.append(b"Content-Length: %d\r\nX-Request-Id: %b\r\n" % (len(body), self._request_id))
        lines.append(self._plane.node_field)
        if self.peer is not None and (error.status in _OF_THIS_NODE or error.type == UnknownModelError.type):
            lines.append(b"X-Llama-Mesh-Error: %b\r\n" % error.type.encode("latin-1"))  # others may do better
        lines.append(b"\r\n" if keep_alive else b"Connection: close\r\n\r\n")
        if head is None or head.method != b"HEAD":
            lines.append(body)
        self.write(b"".join(lines))

    def _linger(self) -> None:
        """Close once the client stops sending: closing over unread bytes would reset the answer away."""
        self._plane.outbox.flush()
        self._reader.stop()
        self._deadline = self._plane.now() + _LINGER_S
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()

    def _close(self) -> None:
        """Close when what was written has gone out, or after a while if the client does not take it."""
        self._closing = True
        self._reader.stop()
        self._deadline = self._plane.now() + self._plane.idle_timeout_s
        self._plane.outbox.flush()
        self._transport.close()

    # --- what the plane asks

    @property
    def idle(self) -> bool:
        """Between two requests, with nothing of the next one here."""
        return self._reader.stage is Stage.HEAD

    @property
    def reads_body(self) -> bool:
        """Whether the body of an inference request is on its way."""
        return self._app is None and self._reader.stage is Stage.BODY

    def drain(self) -> None:
        """Close if nothing is under way; else the answer that is under way is the last."""
        if not self.idle or self._closing:
            return
        if self._reader.head is None:  # new: its first request may be here already, and closing would reset it
            self._deadline = min(self._deadline, self._plane.now() + _FIRST_REQUEST_S)
        else:
            self._close()

    def abort(self) -> None:
        self._transport.abort()

    def check(self, now: float) -> None:
        """Called about twice a second: enforce what the client owes."""
        if self.write_paused and now - self._paused_since > self._plane.idle_timeout_s:
            self._transport.abort()  # it does not read its answer
        elif self._exchange is not None:
            self._exchange.check(now)
        elif self._reader.stage is Stage.BODY and abs(self._reader.progress - self._progress) >= _DRIP_BYTES:
            self._progress = self._reader.progress  # the limit is on silence: a large body may take its time
            self._deadline = now + self._plane.body_timeout_s
        elif now > self._deadline:
            self._timed_out()

    def _timed_out(self) -> None:
        if self._closing:
            self._transport.abort()
        elif self._reader.stage is Stage.PARTIAL_HEAD:
            self.refused(
                HeadTimeoutError("Request head read timed out (http.head_read_timeout_ms)", 408), in_step=False
            )
        elif self._reader.stage is Stage.BODY:
            self.refused(BodyTimeoutError("Request body read timed out (http.body_read_timeout_ms)"), in_step=False)
        else:  # idle, or lingering
            self._close()
