"""One request's way through the node: admission, upstream connection, retries, accounting.

``Exchange`` is made when a request is complete and valid, and ends exactly once, in ``_end``, by whichever comes first:
the answer's last byte, an error, a timeout, or the client leaving. Whatever it holds (ticket, retry timer, upstream
connection, lease, the gauge) is given back on the way there; late calls find ``Phase.DONE`` and do nothing.

How the lease ends says whether the child is done with the request: ``release`` if it answered in full or closed the
connection itself, ``abandon`` if we cut it off, because a child may compute on for a while (traps 8, 9).

Where it goes, and where again, is its other half's (delivery.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.api.delivery import ONE_WRITE_BYTES, Client, Delivery, Phase
from mesh.api.http1 import RequestHead
from mesh.api.responses import RequestExpiredError, error_event, internal_error
from mesh.api.routes import Route
from mesh.api.upstream import Pool, pool_of
from mesh.config.profile import Profile
from mesh.engine.lease import Lease, Ticket
from mesh.errors import MeshError, PeerError, UpstreamError
from mesh.logs import Log
from mesh.metrics import ModelMetrics

if TYPE_CHECKING:
    from mesh.api.dataplane import DataPlane
    from mesh.api.peer_pool import PeerLease

_log = Log(__name__)

# Looking a member up on its class costs 70 ns in Python 3.11, many times per request.
_QUEUED, _PAUSED, _CONNECTING, _WAITING, _ANSWERING, _DONE = Phase

_CLIENT_GONE_STATUS = 499  # as nginx logs it; nobody receives it


class Exchange(Delivery):
    """See the module. It is also the ``Waiter`` of its admission and the ``Requester`` of its connection."""

    __slots__ = (
        "_ticket",
        "_wait_since",
        "address",
        "admitted_at",
        "instance_id",
        "model_metrics",
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
        super().__init__(plane, client, head, body, request_id, route.needs_slot)
        self.address = client.address
        self.route = route
        self.profile = profile
        self.since = since
        self.queue_s: float | None = None  #: until its first admission
        self.admitted_at = since  #: to whoever has it now
        self.instance_id: str | None = None
        self.model_metrics = model_metrics
        self._ticket: Ticket | None = None
        self._wait_since = since

    # --- admission

    def start(self) -> None:
        """Count the request and ask for an instance. Everything may happen inside this call, and nothing is raised."""
        metrics = self._plane.metrics
        metrics.requests_total += 1
        metrics.current_requests += 1
        self.model_metrics.requests_total += 1
        try:
            self.submit()
        except Exception:
            _log.exception("a request failed unexpectedly", request_id=self.request_id.decode("latin-1"))
            self.fail(internal_error())

    def submit(self) -> None:
        if self.trip is not None:
            self.trip.go()
            return
        wait_s = self.profile.max_wait_s  # in the queue: neither the upload counts nor the service before a crash
        self.queue_here(None if wait_s is None else wait_s - (self.queue_s or 0.0))

    def queue_here(self, wait_s: float | None) -> None:
        """Ask for an instance of this node; wait for at most *wait_s*."""
        self.phase = _QUEUED
        self._wait_since = now = self._now()
        ticket = self._plane.admission.submit(
            self.profile,
            self,
            since=self.since,
            deadline=None if wait_s is None else now + wait_s,
            needs_slot=self.route.needs_slot,
        )
        if self.phase is _QUEUED:
            self._ticket = ticket

    def ask_peer(self, lease: PeerLease) -> None:
        """Let a peer serve it."""
        self.phase = _QUEUED
        self._wait_since = self._now()
        self._peer = lease
        self.admitted(lease)

    @property
    def was_passed_on(self) -> bool:
        """Whether a peer served it."""
        return self.instance_id is not None and self.instance_id.startswith("@")

    def wait_in_line(self) -> float:
        """Do nothing until its trip goes on; return the time."""
        self.phase = _PAUSED
        self._wait_since = now = self._now()
        return now

    @property
    def waited_s(self) -> float:
        """How long it has waited, or been with a peer, since it was last given to somebody."""
        return self._now() - self._wait_since

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
        self.admitted_at = now = self._now()
        if self.trip is not None and self._peer is None:
            self.trip.waited(now - self._wait_since)
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
        if self.phase is not _QUEUED:
            return
        if self.trip is None or not self.trip.refused_here(error):
            self.fail(error)

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
            self.fail(RequestExpiredError(limit_s, queued=self.phase in (_QUEUED, _PAUSED)))
        elif self._plane.upstream_read_timeout_s and self._upstream is not None and self._peer is None:
            self._check_progress(now, self.bytes_out + self._upstream.bytes_sent, self._upstream.paused)

    def _check_progress(self, now: float, moved: int, waits_for_client: bool) -> None:
        seen, since = self._progress
        silence_s = self._plane.upstream_read_timeout_s
        if moved != seen or waits_for_client:
            self._progress = (moved, now)
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
            if reusable and (self.bytes_in <= ONE_WRITE_BYTES or connection.sent):
                connection.pool.give(connection, now)
            else:
                connection.abort()
        self._end_lease()
        self._end(status, "instance_error" if status >= 500 else None, now)
        if client is not None:
            client.answered(not self.closes_client, now)

    def answer_broken(self, error: UpstreamError) -> None:
        upstream = self._upstream
        if self._peer is None or self.phase is not _WAITING or upstream is None:
            self.fail(error)
            return
        self._upstream = None
        upstream.abort()
        self._try_elsewhere(PeerError(f"node {self._peer.node_id}: {error.message}"))

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
        lease, self._lease, self._peer = self._lease, None, None
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
        if self.trip is not None:
            self.trip.cancel()
            self.trip = None
        self._plane.finished(self, status, error, now)
        self.client = None


def _discard(data: bytes) -> None:
    """Where an answer goes whose client left."""
