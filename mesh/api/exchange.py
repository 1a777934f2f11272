"""One request's way through the node: admission, upstream connection, retries, accounting.

``Exchange`` is made when a request is complete and valid, and ends exactly once, in ``_end``, by whichever comes first:
the answer's last byte, an error, a timeout, or the client leaving. Whatever it holds (ticket, retry timer, upstream
connection, lease, the gauge) is given back on the way there; late calls find ``Phase.DONE`` and do nothing.

How the lease ends says whether the child is done with the request: ``release`` if it answered in full or closed the
connection itself, ``abandon`` if we cut it off, because a child may compute on for a while (traps 8, 9).

A request is sent again only while not one byte of an answer has come: at once if a kept connection turned out to be
closed, and once through the queue, with its old place, if the instance died (trap 75).
"""

from __future__ import annotations

import asyncio
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from mesh.api.http1 import RequestHead
from mesh.api.relay import Relay
from mesh.api.responses import RequestExpiredError, error_event, internal_error
from mesh.api.routes import Route
from mesh.api.upstream import Pool, UpstreamConnection, pool_of
from mesh.config.profile import Profile
from mesh.engine.lease import Lease, Ticket
from mesh.errors import MeshError, UpstreamError
from mesh.logs import Log
from mesh.metrics import ModelMetrics

if TYPE_CHECKING:
    from mesh.api.dataplane import DataPlane

_log = Log(__name__)

#: How long the supervisor gets to notice that an instance died, before the request asks it for another one.
CRASH_NOTICE_S = 0.1
_CLIENT_GONE_STATUS = 499  # as nginx logs it; nobody receives it
_NOT_LOOKED = (-1, 0.0)
_ONE_WRITE_BYTES = 4096  # up to here one copy is cheaper than a second buffer


class Phase(Enum):
    QUEUED = auto()
    PAUSED = auto()  # between a crash and the second attempt
    CONNECTING = auto()
    WAITING = auto()  # sent; no byte of an answer yet
    ANSWERING = auto()  # bytes of the answer have come
    DONE = auto()


# Looking a member up on its class costs 70 ns in Python 3.11, many times per request.
_QUEUED, _PAUSED, _CONNECTING, _WAITING, _ANSWERING, _DONE = Phase


class Client(Protocol):
    """The connection that the request came on."""

    @property
    def address(self) -> str: ...
    @property
    def write_paused(self) -> bool: ...

    def write(self, data: bytes) -> None: ...
    def answered(self, keep_alive: bool, now: float) -> None:
        """The answer was written; begin the next request or close."""

    def answer_error(self, error: MeshError) -> None:
        """No byte of an answer was written: answer *error*, then go on."""

    def cut_off(self, last_words: bytes) -> None:
        """The answer ends before its end: write *last_words* if any, then close in a way that is not a clean end."""


class Exchange(Relay):
    """See the module. It is also the ``Waiter`` of its admission and the ``Requester`` of its connection."""

    __slots__ = (
        "_body",
        "_crashes",
        "_lease",
        "_plane",
        "_progress",
        "_retry_timer",
        "_ticket",
        "_upstream",
        "_wait_since",
        "address",
        "bytes_in",
        "client",
        "instance_id",
        "model_metrics",
        "phase",
        "profile",
        "queue_s",
        "route",
        "since",
    )

    def __init__(
        self,
        plane: DataPlane,
        client: Client,
        head: RequestHead,
        profile: Profile,
        model_metrics: ModelMetrics,
        body: bytes | memoryview,
        request_id: bytes,
        since: float,
    ) -> None:
        route: Route = head.route
        super().__init__(head, request_id, client.write, plane.now, route.needs_slot)
        self.client: Client | None = client
        self.address = client.address
        self.bytes_in = len(body)
        self.route = route
        self.profile = profile
        self.since = since
        self.phase = _QUEUED
        self.queue_s: float | None = None
        self.instance_id: str | None = None
        self.model_metrics = model_metrics
        self._plane = plane
        self._body = body  # kept until an answer begins
        self._ticket: Ticket | None = None
        self._lease: Lease | None = None
        self._upstream: UpstreamConnection | None = None
        self._retry_timer: asyncio.TimerHandle | None = None
        self._crashes = 0
        self._progress = _NOT_LOOKED  # (bytes, when) of the last look, for the read timeout
        self._wait_since = since

    # --- admission

    def start(self) -> None:
        """Count the request and ask for an instance. Everything may happen inside this call."""
        metrics = self._plane.metrics
        metrics.requests_total += 1
        metrics.current_requests += 1
        self.model_metrics.requests_total += 1
        self._submit()

    def _submit(self) -> None:
        self.phase = _QUEUED
        self._wait_since = now = self._now()
        wait_s = self.profile.max_wait_s  # in the queue: neither the upload counts nor the service before a crash
        ticket = self._plane.admission.submit(
            self.profile,
            self,
            since=self.since,
            deadline=None if wait_s is None else now + wait_s - (self.queue_s or 0.0),
            needs_slot=self.route.needs_slot,
        )
        if self.phase is _QUEUED:
            self._ticket = ticket

    @property
    def only_looks(self) -> bool:
        return self.route.method == "GET"  # of HEAD too: it has GET's row

    def admitted(self, lease: Lease) -> None:
        try:
            self._admitted(lease)
        except Exception:
            _log.exception("a request failed unexpectedly", request_id=self.request_id.decode("latin-1"))
            self.fail(internal_error())

    def _admitted(self, lease: Lease) -> None:
        self._ticket = None
        if self.phase is not _QUEUED:  # against the contract; a slot must not leak for it
            lease.release()
            return
        self._lease = lease
        self.instance_id = lease.endpoint.instance_id
        now = self._now()
        if self.queue_s is None:
            self.queue_s = queue_s = now - self._wait_since
            metrics = self._plane.metrics
            metrics.queue_wait_count += 1
            if queue_s:
                metrics.queue_wait_total_ms += int(queue_s * 1000)
        pool: Pool = lease.endpoint.pool or pool_of(lease.endpoint, self._plane.node_id)
        kept = pool.take(now)
        if kept is not None:
            self.connected(kept)
        else:
            self._open(pool)

    def refused(self, error: MeshError) -> None:
        self._ticket = None
        if self.phase is _QUEUED:
            self.fail(error)

    # --- upstream connection

    @property
    def wants_connection(self) -> bool:
        return self.phase is _CONNECTING

    def _open(self, pool: Pool) -> None:
        self.phase = _CONNECTING
        if pool.endpoint.alive:
            pool.connect(self)
        else:
            self._try_elsewhere(UpstreamError("the instance is gone"))

    def connected(self, connection: UpstreamConnection) -> None:
        """Send the request."""
        client = self.client
        assert client is not None
        self.phase = _WAITING
        self._upstream = connection
        self._progress = _NOT_LOOKED  # the time before is nobody's silence
        connection.requester = self
        if client.write_paused:
            connection.pause_reading()
        pool, head, body = connection.pool, self.request, self._body
        self.expect(pool, not head.keep_alive or self._plane.ctx.draining)
        length = self.bytes_in
        if 0 < length <= _ONE_WRITE_BYTES:
            framing = b"Content-Length: %d\r\nX-Request-Id: " % length
            out = b"".join((head.forward, pool.fields, framing, self.request_id, b"\r\n\r\n", body))
            self._plane.outbox.write(connection.transport, out)
            return
        framing = b"Content-Length: %d\r\n" % length if length or head.method == b"POST" else b""
        out = b"%b%b%bX-Request-Id: %b\r\n\r\n" % (head.forward, pool.fields, framing, self.request_id)
        if length:
            connection.transport.writelines((out, body))  # nothing of it is held: what came before was answered
        else:
            self._plane.outbox.write(connection.transport, out)

    def connect_failed(self, error: UpstreamError) -> None:
        self._try_elsewhere(error)

    def answer_begins(self) -> None:
        """From here on the request is not sent again."""
        self.phase = _ANSWERING
        self._body = b""
        connection = self._upstream
        if connection is not None and not connection.reused:
            connection.pool.answers(connection)

    def upstream_lost(self, error: Exception | None) -> None:
        """The connection ended by itself: cleanly (*error* is None) or not."""
        connection, self._upstream = self._upstream, None
        if self.phase is _WAITING:
            assert self._lease is not None
            again = self.client is not None and self._lease.endpoint.alive
            if again and connection is not None and connection.reused:  # the next one is new, so this happens once
                self._plane.metrics.upstream_retries_total += 1
                self._open(connection.pool)
            else:
                self._try_elsewhere(UpstreamError("the instance closed the connection before it answered"))
        elif self.phase is _ANSWERING:
            if self.until_close and error is None:
                self.answer_complete(reusable=False)
            else:
                self.fail(UpstreamError("the instance closed the connection in the middle of its answer"))

    def _try_elsewhere(self, error: UpstreamError) -> None:
        """The instance is dead or dying: go back to the queue once, with the old place; else give up."""
        self._crashes += 1
        if self.client is None or self._crashes > 1 or self._lease is None:
            self.fail(error)
            return
        self._plane.metrics.upstream_retries_total += 1
        self.phase = _PAUSED
        # the lease is kept until then, so that its place is not given to a request that would meet the same
        delay_s = CRASH_NOTICE_S if self._lease.endpoint.alive else 0.0
        self._retry_timer = self._plane.loop.call_later(delay_s, self._resubmit)

    def _resubmit(self) -> None:
        self._retry_timer = None
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()
        self._submit()

    # --- back-pressure and limits

    def pause(self) -> None:
        """The client does not keep up: stop reading from the instance."""
        if self._upstream is not None:
            self._upstream.pause_reading()

    def resume(self) -> None:
        if self._upstream is not None:
            self._upstream.resume_reading()

    def check(self, now: float) -> None:
        """Called about twice a second: enforce the request's own limits."""
        limit_s = self.profile.max_request_s
        if limit_s and now - self.since > limit_s:
            self.fail(RequestExpiredError(limit_s, queued=self.phase is _QUEUED))
        elif self._plane.upstream_read_timeout_s and self._upstream is not None:
            self._check_progress(now, self.bytes_out, self._upstream.paused)

    def _check_progress(self, now: float, bytes_out: int, waits_for_client: bool) -> None:
        seen, since = self._progress
        silence_s = self._plane.upstream_read_timeout_s
        if bytes_out != seen or waits_for_client:
            self._progress = (bytes_out, now)
        elif now - since > silence_s:
            self.fail(UpstreamError(f"the instance sent nothing for {silence_s:g} s (upstream_read_timeout_ms)"))

    # --- the end

    def client_gone(self) -> None:
        """The client left. What it asked for is dropped, unless the profile shields its instance (trap 11)."""
        if self.phase is _DONE:
            return
        self._plane.metrics.client_disconnects_total += 1
        self.client = None
        if self.profile.drain_on_disconnect and self._upstream is not None:
            self.write = _discard
            self._plane.detached.add(self)
            self.resume()
            return
        self._let_go()
        self._end(_CLIENT_GONE_STATUS, "client_disconnected", self._now())

    def cut_short(self) -> None:
        """The node stops: end what goes on without a client."""
        if self.phase is not _DONE:
            self._let_go()
            self._end(_CLIENT_GONE_STATUS, "client_disconnected", self._now())

    def answer_complete(self, reusable: bool) -> None:
        assert self.response is not None
        status, client, connection, now = self.response.status, self.client, self._upstream, self._now()
        self._upstream = None
        if connection is not None:
            # one that answered before it had read the request is of no use any more; a small one it has read
            if reusable and (self.bytes_in <= _ONE_WRITE_BYTES or connection.transport.get_write_buffer_size() == 0):
                connection.pool.give(connection, now)
            else:
                connection.abort()
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()
        self._end(status, "instance_error" if status >= 500 else None, now)
        if client is not None:
            client.answered(not self.closes_client, now)

    def answer_broken(self, error: UpstreamError) -> None:
        self.fail(error)

    def fail(self, error: MeshError) -> None:
        """It cannot be answered, or not to the end: tell the client in the best way that is left."""
        if self.phase is _DONE:
            return
        client, response, now = self.client, self.response, self._now()
        self._let_go()
        if client is None:
            self._end(_CLIENT_GONE_STATUS, error.type, now)
        elif response is None:
            self._end(error.status, error.type, now)
            client.answer_error(error)
        else:
            event = error_event(error, self.route.dialect, self.request_id.decode("latin-1"))
            last_words = self.last_words(event)
            self._end(response.status, error.type, now)
            client.cut_off(last_words)

    def _let_go(self) -> None:
        """Give back whatever is held, in any phase."""
        if self._ticket is not None:
            self._ticket.cancel()
            self._ticket = None
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abort()
        lease, self._lease = self._lease, None
        if lease is not None:
            if upstream is not None:  # we cut the child off
                lease.abandon(streaming=self.response is not None and self.response.event_stream)
            else:
                lease.release()

    def _end(self, status: int, error: str | None, now: float) -> None:
        """Account for it. The only place where an exchange ends."""
        assert self.phase is not _DONE
        self.phase = _DONE
        self.stop()
        self._body = b""
        self._plane.finished(self, status, error, now)
        self.client = None


def _discard(data: bytes) -> None:
    """Where an answer goes whose client left."""
