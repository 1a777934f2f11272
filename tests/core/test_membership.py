"""Membership among a few cores on a simulated network: join, death, refutation, goodbye, restart, clocks, storms."""

from __future__ import annotations

import pytest

from benchmarks.gossip_net import Change, Kind, Network, Node, Status, make_key
from mesh.core.gossip_message import MAX_MESSAGE_BYTES, Doubt, Message
from mesh.core.gossip_record import MAX_CLAIM, MAX_PAYLOAD_BYTES, seal
from mesh.core.membership import Membership, Tuning
from mesh.core.node_state import PeerKey

KEYS = [make_key(number) for number in range(200)]
A, B, C = KEYS[:3]


def mesh(number: int, seed: int = 1, **options: float) -> Network:
    """A mesh of so many nodes that know each other."""
    net = Network(seed, **options)  # type: ignore[arg-type]
    for key in KEYS[:number]:
        net.start(key, contacts=[A] if key != A else [])
    assert net.run(60, lambda: same(net))
    return net


def same(net: Network) -> bool:
    """Whether all live nodes know the same, and exactly the live ones."""
    live = net.live()
    return all(node.core.size == len(live) and node.core.digest == live[0].core.digest for node in live)


def status(node: Node, key: PeerKey) -> Status | None:
    view = node.core.view(key)
    return view.status if view is not None else None


def everywhere(net: Network, key: PeerKey, wanted: Status | None) -> bool:
    return all(status(node, key) is wanted for node in net.live() if node.key != key)


def deaths(net: Network) -> list[PeerKey]:
    return [key for node in net.nodes.values() for _, change, key in node.events if change is Change.DEAD]


def changes(node: Node, key: PeerKey) -> list[Change]:
    return [change for _, change, about in node.events if about == key]


def test_a_newcomer_is_known_everywhere_before_the_first_tick() -> None:
    net = mesh(10)
    before = net.now
    net.start(KEYS[20], contacts=[A])
    assert net.run(1.0, lambda: same(net), every_s=0.01)
    assert net.now - before < 0.4


@pytest.mark.parametrize("number", [3, 10, 30])
def test_urgent_news_needs_no_tick_in_a_small_mesh(number: int) -> None:
    net = mesh(number)
    net.run(30)
    before = net.now
    net.publish(A, b"loaded", urgent=True)

    def known() -> bool:
        views = [node.core.view(A) for node in net.live() if node.key != A]
        return all(view is not None and view.payload == b"loaded" for view in views)

    assert net.run(5, known, every_s=0.01)
    assert net.now - before < 0.3


def test_urgent_news_is_no_storm() -> None:
    """trap 67: at 30 nodes everybody tells a few, once, and nobody tells again."""
    net = mesh(30)
    net.run(60)
    quiet = net.traffic.messages
    net.run(4)
    quiet, before = net.traffic.messages - quiet, net.traffic.messages
    net.publish(A, b"loaded", urgent=True)
    net.run(4)
    assert net.traffic.messages - before - quiet < 30 * 2 * 3 * 2 * 1.3  # nodes x rounds x fan-out x both ways


def test_a_change_that_is_not_urgent_waits_for_the_tick_and_several_are_one() -> None:
    net = mesh(5)
    net.run(30)
    version = net.nodes[A].core.own.age[1]
    for number in range(10):
        net.publish(A, b"%d" % number)
    assert net.nodes[A].core.own.age[1] == version
    net.run(20)
    assert net.nodes[A].core.own.age[1] == version + 1
    view = net.nodes[B].core.view(A)
    assert view is not None
    assert view.payload == b"9"


@pytest.mark.parametrize("number", [2, 3, 10, 30])
def test_a_crash_is_seen_by_all_and_forgotten_later(number: int) -> None:
    net = mesh(number)
    net.crash(B)
    assert net.run(100, lambda: everywhere(net, B, Status.DEAD))
    assert set(deaths(net)) == {B}
    net.run(700)
    assert everywhere(net, B, None)
    assert all(changes(node, B)[-1] is Change.FORGOTTEN for node in net.live())


def test_nobody_is_declared_dead_because_messages_get_lost() -> None:
    """trap 55: 10 % of messages, half an hour."""
    net = mesh(30, seed=3, loss=0.1, duplicate=0.1)
    net.run(1800)
    assert deaths(net) == []
    assert net.run(60, lambda: same(net))


def test_rumours_alone_kill_nobody() -> None:
    """trap 55: one node says so again and again; the others look for themselves."""
    net = mesh(5)
    for _ in range(50):
        for key in KEYS[1:5]:
            core = net.nodes[key].core
            view = core.view(A)
            if key != B and view is not None:
                doubt = Doubt(A, view.incarnation, view.version)
                core.receive(B, Message(doubts=(doubt,)), [], net.local(net.nodes[key]))
        net.run(5)
    assert A not in deaths(net)


def test_a_node_that_slept_through_the_suspicion_looks_first() -> None:
    """trap 55: the time is over, but this node has not tried for itself yet; two tries must fail, spread out."""
    core = net_core(with_a=True)
    core.receive(C, Message(doubts=(Doubt(A, 1, 1),)), [], 20.0)
    assert (view := core.view(A)) is not None
    assert view.status is Status.SUSPECT
    tries = 0
    for now in (1000.0, 1010.0, 1020.0):
        for order in core.due(now):
            if order.key == A and order.kind is Kind.PROBE:
                assert (view := core.view(A)) is not None
                assert view.status is Status.SUSPECT
                core.failed(order, now + 3)
                tries += 1
    assert tries == 2
    assert (view := core.view(A)) is not None
    assert view.status is Status.DEAD


def test_who_cannot_reach_a_member_that_others_reach_keeps_it() -> None:
    """Asymmetric reachability: the contradictions arrive through the others."""
    net = mesh(6)
    net.connected = lambda a, b: {a, b} != {A, B}
    net.run(1200)
    assert deaths(net) == []
    assert status(net.nodes[A], B) in (Status.ALIVE, Status.SUSPECT)
    assert net.nodes[B].core.own.age[0] < 80, "it contradicts less and less often"


def test_a_sign_of_life_from_elsewhere_prevents_a_death() -> None:
    """A request that B still serves: its links are alive although gossip with it fails."""
    net = mesh(3)
    net.connected = lambda a, b: B not in (a, b)
    for _ in range(60):
        net.run(2)
        net.nodes[A].core.heard(B, net.local(net.nodes[A]))
    assert status(net.nodes[A], B) is not Status.DEAD
    assert status(net.nodes[C], B) is Status.DEAD


@pytest.mark.parametrize("minutes", [2, 20])
def test_a_partition_heals(minutes: int) -> None:
    """Within the tombstones' time by trying the dead again, after it through the contacts."""
    net = mesh(10)
    side = set(KEYS[:5])
    net.connected = lambda a, b: (a in side) == (b in side)
    net.run(minutes * 60)
    assert all(node.core.size == 5 for node in net.live())
    net.connected = lambda a, b: True
    assert net.run(120, lambda: same(net))


def test_a_goodbye_is_known_at_once_and_is_no_death() -> None:
    net = mesh(10)
    net.run(30)
    net.leave(B)
    assert net.run(1.0, lambda: everywhere(net, B, Status.LEFT), every_s=0.05)
    assert all(B not in node.core.views() for node in net.live())
    net.run(120)
    assert deaths(net) == []


def test_a_goodbye_that_few_heard_still_reaches_all() -> None:
    net = mesh(20, loss=0.0)
    record = net.nodes[B].core
    record.leave()
    net.crash(B)
    net.nodes[C].core.receive(B, Message(), [(record.own, 0)], net.local(net.nodes[C]))
    assert net.run(60, lambda: everywhere(net, B, Status.LEFT))


@pytest.mark.parametrize("incarnation", [5_000, 1, 0], ids=["later", "the same second", "clock went back"])
@pytest.mark.parametrize("after_s", [1, 100], ids=["at once", "when it is dead"])
def test_a_restart_is_accepted_whatever_its_clock_says(incarnation: int, after_s: float) -> None:
    net = mesh(5)
    net.crash(B)
    net.run(after_s)
    net.start(B, contacts=[A], payload=b"new life", incarnation=incarnation)

    def known() -> bool:
        views = [node.core.view(B) for node in net.live() if node.key != B]
        return all(view is not None and view.payload == b"new life" and view.status is Status.ALIVE for view in views)

    assert net.run(20, known)


def test_the_goodbye_of_a_stranger_leaves_no_tombstone() -> None:
    """Or nodes that forget at different times would hand tombstones to each other for ever."""
    core = net_core()
    left = seal(C, (5, 1), b"", rotation=None, left=True, sign=lambda m: bytes(64))
    core.receive(A, Message(), [(left, 1)], 1.0)
    assert core.view(C) is None
    assert core.known == 0


def test_a_return_after_a_goodbye_is_a_join() -> None:
    net = mesh(4)
    net.leave(B)
    net.run(5)
    net.start(B, contacts=[A], incarnation=0)
    assert net.run(20, lambda: same(net))
    assert changes(net.nodes[A], B)[-2:] == [Change.LEFT, Change.JOINED]


def test_clocks_that_are_wrong_and_drift_do_not_matter() -> None:
    net = Network(5, loss=0.02)
    for number, key in enumerate(KEYS[:12]):
        net.start(key, contacts=[A], skew=(-1) ** number * 10.0**number, rate=0.8 + 0.04 * number)
    assert net.run(60, lambda: same(net))
    net.run(900)
    assert deaths(net) == []
    net.crash(B)
    assert net.run(120, lambda: everywhere(net, B, Status.DEAD))


def test_two_processes_with_one_key_are_told_and_do_not_make_a_storm() -> None:
    net = mesh(4)
    twin = Membership(
        B, incarnation=9, sign=lambda m: bytes(64), random=net.random.random, now=0.0, payload=b"the copy"
    )
    before = net.traffic.messages
    for _ in range(60):
        net.run(5)
        other = net.nodes[B].core.own
        twin.receive(C, Message(), [(other, 1)], net.now)
        net.nodes[C].core.receive(B, Message(), [(twin.own, 1)], net.now)
    assert changes(net.nodes[B], B).count(Change.OWN_KEY) > 10
    assert net.nodes[B].core.own.age[0] < 9 + 3 * 60
    assert net.traffic.messages - before < 60 * 4 * 12


def test_a_claim_that_would_use_up_the_incarnations_is_ignored() -> None:
    core = net_core()
    core.receive(A, Message(doubts=(Doubt(B, MAX_CLAIM, 1),)), [], 1.0)
    assert core.own.age[0] == 1


def test_who_doubts_us_is_contradicted_in_the_answer() -> None:
    core = net_core()
    answer = core.receive(A, Message(doubts=(Doubt(B, 7, 3),)), [], 1.0)
    assert core.own.age == (8, 1)
    assert [carried.body for carried in answer.records] == [core.own.body]


def test_after_the_goodbye_nothing_is_contradicted() -> None:
    core = net_core()
    core.leave()
    age = core.own.age
    core.receive(A, Message(doubts=(Doubt(B, 7, 3),)), [], 1.0)
    core.publish(b"more", urgent=True)
    assert core.own.age == age
    assert core.own.left
    assert core.due(100.0) == []


def test_a_late_failure_of_an_old_incarnation_is_nothing() -> None:
    core = net_core(with_a=True)
    order = next(order for order in core.due(10.0) if order.kind is Kind.TICK)
    core.receive(A, Message(), [(record_of(A, 2), 0)], 11.0)
    core.failed(order, 12.0)
    assert core.view(A) is not None
    assert not core._table.watched, "it is not tried again out of turn"


def test_failures_at_the_same_time_are_one_piece_of_evidence() -> None:
    core = net_core(with_a=True)
    orders = []
    for at in range(5):
        core.publish(b"%d" % at, urgent=True)
        orders += core.due(1.0 + at * 0.08)
    assert len(orders) > 3
    for order in orders:
        core.failed(order, 2.0)
    view = core.view(A)
    assert view is not None
    assert view.status is Status.ALIVE


def test_a_state_that_is_too_large_is_refused_and_the_old_one_stays() -> None:
    core = net_core()
    with pytest.raises(ValueError, match="limit"):
        core.publish(bytes(MAX_PAYLOAD_BYTES + 1), urgent=True)
    assert core.own.payload == b""
    core.publish(bytes(MAX_PAYLOAD_BYTES), urgent=True)


def test_large_records_all_get_through_the_cap() -> None:
    """Progress in spite of the cap: one record fills a message."""
    net = Network(2)
    for number, key in enumerate(KEYS[:8]):
        net.start(key, contacts=[A], payload=bytes([number]) * MAX_PAYLOAD_BYTES)
    assert net.run(60, lambda: same(net))
    assert max(node.largest for node in net.nodes.values()) <= MAX_MESSAGE_BYTES


def test_a_big_mesh_is_learned_from_one_contact() -> None:
    net = Network(3, loss=0.02)
    for key in KEYS[:120]:
        net.start(key, contacts=[A], payload=bytes(3000))
    assert net.run(60, lambda: same(net))
    before = net.traffic.bytes
    net.start(make_key(999), contacts=[B], payload=bytes(3000))
    assert net.run(20, lambda: same(net))
    assert net.traffic.bytes - before < 6 * 120 * 3000, "one record to all, all to one, each a few times at most"
    assert max(node.largest for node in net.nodes.values()) <= MAX_MESSAGE_BYTES


def test_the_table_has_a_limit() -> None:
    core = Membership(
        B, incarnation=1, sign=lambda m: bytes(64), random=lambda: 0.5, now=0.0, tuning=Tuning(max_members=3)
    )
    core.receive(A, Message(), [(record_of(key, 1), 0) for key in KEYS[10:20]], 1.0)
    assert len(core.views()) == 3
    core.receive(A, Message(), [(record_of(KEYS[10], 2), 0)], 2.0)
    view = core.view(KEYS[10])
    assert view is not None
    assert view.incarnation == 2, "who is in may still change"


def test_who_is_forgotten_does_not_come_back_through_others_at_once() -> None:
    net = mesh(4)
    core = net.nodes[A].core
    core.forget(B, net.now)
    assert core.view(B) is None
    answer = core.receive(C, Message(hot=(stamp(net, B),)), [], net.now)
    assert answer.wants == ()


def test_a_thousand_come_and_go_and_nothing_stays() -> None:
    """trap 63."""
    net = Network(4)
    net.start(A)
    for number in range(1000):
        key = make_key(10_000 + number)
        net.start(key, contacts=[A])
        net.run(2)
        assert status(net.nodes[A], key) is Status.ALIVE
        net.leave(key)
        net.run(1)
        del net.nodes[key]
    net.run(700)
    table = net.nodes[A].core._table
    sizes = [len(table.members), len(table.graves), len(table.watched), len(table.doubts), len(table._held)]
    assert sizes == [0, 0, 0, 0, 1]
    assert len(table.records) <= 1


def net_core(*, with_a: bool = False) -> Membership:
    """B alone, at time 0; it may have heard of A."""
    core = Membership(B, incarnation=1, sign=lambda m: bytes(64), random=lambda: 0.5, now=0.0)
    if with_a:
        core.receive(C, Message(), [(record_of(A, 1), 0)], 0.5)
    core.take_events()
    return core


def record_of(key: PeerKey, incarnation: int):  # type: ignore[no-untyped-def]
    return seal(key, (incarnation, 1), b"", rotation=None, left=False, sign=lambda m: bytes(64))


def stamp(net: Network, key: PeerKey):  # type: ignore[no-untyped-def]
    from mesh.core.gossip_message import stamp_of

    return stamp_of(net.nodes[key].core.own)
