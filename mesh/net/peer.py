"""One other node, as far as this one knows it: its record, its circuit breaker, its distance, own requests there.

Figures of its record are corrected at once by what it says in person (trap 61), until its next record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from mesh.core.breaker import Breaker, Limits, Permit, Phase
from mesh.core.node_state import Fit, NodeState, PeerKey, ProfileState, decode_state
from mesh.core.routing import Candidate
from mesh.core.routing_view import beside
from mesh.logs import Log
from mesh.metrics import PeerGauge
from mesh.net.keys import fingerprint

_log = Log(__name__)

#: How much of the difference a new measurement of the distance makes.
_RTT_WEIGHT = 0.25
#: Refusals that say something of the profile that its record does not yet.
_WITHOUT = {
    "model_not_found": "it says that it does not have the model",
    "model_too_large": "it says that the model is too large for it",
    "engine_missing": "it says that it has no engine",
    "instance_failed": "it says that the model does not start",
}


#: How long a refusal is believed, if no newer record comes: not for ever, for it may be about a moment.
BELIEVED_S = 10.0
#: Refusals that pass soon, and how long nobody asks again after one.
FULL = frozenset({"queue_full", "no_capacity"})
FULL_S = 1.0
#: A record that does not change is still true: what changes is told within a few exchanges. It counts as no older.
SETTLED_S = 5.0


class Member(Protocol):
    """What gossip tells of a member."""

    @property
    def key(self) -> PeerKey: ...
    @property
    def payload(self) -> bytes: ...
    @property
    def status(self) -> str: ...
    @property
    def incarnation(self) -> int: ...
    @property
    def version(self) -> int:
        """Of its record; a newer record has a greater one, or a greater incarnation."""

    @property
    def updated_at(self) -> float: ...


class _Said(NamedTuple):
    """A refusal that a peer gave in person."""

    why: str
    until: float  #: it is believed
    passes: bool = False  #: the peer was only full


class Peer:
    """One other node."""

    __slots__ = (
        "_names",
        "_now",
        "_own_then",
        "_said",
        "_since_loading",
        "breaker",
        "failures_total",
        "forwards",
        "forwards_total",
        "good_address",
        "key",
        "node_id",
        "profiles",
        "refusals_total",
        "rejected",
        "rtt_s",
        "stamp",
        "state",
        "status",
        "updated_at",
    )

    def __init__(self, key: PeerKey, limits: Limits, now: Callable[[], float]) -> None:
        self._now = now
        self.key = key
        self.node_id = ""
        self.state = NodeState("")
        self.profiles: Mapping[str, ProfileState] = {}
        self._names: frozenset[object] = frozenset()
        self.status = "alive"  #: as gossip has it: alive, suspect or dead
        self.stamp = (-1, -1)
        self.updated_at = 0.0
        self.rejected: str | None = None  #: why it takes no part, for example its version
        self.breaker = Breaker(limits)
        self.rtt_s: float | None = None
        self.good_address: str | None = None  #: the one that worked last
        self.forwards: Counter[str] = Counter()  #: own requests that are in flight there, by profile
        self._own_then: Mapping[str, int] = {}
        #: what it said in person and its record does not: why it takes no request for a profile, and until when that
        #: is believed; None stands for all profiles
        self._said: dict[str | None, _Said] = {}
        self._since_loading: dict[str, float] = {}
        self.forwards_total = 0
        self.failures_total = 0
        self.refusals_total = 0

    @property
    def alive(self) -> bool:
        return self.status != "dead"

    @property
    def age_s(self) -> float:
        """How old its record is."""
        return max(0.0, self._now() - self.updated_at)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.key)

    @property
    def offer(self) -> tuple[object, ...]:
        """Return what decides which names lead here; how busy it is does not."""
        return self.alive, self.node_id, self._names

    def is_as(self, member: Member) -> bool:
        """Whether *member* tells nothing new."""
        return self.stamp == (member.incarnation, member.version) and self.status == member.status

    def update(self, member: Member) -> bool:
        """Take over what gossip knows; return whether it is a new record. Raise ``ValueError`` if it is malformed."""
        self.status = str(member.status)
        stamp = (member.incarnation, member.version)
        if stamp == self.stamp:
            return False
        self.state = state = decode_state(member.payload)
        self.stamp, self.updated_at = stamp, member.updated_at
        self.node_id = state.node_id
        self.profiles = {profile.key: profile for profile in state.profiles}
        self._names = frozenset((p.key, p.id, p.aliases, p.kind, p.multimodal, p.description) for p in state.profiles)
        self._own_then = dict(self.forwards)
        self._said.clear()
        loading = {key for key, profile in self.profiles.items() if profile.loading}
        now = self._now()
        self._since_loading = {key: self._since_loading.get(key, now) for key in loading}
        return True

    @property
    def draining(self) -> bool:
        """Whether it takes no new work, as its record or itself says."""
        return self.state.draining or self._told(None) is not None

    def corrected(self, key: str, kind: str, stamp: tuple[int, int]) -> None:
        """Note what it said in person: a refusal of the given *kind* for the profile *key*.

        *stamp* is that of the record which led there; a newer record knows better.
        """
        self.refusals_total += 1
        if stamp != self.stamp:
            return
        now = self._now()
        if kind == "draining":
            self._said[None] = _Said("draining", now + BELIEVED_S)
        elif kind in FULL:
            self._said[key] = _Said("it said a moment ago that it is full", now + FULL_S, passes=True)
        elif kind in _WITHOUT:
            self._said[key] = _Said(_WITHOUT[kind], now + BELIEVED_S)

    def _believed(self, key: str | None) -> _Said | None:
        """Return what it said of *key* in person, while that is believed."""
        said = self._said.get(key)
        if said is not None and said.until <= self._now():
            del self._said[key]
            return None
        return said

    def _told(self, key: str | None) -> str | None:
        said = self._believed(key)
        return None if said is None else said.why

    def has(self, key: str) -> bool:
        return key in self.profiles

    # --- own requests there

    def begin(self, key: str) -> Permit | None:
        """Count a request for the profile *key*, from the decision on (trap 50)."""
        self.forwards_total += 1
        self.forwards[key] += 1
        now = self._now()
        profile = self.profiles.get(key)
        if profile is not None and not profile.ready and profile.fit != Fit.WAIT:  # else the load begins later
            self._since_loading.setdefault(key, now)
        return self.breaker.allows(now)

    def end(self, key: str, permit: Permit | None) -> None:
        """It is over, however it ended. A probe that nothing came of, since its client left, makes way for the next."""
        self.forwards[key] -= 1
        if self.forwards[key] <= 0:
            del self.forwards[key]
            profile = self.profiles.get(key)
            if profile is None or not profile.loading:  # nobody waits there for a load of ours any more
                self._since_loading.pop(key, None)
        if permit is not None:
            self.breaker.dropped(permit)

    def succeeded(self, permit: Permit | None) -> None:
        """It answered, whatever it said."""
        if permit is not None:
            before = self.breaker.phase
            self.breaker.succeeded(permit, self._now())
            self._note(before)

    def failed(self, permit: Permit | None, *, counts: bool = True) -> None:
        """It could not be reached, broke off, or said nothing; which *counts* as a failed forward if it was one."""
        self.failures_total += counts
        if permit is not None:
            before = self.breaker.phase
            self.breaker.failed(permit, self._now())
            self._note(before)

    def _note(self, before: Phase) -> None:
        if self.breaker.phase is not before:
            _log.info("circuit breaker", peer=self.node_id, was=str(before), now=str(self.breaker.phase))

    def measured(self, rtt_s: float) -> None:
        """Note how long a round trip took."""
        self.rtt_s = rtt_s if self.rtt_s is None else self.rtt_s + _RTT_WEIGHT * (rtt_s - self.rtt_s)

    # --- views

    def candidate(self, key: str) -> Candidate:
        """Return it as the router sees it."""
        now = self._now()
        since, profile = self._since_loading.get(key), self.profiles.get(key)
        return Candidate(
            key=self.key,
            node_id=self.node_id,
            profile=profile,
            age_s=min(self.age_s, SETTLED_S) if self.status == "alive" else self.age_s,
            own_now=self.forwards.get(key, 0),
            own_then=self._own_then.get(key, 0),
            loading_for_s=None if since is None else now - since,
            rtt_s=self.rtt_s,
            draining=self.draining,
            reachable=self.alive,
            circuit_s=self.breaker.refusal_s(now),
            rejected=self.rejected or self._told(key),
            max_queue=(profile.max_queue or None) if profile is not None else None,
            beside=beside(self.state.profiles, key, self._news()),
        )

    def _news(self) -> dict[str, int]:
        """Return own requests there, by profile, that its record does not tell of yet."""
        return {key: count - self._own_then.get(key, 0) for key, count in self.forwards.items()}

    def may_serve(self, key: str) -> bool:
        """Whether it would take a request for *key* if it could be reached and had room, as far as it has told."""
        profile = self.profiles.get(key)
        if profile is None or self.draining or self.rejected is not None:
            return False
        if (said := self._believed(key)) is not None and not said.passes:
            return False
        return profile.fit != Fit.NEVER or bool(profile.ready or profile.loading)

    def in_the_way(self, key: str) -> str | None:
        """Return why it cannot be asked for *key* now; None if it can."""
        if not self.alive:
            return "gone"
        if (wait_s := self.breaker.refusal_s(self._now())) is not None:
            return f"not reachable, tried again in {wait_s:.0f} s"
        return self.rejected or self._told(key) or ("draining" if self.draining else None)

    def gauge(self) -> PeerGauge:
        """Return it as metrics show it."""
        return PeerGauge(
            node_id=self.node_id,
            up=self.alive,
            circuit=str(self.breaker.phase),
            rtt_s=self.rtt_s,
            record_age_s=self.age_s,
            in_flight=sum(self.forwards.values()),
            forwards_total=self.forwards_total,
            failures_total=self.failures_total,
            refusals_total=self.refusals_total,
        )

    def addresses(self) -> tuple[str, ...]:
        """Return where it may be reached, the address that worked last first."""
        known = self.state.addresses
        return known if self.good_address is None else tuple(dict.fromkeys((self.good_address, *known)))
