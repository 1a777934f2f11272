"""One client's connection: who serves each request, and the client's deadlines.

Reading is the ``RequestReader``'s, inference the ``Exchange``'s, everything else the ``AppSession``'s, refusals and
every way to close its other half's (client_socket.py). Nothing here knows instances.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from mesh.api.body import requested_model, without_stream
from mesh.api.client_socket import NEVER, ClientSocket
from mesh.api.exchange import Exchange
from mesh.api.form_reader import FormReader
from mesh.api.form_stream import FormStream, form_stream
from mesh.api.forms import form_exchange, form_reader
from mesh.api.handoff import AppSession
from mesh.api.http1 import RequestHead
from mesh.api.request_reader import RequestReader, Stage
from mesh.api.responses import HeadTimeoutError, ProtocolError
from mesh.api.routes import Route
from mesh.errors import (
    AuthError,
    BodyTimeoutError,
    DrainedError,
    DrainingError,
    MeshError,
    TooManyHopsError,
)

if TYPE_CHECKING:
    from mesh.api.dataplane import DataPlane

_DRIP_BYTES = 4096  # less of a body than this in body_read_timeout_ms counts as silence: nobody may drip for ever
_FIRST_REQUEST_S = 1.0  # how long a drain waits for the first request of a connection that was just made
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ClientConnection(ClientSocket):
    """See the module. It is the ``Client`` of its exchanges and the ``Owner`` of its reader."""

    __slots__ = (
        "_app",
        "_exchange",
        "_form",
        "_paused_since",
        "_progress",
        "_since",
        "write_paused",
    )

    def __init__(self, plane: DataPlane) -> None:
        super().__init__(plane)
        self._reader = RequestReader(self, plane.limits)
        self._exchange: Exchange | None = None
        self._app: AppSession | None = None
        self._form: FormReader | FormStream | None = None  # while its body comes
        self._since = 0.0  # of the request under way
        self._progress = 0  # of the body, when it was last looked at
        self._paused_since = 0.0
        self.write_paused = False

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
        self._drop_form()
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
        self._deadline = NEVER
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
        return plane.limits.refusal(head.route, length) if length > plane.any_body_bytes else None

    def body_awaited(self, expects_continue: bool) -> None:
        plane, partial = self._plane, self._reader.stage is Stage.PARTIAL_HEAD
        self._deadline = plane.now() + (plane.head_timeout_s if partial else plane.body_timeout_s)
        self._progress = self._reader.progress
        if expects_continue:
            self.write(_CONTINUE)

    def complete(self, head: RequestHead, body: bytes | memoryview) -> None:
        """The request is complete: find its profile and start the exchange."""
        route: Route = head.route
        self._deadline = NEVER
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
        exchange.start()

    def refused(self, error: MeshError, in_step: bool) -> None:
        """Answer a request that never became an exchange."""
        self._drop_form()
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

    # --- forms

    def _form_here(self, head: RequestHead, form: FormReader | FormStream) -> None:
        """All of it that is needed: start the exchange."""
        self._deadline = NEVER
        try:
            exchange = form_exchange(self._plane, self, head, form, self._request_id, self._since)
        except MeshError as error:
            self.refused(error, in_step=self._form is None)
            return
        self._exchange = exchange
        if (forwarder := self._plane.forwarder) is not None:
            said = head.mesh
            if said is not None and isinstance(form, FormStream):  # it can be sent only once: by nobody but us
                said = replace(said, hops=forwarder.max_hops)
            exchange.trip = forwarder.trip(exchange, self.peer, said)
        exchange.start()

    def form_begins(self, stream: FormStream) -> None:
        assert self._reader.head is not None
        self._form_here(self._reader.head, stream)

    def pause_form(self) -> None:
        self.too_far_ahead()

    def resume_form(self) -> None:
        if self._reading_paused:
            self._read_on()

    def _drop_form(self) -> None:
        form, self._form = self._form, None
        if form is not None:
            form.close()

    # --- requests for the app

    def take(self, raw_head: bytes, head: RequestHead, length: int) -> AppSession | FormReader | FormStream:
        """Let the app answer; this stays the transport's protocol and passes on the bytes of this request only."""
        if head.route is not None:
            stream = None if self.peer is None else form_stream(head, length, self)
            self._form = form_reader(head, length, self._plane.limits) if stream is None else stream
            return self._form
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
        form, self._form = self._form, None
        if form is not None:
            assert self._reader.head is not None
            if not (isinstance(form, FormStream) and form.begun):
                self._form_here(self._reader.head, form)
            return
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
            if self._form is None:
                self._close()
            else:  # answered before all of it came
                self._drop_form()
                self._linger()
            return
        self._since = 0.0
        self._deadline = now + self._plane.idle_timeout_s
        self._reader.next()
        if self._reading_paused:
            self._read_on()

    def answer_error(self, error: MeshError) -> None:
        """Answer a request that was read to its end."""
        self._exchange = None
        head = self._reader.head
        keep_alive = head is not None and head.keep_alive and self._form is None and not self._plane.ctx.draining
        self._write_error(error, keep_alive)
        self.answered(keep_alive, self._plane.now())

    def cut_off(self, last_words: bytes) -> None:
        """End an answer that is not complete, so that the client can tell."""
        self._exchange = None
        self._break_off(last_words)

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

    def check(self, now: float) -> None:
        """Called about twice a second: enforce what the client owes."""
        if self.write_paused and now - self._paused_since > self._plane.idle_timeout_s:
            self._transport.abort()  # it does not read its answer
        elif self._exchange is not None:
            if self._form is not None and self._reading_paused and self._reset_unseen:
                self._transport.abort()
            else:
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
