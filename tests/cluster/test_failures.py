"""Whole gossip shells when much fails at once: most of the mesh gone, one node cut off, a circuit that is open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mesh.core.membership import Change, Status
from tests.memory_net import MemoryNet, MemoryNode

pytestmark = pytest.mark.looptime

TICK_S = 5.0


@pytest.fixture
async def net() -> AsyncIterator[MemoryNet]:
    net = MemoryNet()
    yield net
    await net.close()


async def cluster(net: MemoryNet, number: int, *, contacts: bool = True) -> list[MemoryNode]:
    """Return nodes that know each other; without *contacts* they would not find each other again."""
    nodes = [net.start(f"n{number}", contacts=["n0:8080"]) for number in range(number)]
    await net.until(net.know_each_other, 60)
    if not contacts:
        for node in nodes:
            node.contacts.clear()
            node.gossip.contacts_changed()
    await asyncio.sleep(30)
    return nodes


def knows_the_news_of(net: MemoryNet, node: MemoryNode, others: list[MemoryNode]) -> bool:
    views = [net.view(other, node) for other in others if other is not node]
    return all(view is not None and view.payload == node.gossip._core.own.payload for view in views)


# --- most of the mesh is gone


async def test_news_among_the_living_when_most_are_dead(net: MemoryNet) -> None:
    """trap 58: 40 of 60, without a word, and probes of all of them wait for their time to be over."""
    living = (await cluster(net, 60))[:20]
    for node in net.live()[20:]:
        await net.stop(node)
    for number in range(12):
        node = living[number]
        node.publish(urgent=True, queue_length=number + 1)
        await net.until(lambda node=node: knows_the_news_of(net, node, living), 6.0)  # type: ignore[misc]
        await asyncio.sleep(3)


async def test_probes_that_hang_do_not_hold_up_news(net: MemoryNet) -> None:
    """trap 58: more of them than there are slots."""
    a, b, *others = await cluster(net, 24)
    net.silent = {node.name for node in others}
    for node in others:
        a.gossip.probe(node.key)
    await asyncio.sleep(1)
    assert sum(a.dialled[-22:].count(node.address) for node in others) >= 16
    a.publish(urgent=True, queue_length=7)
    assert await net.until(lambda: knows_the_news_of(net, a, [b]), 3) < 0.1


async def test_contacts_that_hang_do_not_hold_up_ticks(net: MemoryNet) -> None:
    a, b = await cluster(net, 2)
    net.silent = {f"s{number}" for number in range(40)}
    for name in net.silent:
        await net.stop(net.start(name))
    a.contacts += [f"{name}:8080" for name in net.silent]
    a.gossip.contacts_changed()
    before = a.dialled.count(b.address)
    await asyncio.sleep(6 * TICK_S)
    assert a.dialled.count(b.address) >= before + 5


# --- somebody wants to know whether a node is back


async def test_a_probe_that_is_asked_for_does_not_wait_for_its_turn(net: MemoryNet) -> None:
    """trap 52: in a mesh of a thousand nodes that would come after forty minutes."""
    a, *others = await cluster(net, 40)
    await asyncio.sleep(1)
    for node in others[:20]:
        before = len(a.dialled)
        a.gossip.probe(node.key)
        await net.until(lambda before=before, node=node: node.address in a.dialled[before:], 0.1)  # type: ignore[misc]
        await asyncio.sleep(0.1)


async def test_who_is_asked_for_every_second_is_still_suspected_and_buried_as_ever(net: MemoryNet) -> None:
    """trap 55: the suspicion takes its time, and who is back in it lives."""
    a, b, _ = await cluster(net, 3)
    await net.stop(b)
    died_at = asyncio.get_running_loop().time()

    def status() -> Status | None:
        view = net.view(a, b)
        return None if view is None else view.status

    while status() is not Status.DEAD:
        a.gossip.probe(b.key)
        await asyncio.sleep(1)
    suspicion_s = a.gossip._core.tuning.suspicion_s(3)
    assert asyncio.get_running_loop().time() - died_at > suspicion_s
    assert [change for change, name in a.changes if name == "n1"][-2:] == [Change.SUSPECT, Change.DEAD]


async def test_a_probe_of_nobody_or_of_who_is_gone(net: MemoryNet) -> None:
    a, b, _ = await cluster(net, 3)
    a.gossip.forget(b.key)
    before = len(a.dialled)
    a.gossip.probe(b.key)
    a.gossip.probe(a.key)
    await asyncio.sleep(0.1)
    assert len(a.dialled) == before


# --- a node is cut off


@pytest.mark.parametrize("contacts", [False, True], ids=["no contacts", "contacts"])
@pytest.mark.parametrize("number", [2, 5])
async def test_a_node_that_was_cut_off_is_back_within_few_ticks(number: int, contacts: bool) -> None:
    """It holds all others for dead by then. Nobody else would notice that it is over, so it goes on trying them."""
    for seed in range(2):
        net = MemoryNet(seed)
        nodes = await cluster(net, number, contacts=contacts)
        alone = nodes[-1].name
        net.connected = lambda a, b, alone=alone: (a == alone) == (b == alone)  # type: ignore[misc]
        await asyncio.sleep(600)
        assert {view.status for view in nodes[-1].gossip.members().values()} == {Status.DEAD}
        net.connected = lambda a, b: True
        assert await net.until(net.know_each_other, 3 * TICK_S) > 0
        await net.close()
