"""Several simulated nodes, what they know of each other, and the policies that are compared.

A node knows itself as it is. Of the others it has records: each makes one every five seconds, and each arrives after a
delay of its own. In between it knows only which of its own requests are on their way there. All policies have the same.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random

from benchmarks.routing_load import MODELS, Arrival, Box, rtt_s
from benchmarks.routing_node import Node
from mesh.core.node_state import Fit, PeerKey, ProfileState
from mesh.core.routing import Candidate, Work, beside, rank
from mesh.core.speed import Speed

GOSSIP_S = 5.0
DELAY_S = (0.02, 1.0)
#: of relaying one request over a link
RELAY_S = 0.001


@dataclass(slots=True)
class Record:
    """What one node last said of itself."""

    made_at: float = 0.0
    profiles: dict[str, ProfileState] = field(default_factory=dict)
    own: Counter[str] = field(default_factory=Counter)  #: own requests there by model, when it arrived


@dataclass(slots=True)
class View:
    """What one node knows."""

    records: list[Record]
    own: list[Counter[str]]  #: own requests in flight, by node and model
    loading_since: dict[tuple[int, str], float] = field(default_factory=dict)
    turns: Counter[str] = field(default_factory=Counter)
    answers: dict[str, Speed] = field(
        default_factory=dict
    )  #: of all requests that it answered, wherever they were served


class Mesh:
    """One run of one policy."""

    def __init__(self, boxes: list[Box], policy: Policy, seed: int) -> None:
        self.boxes, self.random = boxes, Random(f"{seed} mesh")
        self.now = 0.0
        models = {m.key: m for m in MODELS}
        self.nodes = [Node(b, models, self.at, Random(f"{seed} {b.name}")) for b in boxes]
        self.views = [View([Record() for _ in boxes], [Counter() for _ in boxes]) for _ in boxes]
        self.latencies: dict[int, float] = {}
        self.served: Counter[int] = Counter()
        self._policy = policy
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._open = 0

    def at(self, when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def run(self, arrivals: list[Arrival]) -> None:
        """Serve *arrivals*, to the last answer."""
        self._open = len(arrivals)
        for arrival in arrivals:
            self.at(arrival.at, lambda now, arrival=arrival: self._route(arrival, now))  # type: ignore[misc]
        for n in range(len(self.nodes)):
            self.at(self.random.uniform(0, GOSSIP_S), lambda now, n=n: self._publish(n, now))  # type: ignore[misc]
        while self._open:
            self.now, _, what = heapq.heappop(self._events)
            what(self.now)

    def able(self, model: str) -> list[int]:
        return [n for n, box in enumerate(self.boxes) if model in box.models]

    def _publish(self, n: int, now: float) -> None:
        profiles = self.nodes[n].profiles(now)
        for reader in range(len(self.nodes)):
            if reader != n:
                delay = self.random.uniform(*DELAY_S)
                self.at(now + delay, lambda _, reader=reader: self._heard(reader, n, now, profiles))  # type: ignore[misc]
        self.at(now + GOSSIP_S, lambda then: self._publish(n, then))

    def _heard(self, reader: int, n: int, made_at: float, profiles: dict[str, ProfileState]) -> None:
        view = self.views[reader]
        view.records[n] = Record(made_at, profiles, Counter(view.own[n]))
        for key, profile in profiles.items():
            if profile.loading and not profile.ready:
                view.loading_since.setdefault((n, key), made_at)
            elif profile.ready or not view.own[n][key]:
                view.loading_since.pop((n, key), None)

    def _route(self, arrival: Arrival, now: float) -> None:
        entry, model = arrival.entry, arrival.model
        n = self._policy(self, arrival)
        assert n in self.able(model), "it does not have the model"
        self.served[n] += 1
        view = self.views[entry]
        view.turns[model] += 1
        travel_s = 0.0 if n == entry else rtt_s(self.boxes[entry], self.boxes[n]) / 2 + RELAY_S
        if n != entry:
            view.own[n][model] += 1
            known = view.records[n].profiles.get(model)
            if known is None or not (known.ready or known.fit == Fit.WAIT):
                view.loading_since.setdefault((n, model), now)
        self.at(now + travel_s, lambda then: self.nodes[n].submit(arrival, answered, then))

        def answered(_: Arrival, then: float) -> None:
            self.at(then + travel_s, lambda end: self._answered(arrival, n, end))

    def _answered(self, arrival: Arrival, n: int, now: float) -> None:
        view = self.views[arrival.entry]
        if n != arrival.entry:
            view.own[n][arrival.model] -= 1
        view.answers.setdefault(arrival.model, Speed()).observe_request(now=now, generated=arrival.output)
        assert arrival.number not in self.latencies, "answered twice"
        self.latencies[arrival.number] = now - arrival.at
        self._open -= 1


Policy = Callable[[Mesh, Arrival], int]


def mesh_policy(mesh: Mesh, arrival: Arrival) -> int:
    """Ask the real router."""
    view, model = mesh.views[arrival.entry], arrival.model
    answers = view.answers.get(model)
    work = Work(
        model,
        prompt_tokens=arrival.guess,
        max_tokens=arrival.max_tokens,
        tokens=answers.figures().tokens if answers is not None else None,
        turn=view.turns[model] + arrival.entry,
    )
    candidates = [_candidate(mesh, arrival.entry, n, model) for n in mesh.able(model)]
    return int.from_bytes(rank(work, candidates)[0].candidate.key, "big")


def _candidate(mesh: Mesh, entry: int, n: int, model: str) -> Candidate:
    key, box = PeerKey(n.to_bytes(4, "big")), mesh.boxes[n]
    if n == entry:
        profiles = mesh.nodes[n].profiles(mesh.now)
        return Candidate(key, box.name, profiles[model], local=True, beside=beside(profiles.values(), model))
    view = mesh.views[entry]
    record = view.records[n]
    since = view.loading_since.get((n, model))
    return Candidate(
        key,
        box.name,
        record.profiles.get(model) or ProfileState(key=model, id=model),
        age_s=mesh.now - record.made_at,
        own_now=view.own[n][model],
        own_then=record.own[model],
        loading_for_s=None if since is None else mesh.now - since,
        rtt_s=rtt_s(mesh.boxes[entry], box),
        beside=beside(record.profiles.values(), model, {k: count - record.own[k] for k, count in view.own[n].items()}),
        size_mib=next(m.size_mib for m in MODELS if m.key == model),
    )


def random_policy(mesh: Mesh, arrival: Arrival) -> int:
    return mesh.random.choice(mesh.able(arrival.model))


def round_robin(mesh: Mesh, arrival: Arrival) -> int:
    able = mesh.able(arrival.model)
    return able[(mesh.views[arrival.entry].turns[arrival.model] + arrival.entry) % len(able)]


def least_loaded(mesh: Mesh, arrival: Arrival) -> int:
    """The node with the fewest requests, busy and queued, as far as its record and the own ones in flight tell."""
    able = mesh.able(arrival.model)
    turn = mesh.views[arrival.entry].turns[arrival.model] + arrival.entry
    order = able[turn % len(able) :] + able[: turn % len(able)]
    return min(order, key=lambda n: _requests(mesh, arrival.entry, n))


def _requests(mesh: Mesh, entry: int, n: int) -> int:
    if n == entry:
        node = mesh.nodes[n]
        return sum(len(i.jobs) for i in node.instances) + sum(map(len, node.queues.values()))
    view = mesh.views[entry]
    record = view.records[n]
    known = sum(p.busy + p.queued for p in record.profiles.values())
    return max(0, known - record.own.total()) + view.own[n].total()


POLICIES: dict[str, Policy] = {
    "mesh": mesh_policy,
    "random": random_policy,
    "round_robin": round_robin,
    "least_loaded": least_loaded,
}
