"""This node's part in the mesh: builds keys, links, gossip, discovery and forwarding, and runs them together.

A composition root like ``app``, for what only ``cluster.enabled`` needs. It decides nothing itself: gossip knows who is
a member, ``peers`` what they have, ``placing`` and ``forwarding`` who serves, and each learns of the others only here.
Nothing on the path of a request waits for anything here.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from mesh import __version__
from mesh.api.context import NodeContext
from mesh.api.dataplane import DataPlane
from mesh.api.forwarding import Forwarder
from mesh.api.own_state import OwnState
from mesh.api.placing import Placing
from mesh.config.engines import max_wait_s
from mesh.config.profile import Profile
from mesh.config.settings import Settings
from mesh.core import breaker
from mesh.core.gossip_message import MAX_RECEIVED_BYTES
from mesh.core.gossip_record import MAX_PAYLOAD_BYTES
from mesh.core.membership import Change, MemberView
from mesh.core.node_state import PeerIdentity, PeerKey, ProfileState, encode_state
from mesh.core.routing import Ranked
from mesh.errors import ConfigError, RequestError, UnknownModelError
from mesh.logs import Log
from mesh.net.addresses import own_addresses
from mesh.net.cluster_files import cluster_files
from mesh.net.discovery import Discovery
from mesh.net.gossip import Gossip
from mesh.net.keys import fingerprint, load_identity, looks_like_key, verify
from mesh.net.link_client import LinkClient
from mesh.net.links import Links
from mesh.net.outreach import Outreach
from mesh.net.peers import Peers, engine_of, stand_in
from mesh.net.peers_file import read_peers
from mesh.net.token import load_token, psk_of
from mesh.net.trust import load_trust
from mesh.net.version_policy import VersionPolicy
from mesh.tasks import forever, spawn, wall_time

log = Log(__name__)

#: How often this node looks whether it has news of itself; urgent ones go out at once then.
LOOK_EVERY_S: Final = 0.2
#: News of load (full, not full) are urgent, but no more often than this.
LOAD_NEWS_EVERY_S: Final = 1.0
#: How often the files of trust are looked at, and live links count as signs of life.
TRUST_EVERY_S: Final = 1.0
SAVE_SPEEDS_EVERY_S: Final = 60.0
#: Several changes of members within this are taken over together.
SYNC_DELAY_S: Final = 0.02
LEAVE_S: Final = 2.0  #: for the last bytes of links

NO_TOKEN = (
    "cluster.enabled is true, but there is no cluster token. On the first node run 'llama-mesh token new', on every"
    " other one 'llama-mesh join HOST --token -'; or give all of them the same CLUSTER_TOKEN"
)


class MeshMember:
    """See the module. Made on the running loop before the listener; ``start`` once it listens."""

    def __init__(self, ctx: NodeContext, plane: DataPlane) -> None:
        """Read keys and trust; raise ``ConfigError`` if they cannot be used."""
        settings, noise = ctx.settings, ctx.settings.cluster.noise
        token = load_token(noise, os.environ)
        if token is None:
            raise ConfigError(NO_TOKEN)
        if looks_like_key(ctx.node_id) or ctx.node_id == "-":
            raise ConfigError(f"node_id: other nodes would take '{ctx.node_id}' for a key; choose another name")
        self._ctx = ctx
        self._plane = plane
        self._loop = asyncio.get_running_loop()
        self._cluster = settings.cluster
        self._identity = load_identity(noise, os.environ)
        self._trust = load_trust(noise, node_id=ctx.node_id, key=self._identity.key)
        self._peers_file = cluster_files(noise).peers
        metrics = Path(settings.metrics_path).expanduser()
        self._speeds_path = metrics.with_name(metrics.stem + ".speeds.json")
        self._addresses: tuple[str, ...] = ()
        self._untold = 0  #: profiles that had no room in the record
        versions = VersionPolicy(__version__, settings.cluster.version_mismatch_action)
        self.peers = Peers(_breaker_limits(settings), versions, self._loop.time, _stand_in(settings))
        self._links = Links(
            identity=self._identity,
            psk=psk_of(token),
            trust=self._trust,
            node_id=ctx.node_id,
            version=__version__,
            serve=plane.protocol,
        )
        self._client = LinkClient(self._links, max_body_bytes=MAX_RECEIVED_BYTES)
        self._outreach = Outreach(self._links, self._client, self.peers, self._loop.time)
        self.own = OwnState(ctx, boot=secrets.token_hex(8), addresses=lambda: self._addresses)
        self._placing = Placing(ctx, self.own, self._identity.key)
        self._forwarder = Forwarder(
            self.peers, self._placing, node_id=ctx.node_id, dial=self._outreach.dial, max_hops=settings.max_hops
        )
        self._gossip = Gossip(
            identity=self._identity,
            payload=self._payload(),
            incarnation=int(wall_time()),
            verify=verify,
            allows=self._trust.allows,
            exchange=self._outreach.exchange,
            contacts=lambda: self._discovery.contacts() if self._discovery is not None else (),
            own_addresses=lambda: self._addresses,
            on_change=self._member_changed,
            interval_s=self._cluster.gossip_interval_seconds,
            max_concurrent=self._cluster.max_concurrent_gossip,
        )
        self._discovery: Discovery | None = None
        self._leaving: asyncio.Task[None] | None = None  #: the goodbye of discovery
        self._tasks: list[asyncio.Task[None]] = []
        self._changed: dict[PeerKey, MemberView] = {}  #: what of the others is to be taken over
        self._sync_timer: asyncio.TimerHandle | None = None
        self._told: tuple[object, object] = (None, None)
        self._load_told_at = float("-inf")
        self._look_at = 0.0

    # --- life

    @property
    def accept(self) -> Callable[[], asyncio.Protocol]:
        """What the listener gives connections to that begin a link."""
        return self._links.accept

    async def start(self, host: str, port: int) -> None:
        """Join: *host* and *port* are where the node listens. Never fails for want of a network."""
        self._where = host, port
        await self._look(self._loop.time())
        self._gossip.publish(self._payload(), urgent=True)
        self._discovery = Discovery(
            self._cluster,
            node_id=self._ctx.node_id,
            fingerprint=self.own_fingerprint,
            version=__version__,
            listen_host=host,
            port=port,
            on_found=lambda address: self._gossip.contacts_changed(),
            read_peers=lambda: read_peers(self._peers_file),
        )
        await self._discovery.start()
        self._ctx.mesh = self
        self._plane.forwarder = self._forwarder
        self._plane.learn = self.own.finished
        self.own.restore(self._speeds_path, self._loop.time())
        self._tasks = [
            spawn(self._gossip.run(), "gossip"),
            spawn(forever(self._save_speeds, every_s=SAVE_SPEEDS_EVERY_S, name="speeds"), "speeds"),
            spawn(forever(self._announce, every_s=LOOK_EVERY_S, name="announce"), "announce"),
            spawn(forever(self._keep_trust, every_s=TRUST_EVERY_S, name="trust"), "trust"),
        ]
        log.info("in the mesh", node=self._ctx.node_id, fingerprint=self.own_fingerprint, addresses=self._addresses,
                 contacts=self._discovery.contacts(), mdns=self._cluster.discovery.mdns)  # fmt: skip

    def begin_drain(self) -> None:
        """The node stops: let the others know now, and be found by nobody new."""
        self._gossip.publish(self._payload(), urgent=True)
        if self._discovery is not None:
            self._leaving = spawn(self._discovery.close(), "leave mDNS")

    async def close(self) -> None:
        """Say goodbye and end every link. Requests that others serve for this node must be over."""
        for task in self._tasks[1:]:
            task.cancel()
        await self._gossip.leave()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._discovery is not None:
            await (self._leaving or self._discovery.close())  # a goodbye that is under way is not cut short
        await self._save_speeds()
        self._forwarder.close()
        await self._client.close()
        await self._links.close(grace_s=LEAVE_S)
        if self._sync_timer is not None:  # last: until the links are closed, others may tell something
            self._sync_timer.cancel()
            self._sync_timer = None
        await self._trust.close()

    # --- what this node tells

    def _payload(self) -> bytes:
        """Return this node's state as it travels; of a cookbook that is too long for a record, what has room."""
        state = self.own.state()
        payload, told = encode_state(state), len(state.profiles)
        while len(payload) > MAX_PAYLOAD_BYTES:
            told = min(told - 1, told * MAX_PAYLOAD_BYTES // len(payload))
            payload = encode_state(msgspec.structs.replace(state, profiles=state.profiles[:told]))
        untold = len(state.profiles) - told
        if untold and not self._untold:
            log.error("the cookbook is too long to be told to other nodes; they do not hear of its last models",
                      models=len(state.profiles), untold=untold, limit_bytes=MAX_PAYLOAD_BYTES)  # fmt: skip
        self._untold = untold
        return payload

    async def _announce(self) -> None:
        """Let the others know what has changed here: at once what decides who is asked, the rest with the next tick."""
        now = self._loop.time()
        self.own.time_loads(now)
        urgent = self._has_urgent_news(now)
        if not urgent and now < self._look_at:
            return
        await self._look(now)
        urgent = urgent or self._has_urgent_news(now)  # it takes its time, and may find other addresses
        self._gossip.publish(self._payload(), urgent=urgent)
        if urgent:
            self._told, self._load_told_at = self.own.shape(), now

    def _has_urgent_news(self, now: float) -> bool:
        (shape, load), (told_shape, told_load) = self.own.shape(), self._told
        return shape != told_shape or (load != told_load and now - self._load_told_at >= LOAD_NEWS_EVERY_S)

    async def _look(self, now: float) -> None:
        self._look_at = now + self._cluster.gossip_interval_seconds
        host, port = self._where
        self._addresses = await asyncio.to_thread(own_addresses, host, port, self._ctx.settings.public_url)
        await self.own.look()

    async def _save_speeds(self) -> None:
        await self.own.save(self._speeds_path)

    async def _keep_trust(self) -> None:
        """Cut off whom the operator does not trust any more; count live links (trap 55), try open circuits (52)."""
        for key in await self._trust.refresh():
            links = self._links.drop(key)
            self._gossip.forget(key)
            log.warning("a key is not trusted any more", fingerprint=fingerprint(key), links_cut=links)
        for link in self._links.links:
            if link.heard_lately:
                self._gossip.heard(link.peer.key)
        now = self._loop.time()
        for peer in self.peers:
            if peer.breaker.phase is not breaker.Phase.CLOSED and peer.breaker.refusal_s(now) is None:
                self._gossip.probe(peer.key)  # in a large mesh its turn would come much later (trap 52)

    # --- what others tell

    @property
    def own_fingerprint(self) -> str:
        return fingerprint(self._identity.key)

    @property
    def largest_message_bytes(self) -> int:
        return MAX_RECEIVED_BYTES

    def gossip(self, peer: PeerIdentity, body: bytes) -> bytes:
        """See ``MeshView``."""
        try:
            return self._gossip.receive(peer, body)
        except ValueError as error:
            raise RequestError(str(error)) from error

    def _member_changed(self, change: Change, member: MemberView) -> None:
        """Note the latest of *member*; several changes are taken over together. Whether it left is in its status."""
        self._changed[member.key] = member
        if self._sync_timer is None:
            self._sync_timer = self._loop.call_later(SYNC_DELAY_S, self._sync)

    def _sync(self) -> None:
        self._sync_timer = None
        changed, self._changed = self._changed, {}
        for key, member in changed.items():
            self.peers.changed(key, member)

    async def call(self, node_id: str, path: str, body: Mapping[str, Any], *, timeout_s: float | None) -> Any:
        """See ``MeshView``."""
        peer = self.peers.named(node_id)
        if peer is None:
            known = ", ".join([self._ctx.node_id, *(peer.node_id for peer in self.peers)])
            raise RequestError(f"there is no node '{node_id}'; there are: {known}", param="node")
        return await self._outreach.call(peer, path, body, timeout_s=timeout_s)

    # --- who serves

    def explain(
        self, name: str | None, *, prompt_tokens: int, max_tokens: int | None
    ) -> tuple[Profile, Sequence[Ranked]]:
        """See ``MeshView``."""
        catalog = self._ctx.supervisor.catalog
        try:
            profile = catalog.resolve(name)
        except UnknownModelError:
            wanted = name or catalog.default_model
            found = None if wanted is None else self.peers.profile(wanted)
            if found is None:
                raise
            profile = found
        peers = [peer for peer in self.peers if peer.has(profile.key)]
        return profile, self._placing.explain(profile, peers, prompt_tokens=prompt_tokens, max_tokens=max_tokens)


def _breaker_limits(settings: Settings) -> breaker.Limits:
    own = settings.cluster.circuit_breaker
    return breaker.Limits(
        enabled=own.enabled,
        failure_threshold=own.failure_threshold,
        success_threshold=own.success_threshold,
        open_base_s=own.open_duration_base_ms / 1000,
        open_max_s=own.open_duration_max_ms / 1000,
        probe_interval_s=own.half_open_probe_interval_ms / 1000,
    )


def _stand_in(settings: Settings) -> Callable[[ProfileState], Profile]:
    """Return what makes a profile of this node out of what others have, under this node's own limits."""
    defaults = settings.model_defaults
    return lambda state: stand_in(
        state,
        max_wait_s=max_wait_s(engine_of(state), defaults.max_wait_in_queue_ms),
        max_request_s=defaults.max_request_duration_ms / 1000 or None,
        max_queue=defaults.max_queue_size_per_model,
    )
