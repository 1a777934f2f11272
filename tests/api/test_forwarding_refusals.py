"""Who says no, and what follows: another node, a pause, or an answer; never a failure of the peer (traps 50, 59)."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from mesh.core.breaker import Limits, Phase
from mesh.errors import (
    CapacityError,
    DrainingError,
    EngineMissingError,
    InstanceError,
    MeshError,
    QueueFullError,
    QueueTimeoutError,
    TooLargeError,
)
from tests.api.loopback import Answer, post, profile
from tests.api.mesh_pair import TINY, MeshNode, mesh_node, met, offers
from tests.fakes import Received, die, json_reply

ASK = b'{"model":"tiny"}'
FAST: dict[str, Any] = {"decode_tps": 9999.0}

REFUSALS = [
    QueueFullError("full"),
    CapacityError("no room"),
    DrainingError("draining"),
    InstanceError("it does not start\nlast line"),
    EngineMissingError("no engine"),
    TooLargeError("too large"),
    QueueTimeoutError("waited"),
    MeshError("bug"),
]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.api.waiting_line.FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr("mesh.api.waiting_line.LAST_PAUSE_S", 0.004)
    monkeypatch.setattr("mesh.net.peer.FULL_S", 0.003)
    monkeypatch.setattr("mesh.api.delivery.CRASH_NOTICE_S", 0.001)


async def ask(node: MeshNode) -> Answer:
    client = await node.client()
    client.send(post(ASK))
    return await client.answer()


def error_of(answer: Answer) -> dict[str, str]:
    error: dict[str, str] = json.loads(answer.body)["error"]
    return error


def waits(max_wait_s: float) -> dict[str, Any]:
    """A node that has the model in its cookbook for others only, with a limit on waiting."""
    return {"profiles": (profile(max_instances=0, max_wait_s=max_wait_s),)}


# --- another candidate


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda error: error.type)
async def test_a_refusal_is_not_shown_while_another_node_can_serve(refusal: MeshError) -> None:
    """trap 59. Saturation opens no circuit."""
    async with met(mesh_node(1, profiles=(), limits=Limits(failure_threshold=1)), mesh_node(2), mesh_node(3)) as nodes:
        one, two, three = nodes
        one.knows(two, offers(**FAST))
        two.admission.refusal = refusal
        answer = await ask(one)
        assert (answer.status, answer.field(b"x-llama-mesh-node")) == (200, b"node-3")
        assert len(two.admission.tickets) == len(three.admission.tickets) == 1
        peer = one.peer(two)
        assert (peer.refusals_total, peer.failures_total, peer.breaker.phase) == (1, 0, Phase.CLOSED)
        metrics = one.ctx.metrics
        assert (metrics.errors_total, metrics.model("peers", "tiny").errors_total) == (0, 0)  # trap 6
        assert len(one.links_to(two)) == 1  # the link is as good as before


async def test_all_are_full_and_then_one_is_not() -> None:
    """They are asked again after a pause; the client only sees the answer (trap 59)."""
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3)) as (one, two, three):
        two.admission.refusal = three.admission.refusal = QueueFullError("full")
        client = await one.client()
        client.send(post(ASK))
        await one.until(lambda: len(two.admission.tickets) > 2 and len(three.admission.tickets) > 2)
        assert one.forwarder.waiting(TINY) in (0, 1)
        three.admission.refusal = None
        answer = await client.answer()
        assert (answer.status, answer.field(b"x-llama-mesh-node")) == (200, b"node-3")
        assert one.access.lines[0]["error"] is None


async def test_all_stay_full() -> None:
    """After max_wait_in_queue_ms the last refusal is the answer, with its source and Retry-After."""
    async with met(mesh_node(1, **waits(0.02)), mesh_node(2), mesh_node(3)) as (one, two, three):
        two.admission.refusal = QueueFullError("full two")
        three.admission.refusal = QueueFullError("full three")
        answer = await ask(one)
        error = error_of(answer)
        assert (answer.status, answer.field(b"retry-after")) == (503, b"5")
        assert (error["type"], error["source"]) == ("queue_full", "peer")
        assert error["message"] in ("node node-2: full two", "node node-3: full three")
        assert one.access.lines[0]["error"] == "queue_full"
        assert one.ctx.metrics.errors_total == 1


async def test_a_refusal_that_stands_is_not_waited_for() -> None:
    """Whoever cannot serve it later either is asked once; with nobody else left that is the answer."""
    async with met(mesh_node(1, profiles=()), mesh_node(2)) as (one, two):
        two.admission.refusal = TooLargeError("needs 9 GiB")
        answer = await ask(one)
        assert (answer.status, error_of(answer)["message"]) == (503, "node node-2: needs 9 GiB")
        assert len(two.admission.tickets) == 1


async def test_how_many_may_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """max_queue_size_per_model holds for those that no node has room for, too; who leaves makes room (trap 2)."""
    monkeypatch.setattr("mesh.api.waiting_line.FIRST_PAUSE_S", 3600.0)
    mine = profile(max_instances=0, max_queue=2, max_wait_s=None)
    async with met(mesh_node(1, profiles=(mine,)), mesh_node(2)) as (one, two):
        two.admission.refusal = QueueFullError("full")
        clients = [await one.client() for _ in range(3)]
        for client in clients[:2]:
            client.send(post(ASK))
        await one.until(lambda: one.forwarder.waiting(TINY) == 2)
        answer = await ask(one)
        assert (answer.status, error_of(answer)["type"]) == (503, "queue_full")
        clients[0].abort()
        await one.until(lambda: one.forwarder.waiting(TINY) == 1)
        clients[2].send(post(ASK))
        await one.until(lambda: one.forwarder.waiting(TINY) == 2)
        for client in clients[1:]:
            client.abort()
        await one.settled()


async def test_the_wait_goes_with_the_request_and_shrinks() -> None:
    """What one node took of it, the next one does not get again."""
    async with met(mesh_node(1, **waits(60.0)), mesh_node(2), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST))
        two.admission.hold = True
        client = await one.client()
        client.send(post(ASK))
        first = await two.admission.ticket()
        assert first.deadline is not None
        assert first.deadline - first.since == pytest.approx(60.0, abs=0.5)
        one.late = 50.0
        three.admission.hold = True
        first.refuse(QueueFullError("full"))
        second = await three.admission.ticket()
        assert second.deadline is not None
        assert second.deadline - second.since == pytest.approx(10.0, abs=0.5)
        second.admit()
        assert (await client.answer()).status == 200


async def test_the_peers_own_limit_holds_if_it_is_shorter() -> None:
    async with met(mesh_node(1, **waits(60.0)), mesh_node(2, profiles=(profile(max_wait_s=3.0),))) as (one, two):
        assert (await ask(one)).status == 200
        ticket = two.admission.tickets[0]
        assert ticket.deadline is not None
        assert ticket.deadline - ticket.since == pytest.approx(3.0, abs=0.5)


# --- this node's own no


async def test_this_node_is_full() -> None:
    """Its refusal leads to a peer and counts as no error (trap 6)."""
    async with met(mesh_node(1), mesh_node(2)) as (one, two):
        one.admission.refusal = QueueFullError("full here")
        assert (await ask(one)).field(b"x-llama-mesh-node") == b"node-2"
        assert one.ctx.metrics.errors_total == one.ctx.metrics.model("hash-tiny", "tiny").errors_total == 0
        two.admission.refusal = InstanceError("dead there")
        one.admission.refusal = InstanceError("dead here")
        answer = await ask(one)
        assert error_of(answer)["message"] == "dead here"  # its own, if it was asked
        assert error_of(answer)["source"] == "instance"


async def test_its_time_in_the_own_queue_is_over() -> None:
    async with met(mesh_node(1), mesh_node(2)) as (one, two):
        one.admission.refusal = QueueTimeoutError("too long")
        assert error_of(await ask(one))["type"] == "queue_timeout"
        assert two.admission.tickets == []


async def test_two_crashes_here_lead_to_a_peer() -> None:
    """Not one byte of an answer has come, so somebody else may try; no error is counted (traps 6, 75)."""
    async with met(mesh_node(1, die), mesh_node(2)) as (one, two):
        answer = await ask(one)
        assert (answer.status, answer.field(b"x-llama-mesh-node")) == (200, b"node-2")
        assert len(one.instance.requests) == 2
        assert len(two.instance.requests) == 1
        assert one.ctx.metrics.errors_total == 0


async def test_two_crashes_everywhere() -> None:
    """Each node's instance gets what it would get for an own client, and no more."""
    async with met(mesh_node(1, die), mesh_node(2, die), mesh_node(3, die)) as nodes:
        answer = await ask(nodes[0])
        assert (answer.status, error_of(answer)["source"]) == (502, "instance")
        assert [len(node.instance.requests) for node in nodes] == [2, 2, 2]
        assert [node.ctx.metrics.errors_total for node in nodes] == [1, 1, 1]


async def test_the_wait_before_a_crash_counts() -> None:
    """What a request waited in this node's queue is gone, whoever serves it next; the service is not."""
    mine = profile(max_wait_s=60.0)
    async with met(mesh_node(1, die, profiles=(mine,)), mesh_node(2)) as (one, two):
        two.admission.hold = one.admission.hold = True
        one.knows(two, offers(decode_tps=1.0))
        client = await one.client()
        client.send(post(ASK))
        first = await one.admission.ticket()
        one.late = 20.0
        first.admit()
        second = await one.admission.ticket(1)
        assert second.deadline is not None
        assert second.deadline - one.plane.now() == pytest.approx(40.0, abs=0.5)
        second.admit()
        third = await two.admission.ticket()
        assert third.deadline is not None
        assert third.deadline - third.since == pytest.approx(40.0, abs=0.5)
        third.admit()
        assert (await client.answer()).status == 200


async def test_its_time_is_over_while_no_node_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """max_request_duration_ms: nobody worked on it, so it is 503, as in the queue."""
    monkeypatch.setattr("mesh.api.waiting_line.FIRST_PAUSE_S", 3600.0)
    mine = profile(max_instances=0, max_wait_s=None, max_request_s=60.0)
    async with met(mesh_node(1, profiles=(mine,)), mesh_node(2)) as (one, two):
        two.admission.refusal = QueueFullError("full")
        client = await one.client()
        client.send(post(ASK))
        await one.until(lambda: one.forwarder.waiting(TINY) == 1)
        one.late = 61.0
        answer = await client.answer()
        assert (answer.status, error_of(answer)["type"]) == (503, "request_timeout")


# --- unreachable ones among them


async def test_a_refusal_says_more_than_a_peer_that_is_not_there(unused_tcp_port: int) -> None:
    """The client sees 503 and when to come back, in whatever order they were asked (trap 59)."""
    for first in (2, 3):
        async with met(mesh_node(1, **waits(0.02)), mesh_node(2), mesh_node(3)) as (one, two, three):
            fast = {2: FAST if first == 2 else {}, 3: FAST if first == 3 else {}}
            one.knows(two, offers(**fast[2]), port=unused_tcp_port)
            one.knows(three, offers(**fast[3]))
            three.admission.refusal = QueueFullError("full")
            answer = await ask(one)
            assert (answer.status, answer.field(b"retry-after")) == (503, b"5")


async def test_the_only_node_that_has_it_cannot_be_reached(unused_tcp_port: int) -> None:
    """503, after the wait (trap 62)."""
    async with met(mesh_node(1, **waits(0.02)), mesh_node(2)) as (one, two):
        one.knows(two, offers(), port=unused_tcp_port)
        answer = await ask(one)
        error = error_of(answer)
        assert (answer.status, error["type"], answer.field(b"retry-after")) == (503, "no_capacity", b"5")
        assert "cannot be reached" in error["message"]
        assert len(one.dials) > 1


# --- drained


async def test_a_drained_node() -> None:
    """Its clients are served elsewhere, peers are told, and what it has is finished."""
    gate = asyncio.Event()

    async def play(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        await json_reply(b"here")(request, reader, writer)

    async with met(mesh_node(1, play), mesh_node(2, json_reply(b"there"))) as (one, two):
        running = await one.client()
        running.send(post(ASK))
        await one.instance.until(lambda: len(one.instance.requests) == 1)
        two.knows(one, offers(**FAST))
        two.admission.refusal = QueueFullError("full")
        passed_on = await two.client()
        passed_on.send(post(ASK))
        await one.instance.until(lambda: len(one.instance.requests) == 2)
        two.admission.refusal = None
        one.ctx.drained = True
        assert (await ask(one)).body == b"there"
        two.admission.cold = True  # so that the other one looks better
        assert (await ask(two)).body == b"there"
        assert two.peer(one).draining  # it said so in person
        assert two.peer(one).refusals_total == 1
        gate.set()
        assert (await running.answer()).body == (await passed_on.answer()).body == b"here"


async def test_a_drained_node_that_is_the_only_one() -> None:
    async with met(mesh_node(1), mesh_node(2, profiles=())) as (one, two):
        one.ctx.drained = True
        for node in (one, two):
            answer = await ask(node)
            assert (answer.status, error_of(answer)["type"]) == (503, "draining")
        one.ctx.drained = False
        assert (await ask(one)).status == 200


async def test_a_peer_that_shuts_down() -> None:
    """What it has is finished; the next one goes elsewhere, and the client sees nothing of it."""
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST))
        one.knows(three, offers(), draining=True)
        assert (await ask(one)).field(b"x-llama-mesh-node") == b"node-2"  # and a link is kept
        two.admission.hold = True
        client = await one.client()
        client.send(post(ASK))
        ticket = await two.admission.ticket(1)
        two.ctx.draining = True
        two.plane.begin_drain()
        one.knows(three, offers())
        assert (await ask(one)).field(b"x-llama-mesh-node") == b"node-3"
        ticket.admit()
        assert (await client.answer()).field(b"x-llama-mesh-node") == b"node-2"
        assert one.peer(two).failures_total == 0


# --- many


async def test_a_burst_spreads_over_equals() -> None:
    """Before any news of them: what is on its way counts (trap 50), and equals take turns (trap 51)."""
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3)) as (one, two, three):
        two.admission.hold = three.admission.hold = True
        clients = [await one.client() for _ in range(20)]
        for client in clients:
            client.send(post(ASK))
        await one.until(lambda: len(two.admission.tickets) + len(three.admission.tickets) == 20)
        assert Counter(one.peer(two).forwards) == Counter(one.peer(three).forwards) == {TINY: 10}
        assert len(two.admission.tickets) == 10
        two.admission.tickets[0].admit()  # what is over does not count, and nothing counts less than once
        await one.until(lambda: one.peer(two).forwards == {TINY: 9})
        for ticket in two.admission.tickets[1:] + three.admission.tickets:
            ticket.admit()
        assert [(await client.answer()).status for client in clients] == [200] * 20
        two.admission.hold = three.admission.hold = False
        for _ in range(4):  # and one by one, they take turns
            assert (await ask(one)).status == 200
        assert len(two.admission.tickets) == len(three.admission.tickets) == 12


async def test_a_node_that_idles_serves_itself() -> None:
    async with met(mesh_node(1), mesh_node(2)) as (one, two):
        assert (await ask(one)).field(b"x-llama-mesh-node") == b"node-1"
        assert two.admission.tickets == []
