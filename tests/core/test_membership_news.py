"""Urgent news: to whom they go first, what becomes of those that nobody answers, and probes that are asked for."""

from __future__ import annotations

import pytest

from benchmarks.gossip_net import Kind, Network, Status, make_key
from mesh.core.gossip_message import Message
from mesh.core.gossip_record import Record, seal
from mesh.core.gossip_rumours import SPARE_ROUNDS, Rumours
from mesh.core.membership import Membership, Order, Tuning
from mesh.core.node_state import PeerKey

ME, *OTHERS = [make_key(number) for number in range(40)]
TUNING = Tuning()


def record_of(key: PeerKey, version: int = 1) -> Record:
    return seal(key, (1, version), b"state", rotation=None, left=False, sign=lambda message: bytes(64))


def core_with(number: int) -> Membership:
    """A core that knows so many others, has told its own news, and is at second 1."""
    core = Membership(ME, incarnation=1, sign=lambda m: bytes(64), random=lambda: 0.5, now=0.0, tuning=TUNING)
    for key in OTHERS[:number]:
        core.receive(key, Message(), [(record_of(key), 0)], 0.0)
    core._tick_at = 1e9
    now = 0.0
    while now < 1.0:
        for order in core.due(now):
            answered(core, order, now)
        now += 0.1
    return core


def answered(core: Membership, order: Order, now: float) -> None:
    assert order.key is not None
    core.answered(order, order.key, Message(), [], now)


def round_at(core: Membership, now: float) -> list[Order]:
    return [order for order in core.due(now) if order.kind is Kind.NEWS]


def publish(core: Membership, payload: bytes) -> None:
    core.publish(payload, urgent=True)


def rounds_until(core: Membership, start: float, end: float) -> list[tuple[float, list[Order]]]:
    """Return the rounds that go out in this time, none of them answered."""
    found, now = [], start
    while now < end:
        if orders := round_at(core, now):
            found.append((now, orders))
        now = max(core.next_deadline(), now + 0.001)
    return found


def test_what_nobody_answers_goes_to_others_a_few_times() -> None:
    core = core_with(39)
    publish(core, b"news")
    rounds = rounds_until(core, 1.0, 60.0)
    assert len(rounds) == TUNING.urgent_rounds + SPARE_ROUNDS
    assert rounds[1][0] < 1.0 + 2 * TUNING.urgent_gap_s
    assert rounds[2][0] == pytest.approx(1.0 + TUNING.urgent_late_s)
    told = [order.key for _, orders in rounds for order in orders]
    assert len(set(told)) == len(told), "to nobody twice: it may be on its way"
    carried = [all(news.carried for order in orders for news in order.about) for _, orders in rounds]
    assert carried == [True, False] + [True] * SPARE_ROUNDS, "hardly anybody has it yet"
    assert core.next_deadline() > 60, "nothing is awaited for ever"


def test_what_is_answered_in_time_is_not_repeated() -> None:
    core = core_with(39)
    publish(core, b"news")
    for now in (1.0, 1.1):
        for order in round_at(core, now):
            answered(core, order, now + 0.01)
    assert rounds_until(core, 1.2, 30.0) == []
    assert not core._news._awaited


def test_what_fails_at_once_is_repeated_at_once_and_once() -> None:
    """A machine that lives but whose llama-mesh died refuses connections."""
    core = core_with(39)
    publish(core, b"news")
    first = round_at(core, 1.0) + round_at(core, 1.1)
    for order in first:
        core.failed(order, 1.15)
    assert len(round_at(core, 1.2)) == TUNING.urgent_fanout
    assert round_at(core, 1.3) == [], "one round makes up for all that failed together"
    assert {key for key, rumour in core._table.records._by_key.items()} == {ME}


def test_who_failed_after_it_was_late_does_not_count_twice() -> None:
    core = core_with(39)
    publish(core, b"news")
    late = round_at(core, 1.0) + round_at(core, 1.1)
    again = round_at(core, 1.6)
    for order in again:
        answered(core, order, 1.61)
    for order in late:
        core.failed(order, 4.0)
    assert round_at(core, 4.1) == []


def test_an_exchange_that_was_never_made_is_made_up_for() -> None:
    core = core_with(39)
    publish(core, b"news")
    for order in round_at(core, 1.0) + round_at(core, 1.1):
        core.abandoned(order)
    assert round_at(core, 1.2)
    assert not [m for m in core._table.members.values() if m.pending > 1]


def test_who_does_not_answer_is_told_last() -> None:
    core = core_with(10)
    publish(core, b"one")
    hanging = {order.key for order in round_at(core, 1.0)}
    publish(core, b"two")
    told: list[PeerKey | None] = []
    for number in range(2):
        for order in round_at(core, 1.1 + 0.1 * number):
            told.append(order.key)
            answered(core, order, 1.1 + 0.1 * number)
    assert len(told) == 6
    assert not set(told) & hanging, "there are seven others"


def test_in_a_mesh_of_two_the_other_is_told_whatever_it_does() -> None:
    core = core_with(1)
    publish(core, b"one")
    assert len(round_at(core, 1.0)) == 1
    publish(core, b"two")
    assert [order.key for order in round_at(core, 1.1)] == [OTHERS[0]]


def test_a_rumour_is_not_over_while_nobody_has_it() -> None:
    """Sends that nobody answered do not use up its budget."""
    core = core_with(39)
    core._table.records.limit = 4
    publish(core, b"news")
    rounds_until(core, 1.0, 60.0)
    assert core._table.records._by_key[ME].sends == 0


def test_an_older_version_is_neither_counted_nor_repeated() -> None:
    rumours = Rumours()
    rumours.add(ME, (1, 2))
    rumours.arrived(ME, (1, 1))
    rumours.rearm(ME, (1, 1))
    assert (rumours._by_key[ME].sends, dict(rumours.urgent)) == (0, {})
    rumours.rearm(OTHERS[0], (1, 1))


class TestAskedFor:
    def asked(self, core: Membership, now: float) -> list[PeerKey | None]:
        return [order.key for order in core.due(now) if order.kind is Kind.ASKED]

    def test_at_once_and_once(self) -> None:
        core = core_with(5)
        for _ in range(3):
            core.ask(OTHERS[0])
        assert self.asked(core, 1.0) == [OTHERS[0]]
        core.ask(OTHERS[0])
        assert self.asked(core, 1.1) == [], "it is on its way"

    def test_the_least_is_said(self) -> None:
        core = core_with(5)
        core.ask(OTHERS[0])
        [order] = core.due(1.0)
        assert not core.request(order).digest

    def test_nobody_else_than_members(self) -> None:
        core = core_with(5)
        core.ask(ME)
        core.ask(OTHERS[30])
        member = core._table.members[OTHERS[0]]
        core._table.suspect(member, 0.5, own=True)
        core._table.bury(member, 0.6)
        core.ask(OTHERS[0])
        assert self.asked(core, 1.0) == []

    def test_so_many_at_a_time(self) -> None:
        core = core_with(39)
        for key in OTHERS:
            core.ask(key)
        assert len(self.asked(core, 1.0)) == TUNING.probes_per_tick
        assert self.asked(core, 1.1) == []

    def test_a_success_ends_a_suspicion(self) -> None:
        core = core_with(5)
        core._table.suspect(core._table.members[OTHERS[0]], 0.9, own=True)
        core.ask(OTHERS[0])
        [order] = [order for order in core.due(0.95) if order.kind is Kind.ASKED]
        answered(core, order, 1.0)
        assert core._table.members[OTHERS[0]].status is Status.ALIVE

    def test_a_failure_is_evidence_against_somebody_who_was_thought_well(self) -> None:
        core = core_with(5)
        core.ask(OTHERS[0])
        [order] = core.due(1.0)
        core.failed(order, 4.0)
        assert core._table.members[OTHERS[0]].failures == 1

    def test_a_failure_changes_no_plan_of_a_suspicion(self) -> None:
        """trap 55: else three in three seconds would use up the tries that are spread over all of it."""
        core = core_with(5)
        member = core._table.members[OTHERS[0]]
        core._table.suspect(member, 0.9, own=True)
        before = (member.failures, member.retry_at, member.deadline)
        for now in (0.91, 0.95):
            core.ask(OTHERS[0])
            [order] = [order for order in core.due(now) if order.kind is Kind.ASKED]
            core.failed(order, now + 0.01)
        assert (member.failures, member.retry_at, member.deadline) == before

    def test_a_failure_does_not_end_the_rest_of_who_is_out_of_reach_from_here(self) -> None:
        core = core_with(5)
        member = core._table.members[OTHERS[0]]
        member.avoid_until = 100.0
        core.ask(OTHERS[0])
        [order] = core.due(1.0)
        core.failed(order, 4.0)
        assert (member.failures, member.avoid_until) == (0, 100.0)


def test_when_a_third_is_left_news_reach_it_all_in_a_few_seconds() -> None:
    """Not in a quarter of a minute, as if there were ticks alone. Of ten meshes, the slowest."""
    took = []
    for seed in range(10):
        net = Network(seed)
        keys = [make_key(number) for number in range(60)]
        for key in keys:
            net.start(key, contacts=[keys[0]] if key != keys[0] else [])
        assert net.run(60, lambda net=net: all(n.core.size == 60 for n in net.live()))  # type: ignore[misc]
        net.run(30)
        for key in keys[20:]:
            net.crash(key)
        before = net.now
        net.publish(keys[0], b"news", urgent=True)

        def known(net: Network = net, key: PeerKey = keys[0]) -> bool:
            views = [node.core.view(key) for node in net.live() if node.key != key]
            return all(view is not None and view.payload == b"news" for view in views)

        assert net.run(60, known, every_s=0.05)
        took.append(net.now - before)
    assert sorted(took)[4] < 2.5
    assert max(took) < 6
