"""Three to five whole gossip shells with real signatures: join, cut, heal, restart, another key, goodbye."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mesh.core.membership import Change, Status
from tests.memory_net import MemoryNet, MemoryNode

pytestmark = pytest.mark.looptime


@pytest.fixture
async def net() -> AsyncIterator[MemoryNet]:
    net = MemoryNet()
    yield net
    await net.close()


async def cluster(net: MemoryNet, number: int) -> list[MemoryNode]:
    nodes = [net.start(name, contacts=["a:8080"]) for name in "abcde"[:number]]
    await net.until(net.know_each_other, 2.0)
    return nodes


async def test_nodes_join_in_well_under_a_second(net: MemoryNet) -> None:
    began = asyncio.get_running_loop().time()
    await cluster(net, 5)
    assert asyncio.get_running_loop().time() - began < 0.5


async def test_urgent_news_spreads_without_a_tick(net: MemoryNet) -> None:
    a, *others = await cluster(net, 5)
    await asyncio.sleep(12)
    a.publish(urgent=True, draining=True)

    def known() -> bool:
        views = [net.view(node, a) for node in others]
        return all(view is not None and view.payload == a.gossip._core.own.payload for view in views)

    assert await net.until(known, 1.0) < 0.3


async def test_a_kill_is_seen_and_the_restart_too(net: MemoryNet) -> None:
    a, b, c = await cluster(net, 3)
    await net.stop(b)

    def dead() -> bool:
        return all((view := net.view(node, b)) is not None and view.status is Status.DEAD for node in (a, c))

    assert await net.until(dead, 60) > 10
    net.start("b", contacts=["a:8080"], incarnation=5)  # its clock went back
    await net.until(net.know_each_other, 10)
    assert (Change.ALIVE, "b") in a.changes


async def test_a_partition_heals_after_the_tombstones_are_gone(net: MemoryNet) -> None:
    nodes = await cluster(net, 5)
    net.connected = lambda one, other: (one in "ab") == (other in "ab")
    await asyncio.sleep(1500)
    assert [len(node.gossip.members()) for node in nodes] == [1, 1, 2, 2, 2]
    net.connected = lambda one, other: True
    await net.until(net.know_each_other, 90)


async def test_a_new_key_at_an_old_address_is_another_node(net: MemoryNet) -> None:
    a, b, c = await cluster(net, 3)
    await net.stop(b)
    again = net.start("b", contacts=["a:8080"], key_name="b's new key")
    await net.until(lambda: again.key in a.gossip.members() and again.key in c.gossip.members(), 5)
    for node in (a, c):
        node.revoked.add(b.key)
        node.gossip.forget(b.key)
    for _ in range(60):  # the new node heard of the old key, and tells
        await asyncio.sleep(5)
        assert set(a.gossip.members()) == {again.key, c.key}


async def test_a_goodbye_is_not_a_death(net: MemoryNet) -> None:
    a, b, c = await cluster(net, 3)
    await b.gossip.leave()
    await net.stop(b)
    await net.until(lambda: b.key not in a.gossip.members() and b.key not in c.gossip.members(), 0.5)
    await asyncio.sleep(120)
    assert [change for change, name in a.changes if name == "b"] == [Change.JOINED, Change.LEFT]


async def test_a_goodbye_takes_no_longer_than_it_may(net: MemoryNet) -> None:
    a, _, _ = await cluster(net, 3)
    net.silent = {"b", "c"}
    before = asyncio.get_running_loop().time()
    await a.gossip.leave(within_s=1.0)
    assert asyncio.get_running_loop().time() - before <= 1.01


async def test_loss_and_duplicates_kill_nobody() -> None:
    net = MemoryNet(7, loss=0.05, duplicate=0.1)
    nodes = [net.start(name, contacts=["a:8080"]) for name in "abcde"]
    await asyncio.sleep(900)
    assert not [node.name for node in nodes for change, _ in node.changes if change is Change.DEAD]
    await net.until(net.know_each_other, 60)
    await net.close()


async def test_a_thousand_joins_and_leaves_leave_nothing(net: MemoryNet) -> None:
    """trap 63."""
    a = net.start("a")
    tasks = len(asyncio.all_tasks())
    for number in range(1000):
        node = net.start(f"n{number}", contacts=["a:8080"])
        await net.until(net.know_each_other, 5)
        await node.gossip.leave()
        await net.stop(node)
        del net.nodes[node.address]
        assert node.key not in a.gossip.members()
    await asyncio.sleep(700)
    assert len(asyncio.all_tasks()) == tasks
    assert not a.gossip._core._table.members
    assert len(a.gossip._addresses) == 0
    assert len(a.gossip._tasks) == 0
