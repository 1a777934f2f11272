"""The data plane: every HTTP/1.1 connection of the node, inference carried here, the rest handed to the app.

Theory of operation
===================

Not ASGI, because an ASGI server and an HTTP client cost 7 to 40 times what nginx does per small request, and this
costs about 1.7 times: one ``asyncio.Protocol`` per connection, callbacks instead of tasks, and bytes that are passed on
as they came. A few objects, each with one duty; data flows down the list and back up::

    ClientConnection (client.py)      one per client connection: turns, deadlines; refusing, closing: client_socket.py
      RequestReader                   its bytes cut into heads and bodies; sans-io (request_reader.py)
      FormReader (form_reader.py)     a form's body, parsed as it comes and spooled (spool.py); whose it is: forms.py
      FormStream (form_stream.py)     that of one from a peer, its file last: handed on as it comes
      Exchange (exchange.py)          one per request: admission, retries, lease, accounting; ends exactly once
        supervisor.submit             decides; calls ``admitted`` or ``refused``, perhaps at once
        FormExchange                  that of a form: adapted to its engine, both ways (form_exchange.py)
        UpstreamConnection, Pool      one per connection to an instance / per endpoint (upstream.py)
        Relay (relay.py)              its answer: head rewritten, body verbatim, framing followed
      AppSession (handoff.py)         one request for the Starlette app, through uvicorn's own parser

- **One request at a time per connection.** The next one is looked at when the last answer was written; what comes
  ahead is kept, and beyond 64 KiB not read.
- **Heads are memoised.** A client repeats itself: the last head of each connection, and the last few response heads of
  each pool, are recognised by two comparisons, their Content-Length digits left out (http1.py). The key is checked
  for every request, known head or not.
- **A request is read whole before it is admitted**, under a limit and a deadline: the model's name may be its last key,
  and a request that can be sent again needs its bytes. They are let go when an answer begins. Only the file of a large
  form that another node passes on is not waited for: that node keeps it (form_stream.py).
- **Large bodies are sent in pieces**, as fast as the other side takes them (sender.py); a form's is a view of a file.
- **An answer is never held.** Each read from the instance is one write to the client, at the end of the same turn of
  the loop (outbox.py). A client that does not keep up pauses reading from its instance (``pause_writing`` and back).
- **Deadlines without timers.** Every connection has one deadline; a sweep twice a second compares. No timer is made
  per request, and with no connection open there is no sweep.
- **The end comes once.** ``Exchange._end`` is the only end, and ``finished`` below the only accounting. A client that
  leaves ends its exchange, which aborts the upstream connection in the same call: llama-server sees it at once.
- **Never a clean end after a failure.** Before the answer's head a failure is a status; after it an event stream gets
  an error event and stays unterminated, anything else is cut off.

Nothing here decides who is served where, and nothing awaits on the path of a request: a new connection to an instance
is the only task, one per hundred requests.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
from collections.abc import Callable
from typing import Any

from mesh.api.client import ClientConnection
from mesh.api.context import NodeContext
from mesh.api.exchange import Exchange
from mesh.api.forwarding import Forwarder
from mesh.api.handoff import AppGateway
from mesh.api.http1 import RequestHead
from mesh.api.outbox import Outbox
from mesh.api.request_reader import Limits
from mesh.api.routes import Route
from mesh.config.profile import Catalog, Profile
from mesh.errors import MeshError, UnknownModelError
from mesh.metrics import Metrics, ModelMetrics

SWEEP_INTERVAL_S = 0.5
_MAX_FOUND = 4096  # names in any mixture of cases lead to the same profile


class DataPlane:
    """What all connections of the node share. Make it on the running loop; pass ``protocol`` to the listener."""

    def __init__(self, ctx: NodeContext, app: Any, *, sweep_interval_s: float = SWEEP_INTERVAL_S) -> None:
        http = ctx.settings.http
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time
        self.outbox = Outbox(self.loop)
        self._note = ctx.access_log.write
        self.metrics: Metrics = ctx.metrics
        self.admission = ctx.supervisor
        self.authenticator = ctx.authenticator
        self.gateway = AppGateway(app)
        self.node_id = re.sub(r"[^!-~]", "?", ctx.node_id)  # whatever a node is called, it must not break a header
        self.node_field = f"X-Llama-Mesh-Node: {self.node_id}\r\n".encode("ascii")
        self.limits = Limits(
            http.head_limit_bytes,
            http.request_body_limit_bytes,
            ctx.authenticator.header,
            http.upload_limit_bytes,
            http.upload_memory_bytes,
        )
        #: up to here a body is never too large, whatever it is
        self.any_body_bytes = min(http.request_body_limit_bytes, http.upload_limit_bytes)
        self.head_timeout_s: float = http.head_read_timeout_ms / 1000
        self.body_timeout_s: float = http.body_read_timeout_ms / 1000
        self.idle_timeout_s: float = http.idle_timeout_seconds
        self.upstream_read_timeout_s: float = ctx.settings.upstream_read_timeout_ms / 1000  #: 0 = no limit
        #: exchanges whose client left and that go on all the same (``drain_on_disconnect``)
        self.detached: set[Exchange] = set()
        self.connections: set[ClientConnection] = set()
        self.ctx = ctx
        self.forwarder: Forwarder | None = None  #: set by the app, in a mesh, as is ``learn``
        self.learn: Callable[[Exchange, float, tuple[int, int]], None] | None = None
        self._catalog: Catalog | None = None
        self._epoch = 0  # of what peers have
        self._found: dict[tuple[str | None, Route], tuple[Profile, ModelMetrics]] = {}
        self._id_prefix = secrets.token_hex(6).encode()
        self._ids = itertools.count(1)
        self._sweep_interval_s = sweep_interval_s
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._all_closed = asyncio.Event()
        self._all_closed.set()

    def protocol(self) -> ClientConnection:
        """Return the protocol for a new connection that speaks HTTP/1.1."""
        return ClientConnection(self)

    def find(self, name: str | None, route: Route) -> tuple[Profile, ModelMetrics]:
        """Return the profile for a requested name, able to do what *route* is for, and its counters.

        Raise the caller's error otherwise. What was found is remembered until the catalog, or what peers have, changes.
        """
        catalog = self.admission.catalog
        epoch = 0 if self.forwarder is None else self.forwarder.peers.epoch
        if catalog is not self._catalog or epoch != self._epoch:
            self._catalog, self._epoch = catalog, epoch
            self._found.clear()
        found = self._found.get((name, route))
        if found is None:
            profile = self._resolve(catalog, name)
            route.check(profile, name or profile.id)
            found = profile, self.metrics.model(profile.args_hash, profile.id)
            if len(self._found) < _MAX_FOUND:
                self._found[name, route] = found
        return found

    def _resolve(self, catalog: Catalog, name: str | None) -> Profile:
        try:
            return catalog.resolve(name)
        except UnknownModelError:
            wanted = catalog.default_model if name is None else name
            profile = None if self.forwarder is None or wanted is None else self.forwarder.find(wanted)
            if profile is None:
                raise
            return profile

    def next_id(self) -> bytes:
        """Return an id for a request that brought none: unique, short and cheap."""
        return b"%b-%x" % (self._id_prefix, next(self._ids))

    # --- connections

    def opened(self, connection: ClientConnection) -> None:
        self.connections.add(connection)
        self._all_closed.clear()
        if self._sweep_timer is None:
            self._sweep_timer = self.loop.call_later(self._sweep_interval_s, self._sweep)

    def closed(self, connection: ClientConnection) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._all_closed.set()

    def _sweep(self) -> None:
        now = self.now()
        for connection in tuple(self.connections):
            connection.check(now)
        for exchange in tuple(self.detached):
            exchange.check(now)
        busy = self.connections or self.detached
        self._sweep_timer = self.loop.call_later(self._sweep_interval_s, self._sweep) if busy else None

    @property
    def busy(self) -> bool:
        """Whether an inference request is under way, or its body on its way: what a drain waits for."""
        return self.metrics.current_requests > 0 or any(c.reads_body for c in self.connections)

    def begin_drain(self) -> None:
        """Close idle connections now and every other one after its answer. ``ctx.draining`` is set by the app."""
        for connection in tuple(self.connections):
            connection.drain()

    async def close(self, grace_s: float = 0.0) -> None:
        """Wait *grace_s* for the connections to end, then abort those that are left. Idempotent."""
        self.begin_drain()
        try:
            async with asyncio.timeout(grace_s):
                await self._all_closed.wait()
        except TimeoutError:
            for connection in tuple(self.connections):
                connection.abort()
            await self._all_closed.wait()
        for exchange in tuple(self.detached):
            exchange.cut_short()
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None

    # --- accounting

    def finished(self, exchange: Exchange, status: int, error: str | None, now: float) -> None:
        """Account for an exchange that has just ended. Called once for each."""
        since, head, metrics, model = exchange.since, exchange.request, self.metrics, exchange.model_metrics
        duration_s = now - since
        metrics.current_requests -= 1
        if self.detached:
            self.detached.discard(exchange)
        generated = 0
        if exchange.watched:
            prompt, generated = tokens = exchange.count_tokens()
            if self.learn is not None and status == 200 and error is None and not exchange.was_passed_on:
                self.learn(exchange, now, tokens)
            model.tokens_prompt_total += prompt
            model.tokens_generated_total += generated
        ttft_s = None if exchange.first_byte_at is None else exchange.first_byte_at - since
        if error is not None and error != "client_disconnected":
            metrics.errors_total += 1
            model.errors_total += 1
        model.observe(duration_s, ttft_s)
        self._note(
            exchange.request_id.decode("latin-1"),
            exchange.address,
            head.method_text,
            head.path_text,
            status,
            duration_s,
            exchange.profile.id,
            exchange.instance_id,
            exchange.bytes_in,
            exchange.bytes_out,
            exchange.queue_s,
            ttft_s,
            generated or None,
            error,
        )

    def refused(
        self, head: RequestHead | None, address: str, request_id: bytes, since: float, error: MeshError
    ) -> None:
        """Note a request that never became an exchange."""
        self._note(
            request_id=request_id.decode("latin-1"),
            client=address,
            method="" if head is None else head.method_text,
            path="" if head is None else head.path_text,
            status=error.status,
            duration_s=self.now() - since,
            error=error.type,
        )
