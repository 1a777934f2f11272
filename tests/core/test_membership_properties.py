"""Whatever happens, in whatever order: what must always hold of a mesh of cores, and what once it is left in peace."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gossip_net import Change, Network, Node, Status, make_key
from mesh.core.gossip_message import MAX_MESSAGE_BYTES
from mesh.core.gossip_record import Age
from mesh.core.node_state import PeerKey

KEYS = [make_key(number) for number in range(6)]

step = st.one_of(
    st.tuples(st.just("publish"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("crash"), st.integers(1, 5), st.none()),
    st.tuples(st.just("leave"), st.integers(1, 5), st.none()),
    st.tuples(st.just("start"), st.integers(0, 5), st.integers(0, 50)),
    st.tuples(st.just("cut"), st.integers(1, 5), st.booleans()),
    st.tuples(st.just("heal"), st.none(), st.none()),
    st.tuples(st.just("pass"), st.sampled_from([0.03, 1, 7, 60, 700]), st.none()),
)


class Life:
    """A mesh to which things happen, with an eye on every node after each event in it."""

    def __init__(self, seed: int, loss: float, duplicate: float) -> None:
        self.net = Network(seed, loss=loss, duplicate=duplicate)
        self.net.on_event = self._event
        self.ages: dict[tuple[int, PeerKey], Age] = {}  #: by node's life and member
        self.buried: dict[tuple[int, PeerKey], Age] = {}
        for number in range(6):
            self.start(number, number)

    def start(self, number: int, incarnation: int) -> None:
        key = KEYS[number]
        node = self.net.nodes.get(key)
        if node is None or not node.up:
            skew, rate = 1000.0 * number, 0.9 + 0.04 * number
            contacts = [KEYS[0], KEYS[1]]
            payload = b"%d:%d" % (number, incarnation)
            self.net.start(key, contacts=contacts, payload=payload, incarnation=incarnation, skew=skew, rate=rate)

    def happen(self, what: str, one: object, two: object) -> None:
        net = self.net
        key = KEYS[one] if isinstance(one, int) and one < len(KEYS) else KEYS[0]
        if what == "publish" and net.nodes[key].up:
            net.publish(key, net.random.randbytes(20), urgent=bool(two))
        elif what == "crash":
            net.crash(key)
        elif what == "leave" and net.nodes[key].up:
            net.leave(key)
            net.run(1)
        elif what == "start" and isinstance(one, int) and isinstance(two, int):
            self.start(one, two)
        elif what == "cut":
            side, one_way = set(KEYS[: one if isinstance(one, int) else 1]), bool(two)
            net.connected = lambda a, b: (a in side) == (b in side) or (one_way and a in side)
        elif what == "heal":
            net.connected = lambda a, b: True
        elif what == "pass" and isinstance(one, (int, float)):
            net.run(one)
        self.check()

    def check(self) -> None:
        for node in self.net.live():
            assert node.largest <= MAX_MESSAGE_BYTES
            assert node.core.own.key == node.key
            for key, view in node.core.views().items():
                age = (view.incarnation, view.version)
                assert age >= self.ages.get((id(node), key), (0, 0)), "a version went back"
                self.ages[id(node), key] = age
                owner = self.net.nodes[key]
                if view.status is Status.ALIVE and owner.up and owner.core.own.age == age:
                    assert view.payload == owner.core.own.payload, "only the owner writes"

    def _event(self, node: Node, change: Change, key: PeerKey) -> None:
        view = node.core.view(key)
        if change is Change.FORGOTTEN:
            self.ages.pop((id(node), key), None)
            self.buried.pop((id(node), key), None)
        elif view is not None and change is Change.LEFT:
            self.buried[id(node), key] = (view.incarnation, view.version)
        elif view is not None and (grave := self.buried.get((id(node), key))) is not None:
            assert (view.incarnation, view.version) > grave, "a goodbye was undone without a newer record"

    def come_to_rest(self) -> None:
        """Left in peace, all live nodes know each other in the owner's version, and nobody else."""
        net = self.net
        net.loss = net.duplicate = 0.0
        net.connected = lambda a, b: True
        net.run(800)
        live = net.live()
        for node in live:
            alive = {key for key, view in node.core.views().items() if view.status is Status.ALIVE}
            assert alive == {other.key for other in live} - {node.key}
            for other in live:
                view = node.core.view(other.key)
                if other is not node:
                    assert view is not None
                    assert (view.incarnation, view.version) == other.core.own.age
                    assert view.payload == other.core.own.payload
        assert len({node.core.digest for node in live}) == 1


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    loss=st.sampled_from([0.0, 0.05, 0.3]),
    duplicate=st.sampled_from([0.0, 0.2]),
    steps=st.lists(step, max_size=14),
)
def test_any_life_ends_in_agreement(
    seed: int, loss: float, duplicate: float, steps: list[tuple[str, object, object]]
) -> None:
    life = Life(seed, loss, duplicate)
    for what, one, two in steps:
        life.happen(what, one, two)
    life.start(0, 7)  # the contact that all know
    life.come_to_rest()
