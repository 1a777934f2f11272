"""What the router is told: the request, and each node that may serve it. Values only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mesh.core.node_state import Kind, PeerKey, ProfileState


@dataclass(frozen=True, slots=True)
class Work:
    """One request, as far as it matters where it is served."""

    profile: str  #: its key, "model:profile"
    kind: Kind | None = None  #: that the route needs; None = any
    prompt_tokens: int = 0  #: estimated; a prompt is not tokenized to route it
    max_tokens: int | None = None  #: the request's own limit of its answer
    tokens: float | None = None  #: how long answers of this profile are, as learned by this node; None = not known
    forwarded: bool = False  #: it came from a node that already chose this one
    hops: int = 0  #: nodes that it went through, the first not counted
    max_hops: int = 1  #: how many there may be
    visited: frozenset[PeerKey] = frozenset()  #: nodes that it went through
    tried: frozenset[PeerKey] = frozenset()  #: nodes that could not serve it: they are not asked again
    #: How many requests for this profile this node has routed: candidates that are as good as equal take turns by it.
    #: Counted per profile, or A, B, A, B... would give all A to one and all B to the other; and from a start of the
    #: node's own (a number from its key), or all nodes would give their first to the same one.
    turn: int = 0


class Beside(NamedTuple):
    """What a node does apart from the work's profile."""

    computing: int = 0  #: other profiles that answer requests there: they share the GPUs
    requests: int = 0  #: those requests, and the ones that wait for these profiles
    service_s: float = 0.0  #: how long such a request takes, of the slowest of them
    contenders: int = 0  #: other profiles that are waited for and not loaded: they want the memory
    starved: int = 0  #: requests that wait for those


def beside(profiles: Iterable[ProfileState], key: str, own: Mapping[str, int] | None = None) -> Beside:
    """Return what a node with *profiles* does apart from *key*.

    *own* are this node's own forwards there, by profile, that its record does not tell of yet (``own_now - own_then``).
    """
    computing = requests = contenders = starved = 0
    service_s = 0.0
    for p in profiles:
        present = 0 if p.key == key else max(0, p.busy + p.queued + (own.get(p.key, 0) if own else 0))
        if present and p.ready:
            computing += 1
            requests += present
            service_s = max(service_s, p.service_s or 0.0)
        elif present:
            contenders += 1
            starved += present
    return Beside(computing, requests, service_s, contenders, starved)


_NOTHING = Beside()


@dataclass(frozen=True, slots=True)
class Candidate:
    """One node, as this node sees it now."""

    key: PeerKey
    node_id: str
    profile: ProfileState | None = None  #: its record's figures of the work's profile; None = it does not have it
    local: bool = False  #: this very node
    age_s: float = 0.0  #: of the record, since it was made; 0 for the local one
    #: This node's own forwards of this profile that are in flight there; a finished or failed one is not (trap 50).
    own_now: int = 0
    #: This node's own forwards that were in flight there when the record was made, so that its figures include them;
    #: those that have ended since are among them, and thereby leave the count.
    own_then: int = 0
    #: Since when a load of the profile is known to be under way there, in seconds: since the first record that told of
    #: it, or since this node sent the request that made it necessary. None = no load is, or its beginning is unknown.
    loading_for_s: float | None = None
    rtt_s: float | None = None  #: of the link; None = not measured
    affinity: float = 0.0  #: fraction of the prompt that is expected in its prompt cache, 0 to 1
    beside: Beside = _NOTHING  #: what it does apart from that
    size_mib: int | None = None  #: of the model file, if known here
    max_queue: int | None = None  #: how many may wait there; None = not known
    draining: bool = False
    reachable: bool = True
    circuit_s: float | None = None  #: for how long its circuit breaker still refuses; None = it does not
    rejected: str | None = None  #: why it takes no part, for example its version; None = it does

    @property
    def reported(self) -> int:
        """Requests of others that were there when the record was made."""
        if self.profile is None:
            return 0
        return max(0, self.profile.busy + self.profile.queued - self.own_then)

    @property
    def full(self) -> bool:
        """Whether its queue takes no more, as far as it is known."""
        return self.profile is not None and self.max_queue is not None and self.profile.queued >= self.max_queue > 0
