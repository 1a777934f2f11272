"""Data planes that are joined by real links: what each is told of the others is the test's, all the rest is real.

A ``MeshNode`` has a listener for clients and links, an admission that does as it is told, and an instance that answers
by script. ``met`` makes nodes know each other, by records as gossip would bring them. At the end of each test all must
have been given back: leases, tickets, gauges, own forwards, pauses, links and tasks (traps 1, 63).
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from starlette.applications import Starlette

from mesh.api.auth import Authenticator
from mesh.api.client import ClientConnection
from mesh.api.context import NodeContext
from mesh.api.dataplane import DataPlane
from mesh.api.forwarding import Forwarder
from mesh.api.own_state import OwnState
from mesh.api.placing import Placing
from mesh.api.upstream import UpstreamConnection
from mesh.config.profile import Catalog, Profile
from mesh.config.settings import Settings
from mesh.core.breaker import Limits
from mesh.core.node_state import NodeState, PeerKey, ProfileState, encode_state
from mesh.engine.lease import Endpoint
from mesh.engine.memory_report import Fit, ModelFit
from mesh.engine.supervisor import ProfileLoad
from mesh.errors import LinkError
from mesh.metrics import Metrics
from mesh.net.link import Link
from mesh.net.links import Links
from mesh.net.listener import Listener
from mesh.net.peer import Peer
from mesh.net.peers import Peers, stand_in
from mesh.net.version_policy import VersionPolicy
from tests.api.loopback import LoopbackNode, RecordedAccess, catalog, profile
from tests.fakes import FakeAdmission, Script, ScriptedUpstream, json_reply
from tests.fakes_supervisor import FakeInstance, FakeSupervisor
from tests.members import sync
from tests.net.link_nodes import FakeTrust
from tests.net.link_sessions import PSK, FakeIdentity

TINY = "tiny:default"
NEVER_OPENS = Limits(failure_threshold=1000)


def offers(key: str = TINY, **changes: Any) -> ProfileState:
    """A profile as a record has it: loaded, idle, of known speed."""
    model, _, name = key.partition(":")
    values: dict[str, Any] = {"id": model if name == "default" else key, "ready": 1, "slots": 4, "decode_tps": 100.0}
    return ProfileState(key=key, **(values | {"service_s": 1.0, "load_s": 5.0} | changes))


@dataclass
class Record:
    """What gossip would know of a member."""

    key: PeerKey
    payload: bytes
    version: int
    status: str = "alive"
    incarnation: int = 1
    updated_at: float = 0.0


class MeshAdmission(FakeAdmission, FakeSupervisor):
    """A fake supervisor that also serves: one instance with four slots, loaded unless it is ``cold``."""

    def __init__(self, known: Catalog, endpoint: Endpoint) -> None:
        FakeSupervisor.__init__(self, *known.profiles)
        FakeAdmission.__init__(self, known, endpoint)
        self.cold = False

    def instances(self) -> Sequence[FakeInstance]:
        profile = self.endpoint.profile
        return () if self.cold else (FakeInstance(self.endpoint.instance_id, profile.key, profile.id),)

    def queues(self) -> Mapping[str, int]:
        waiting = Counter(t.profile.key for t in self.tickets if not (t.decided or t.cancelled))
        return dict(waiting)

    def load(self, key: str) -> ProfileLoad:
        busy = sum(1 for lease in self.leases if not lease.ended)
        return ProfileLoad(queued=self.queues().get(key, 0), ready=0 if self.cold else 1, busy=busy, slots=4)

    async def model_fits(self) -> Sequence[ModelFit]:
        return [ModelFit(p.key, p.id, Fit.NOW) for p in self.catalog.profiles]


class _Heard(ClientConnection):
    """The protocol of a link, which notes what comes."""

    node: MeshNode

    def data_received(self, data: bytes) -> None:
        self.node.heard += data
        if self.node.on_heard is not None and self.node.on_heard(cast(Link, self._transport)):
            return
        super().data_received(data)


class MeshNode(LoopbackNode):
    """See the module."""

    admission: MeshAdmission

    def __init__(self, number: int, plane: DataPlane, ctx: NodeContext, admission: MeshAdmission,
                 access: RecordedAccess, instance: ScriptedUpstream, limits: Limits) -> None:  # fmt: skip
        super().__init__(plane, ctx, admission, access)
        self.name = f"node-{number}"
        self.instance = instance
        self.identity = FakeIdentity(number)
        self.heard = bytearray()  #: on links, from peers
        #: called with the link before what came is looked at; if it returns True, that is not
        self.on_heard: Callable[[Link], bool] | None = None
        self.late = 0.0  #: how far this node's clock is ahead
        loop_time = plane.loop.time
        plane.now = lambda: loop_time() + self.late
        self.dials: list[str] = []
        self.dial_s = 5.0
        self.members: dict[PeerKey, Record] = {}
        self.peers = Peers(
            limits, VersionPolicy("1.0", "warn"), plane.now,
            lambda state: stand_in(state, max_wait_s=self.stand_in_wait_s, max_request_s=None, max_queue=0),
        )  # fmt: skip
        self.stand_in_wait_s: float | None = 60.0
        self.own = OwnState(ctx, boot="b", addresses=tuple)
        self.forwarder = Forwarder(
            self.peers, Placing(ctx, self.own, self.identity.key), node_id=ctx.node_id, dial=self._dial,
            max_hops=ctx.settings.max_hops,
        )  # fmt: skip
        self.links = Links(
            identity=self.identity, psk=PSK, trust=FakeTrust(), node_id=self.name, version="1.0", serve=self._serve,
        )  # fmt: skip
        plane.forwarder = self.forwarder
        self.listener = Listener("127.0.0.1", 0, plane.protocol, detect_timeout_s=5, noise=self.links.accept)

    def _serve(self) -> ClientConnection:
        connection = _Heard(self.plane)
        connection.node = self
        return connection

    async def _dial(self, peer: Peer, factory: Callable[[], UpstreamConnection]) -> UpstreamConnection:
        """As ``mesh.member`` does it."""
        self.dials.append(peer.node_id)
        error: Exception = LinkError(f"no address of node {peer.node_id} is known")
        for address in peer.addresses():
            host, _, port = address.rpartition(":")
            try:
                _, connection = await self.links.dial(host, int(port), factory, timeout_s=self.dial_s, expect=peer.key)
            except LinkError as failure:
                error = failure
            else:
                return connection
        raise error

    def knows(self, other: MeshNode, *profiles: ProfileState, port: int | None = None, **changes: Any) -> Peer:
        """Take over a new record of *other*; return the peer."""
        old = self.members.get(other.identity.key)
        state = NodeState(other.name, version="1.0", addresses=(f"127.0.0.1:{port or other.port}",), profiles=profiles)
        state = msgspec.structs.replace(state, **changes)
        version = 1 if old is None else old.version + 1
        now = self.plane.now()
        self.members[other.identity.key] = Record(other.identity.key, encode_state(state), version, updated_at=now)
        sync(self.peers, *self.members.values())
        return self.peer(other)

    def forgets(self, other: MeshNode) -> None:
        """*other* is no member any more."""
        del self.members[other.identity.key]
        sync(self.peers, *self.members.values())

    def peer(self, other: MeshNode) -> Peer:
        peer = self.peers.get(other.identity.key)
        assert peer is not None
        return peer

    @property
    def pool(self) -> Any:
        """Of the only peer that was asked."""
        (endpoint,) = self.forwarder._endpoints.values()
        return endpoint.pool

    def drop_links(self, other: MeshNode) -> None:
        """Close what is kept for requests to *other*."""
        endpoint = self.forwarder._endpoints.pop(other.identity.key, None)
        if endpoint is not None:
            endpoint.close()

    async def turn(self, count: int = 6) -> None:
        """Let the loop look at its sockets *count* times; on loopback what was written has arrived then."""
        for _ in range(count):
            await asyncio.sleep(0)

    def links_to(self, other: MeshNode) -> list[Link]:
        return [link for link in self.links.links if link.peer.key == other.identity.key]

    async def settled(self) -> None:
        await super().settled()
        assert not any(len(line) for line in self.forwarder.lines.values())
        for peer in self.peers:
            assert not peer.forwards, peer.node_id


@asynccontextmanager
async def mesh_node(
    number: int,
    *scripts: Script,
    profiles: tuple[Profile, ...] | None = None,
    default_model: str | None = None,
    settings: dict[str, Any] | None = None,
    limits: Limits = NEVER_OPENS,
    sweep_interval_s: float = 0.02,
) -> AsyncIterator[MeshNode]:
    """A node that has *profiles* (``tiny`` unless told otherwise), served by *scripts*."""
    configured = Settings.model_validate({"node_id": f"node-{number}", **(settings or {})})
    profiles = (profile(),) if profiles is None else profiles
    async with AsyncExitStack() as stack:
        instance = await stack.enter_async_context(ScriptedUpstream(*(scripts or (json_reply(b"{}"),))))
        endpoint = Endpoint(f"tiny-{number}", (profiles or (profile(),))[0], "127.0.0.1", instance.port)
        admission = MeshAdmission(catalog(*profiles, default_model=default_model), endpoint)
        access = RecordedAccess()
        ctx = NodeContext(
            settings=configured,
            supervisor=cast(Any, admission),
            metrics=Metrics(f"node-{number}"),
            access_log=cast(Any, access),
            authenticator=Authenticator(configured.auth),
            node_id=f"node-{number}",
            started_at_wall=0.0,
        )
        plane = DataPlane(ctx, Starlette(), sweep_interval_s=sweep_interval_s)
        node = MeshNode(number, plane, ctx, admission, access, instance, limits)
        await node.own.look()
        await node.listener.start()
        node.port = node.listener.port
        try:
            yield node
            await node.settled()
        finally:
            await _close(node)


async def _close(node: MeshNode) -> None:
    await node.listener.close()
    node.admission.endpoint.close()
    node.forwarder.close()
    for client in node.clients:
        client.abort()
        with suppress(OSError):
            await client.writer.wait_closed()
    await node.plane.close()
    await node.links.close()
    assert not node.links.half_open


class _Bugs(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _no_bug_logged() -> Iterator[None]:
    """What is caught and only logged is a bug all the same."""
    bugs = _Bugs()
    logging.getLogger().addHandler(bugs)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(bugs)
    assert bugs.messages == []


@asynccontextmanager
async def met(*nodes: Any) -> AsyncIterator[tuple[MeshNode, ...]]:
    """Enter *nodes*, made by ``mesh_node``, and tell each of what the others have. Nothing stays behind."""
    before = asyncio.all_tasks()
    async with AsyncExitStack() as stack:
        stack.enter_context(_no_bug_logged())
        made = [await stack.enter_async_context(node) for node in nodes]
        for one in made:
            for other in made:
                if other is not one:
                    theirs = other.admission.catalog.profiles
                    one.knows(other, *(offers(p.key, id=p.id, aliases=p.aliases) for p in theirs))
        yield tuple(made)
        for node in made:
            await node.settled()
    async with asyncio.timeout(5):
        while asyncio.all_tasks() - before:  # noqa: ASYNC110  # they end by themselves, all of them
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.005)
    gc.collect()  # what was forgotten is complained about here, not in somebody else's test
