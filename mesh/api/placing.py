"""This node among its peers: whether it should serve a request itself. The ``Local`` of ``forwarding``."""

from __future__ import annotations

from collections import Counter

from mesh.api.context import NodeContext
from mesh.api.exchange import Exchange
from mesh.api.own_state import OwnState
from mesh.api.routes import Capability
from mesh.config.profile import Profile
from mesh.core.node_state import Kind, PeerKey
from mesh.core.routing import Candidate, Ranked, Work, rank
from mesh.core.routing_view import beside
from mesh.net.peer import Peer

#: A prompt is not tokenized to route it: English in JSON has about four bytes per token.
BYTES_PER_TOKEN = 4
#: A peer must be so much faster before an idle, warm node of its own is even compared with it.
MUCH_FASTER = 1.5
_KINDS = {Capability.TEXT: Kind.TEXT, Capability.EMBEDDING: Kind.EMBEDDING, Capability.RERANK: Kind.RERANK}


class Placing:
    """See the module."""

    def __init__(self, ctx: NodeContext, own: OwnState, key: PeerKey) -> None:
        self._ctx = ctx
        self._own = own
        self._key = key
        self._turns: Counter[str] = Counter()
        self._first_turn = int.from_bytes(key[:2], "big")

    def serves(self, key: str) -> bool:
        """Whether this node may take new work for the profile."""
        return not self._ctx.drained and self._profile(key) is not None

    def _profile(self, key: str) -> Profile | None:
        profile = self._ctx.supervisor.catalog.names.get(key)
        return profile if profile is not None and profile.key == key and profile.max_instances else None

    def good_enough(self, key: str, peers: list[Peer]) -> bool:
        """Whether this node is idle and warm, and none of *peers* is known to be much faster."""
        load = self._ctx.supervisor.load(key)
        if load.busy or not load.has_room:
            return False
        own_tps = self._own.speed(key).figures().decode_tps
        if own_tps is None:
            return True
        rates = (peer.profiles[key].decode_tps for peer in peers if key in peer.profiles)
        return all(rate is None or rate < MUCH_FASTER * own_tps for rate in rates)

    def rank(self, exchange: Exchange, peers: list[Peer], *, here: bool) -> tuple[Ranked, ...]:
        """Return who would serve the request soonest; this node among them if it may (*here*)."""
        key = exchange.profile.key
        self._turns[key] += 1
        audio = exchange.route.capability is Capability.AUDIO  # its bytes are no prompt
        work = Work(
            profile=key,
            kind=_KINDS.get(exchange.route.capability),
            prompt_tokens=0 if audio else exchange.bytes_in // BYTES_PER_TOKEN,
            max_tokens=0 if audio else None,
            tokens=self._own.speed(key).figures().tokens,
            turn=self._first_turn + self._turns[key],
        )
        return self._ranked(work, exchange.profile, peers, here=here)

    def explain(
        self, profile: Profile, peers: list[Peer], *, prompt_tokens: int, max_tokens: int | None
    ) -> tuple[Ranked, ...]:
        """Return the same for a request that nobody made; nothing is counted."""
        work = Work(
            profile=profile.key,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            tokens=self._own.speed(profile.key).figures().tokens,
            turn=self._first_turn + self._turns[profile.key],
        )
        return self._ranked(work, profile, peers, here=self._profile(profile.key) is not None)

    def _ranked(self, work: Work, profile: Profile, peers: list[Peer], *, here: bool) -> tuple[Ranked, ...]:
        candidates = [peer.candidate(work.profile) for peer in peers]
        if here:
            candidates.append(
                Candidate(
                    key=self._key,
                    node_id=self._ctx.node_id,
                    profile=self._own.profile(profile),
                    local=True,
                    max_queue=profile.max_queue or None,
                    draining=self._ctx.drained,
                    beside=beside(self._own.active(), work.profile),
                )
            )
        return rank(work, candidates)
