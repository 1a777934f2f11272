"""The gossip shell: contacts, trust, signatures, silence, and bytes from anybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.core.gossip_message import MAX_RECEIVED_BYTES, Carried, Message, decode_message, encode_message
from mesh.core.gossip_record import seal
from mesh.core.membership import Change, Status
from mesh.core.node_state import NodeState, PeerIdentity, encode_state
from mesh.net.gossip_records import Gate
from mesh.net.keys import verify
from tests.memory_net import FakeIdentity, MemoryNet, MemoryNode

pytestmark = pytest.mark.looptime


@pytest.fixture
async def net() -> AsyncIterator[MemoryNet]:
    net = MemoryNet()
    yield net
    await net.close()


def errors(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in caplog.records)


async def test_a_contact_that_fails_rests_longer_and_longer_and_is_logged_once(
    net: MemoryNet, caplog: pytest.LogCaptureFixture
) -> None:
    a = net.start("a", contacts=["b:8080"])
    await asyncio.sleep(600)
    assert 12 < a.dialled.count("b:8080") < 60
    assert errors(caplog, "contact cannot be reached") == 1
    caplog.set_level("INFO", "mesh")
    net.start("b")
    await net.until(net.know_each_other, 65)
    assert errors(caplog, "contact reached") == 1


async def test_a_new_contact_is_tried_at_once(net: MemoryNet) -> None:
    a = net.start("a")
    net.start("b")
    await asyncio.sleep(1)
    a.contacts.append("b:8080")
    a.gossip.contacts_changed()
    assert await net.until(net.know_each_other, 1) < 0.2


async def test_a_node_does_not_dial_itself_twice(net: MemoryNet) -> None:
    a = net.start("a", contacts=["a:8080"])
    await asyncio.sleep(300)
    assert a.dialled == ["a:8080"]
    assert not a.gossip.members()


async def test_members_are_not_dialled_as_contacts(net: MemoryNet) -> None:
    a = net.start("a", contacts=["b:8080"])
    net.start("b", contacts=["a:8080"])
    await net.until(net.know_each_other, 1)
    net.requests = 0
    await asyncio.sleep(100)
    assert net.requests < 2 * 30, "ticks alone"
    assert a.gossip._contacts.addresses_of(net.nodes["b:8080"].key) == ["b:8080"]


async def test_silent_peers_hold_up_nobody(net: MemoryNet) -> None:
    """traps 56, 58: three accept and say nothing."""
    nodes = [net.start(name, contacts=["a:8080"]) for name in ("a", "b", "c", "d", "e")]
    await net.until(net.know_each_other, 2)
    net.silent = {"c", "d", "e"}
    a, b = nodes[:2]
    for node in nodes[2:]:
        await net.stop(node)
    for _ in range(20):
        await asyncio.sleep(10)
        view = net.view(a, b)
        assert view is not None
        assert view.status is Status.ALIVE
    assert {name for change, name in a.changes if change is Change.DEAD} == {"c", "d", "e"}


async def test_who_is_not_trusted_does_not_come_in_through_others(net: MemoryNet) -> None:
    a = net.start("a", contacts=["b:8080"])
    b = net.start("b")
    a.refuses.add("c")
    c = net.start("c", contacts=["b:8080"])
    await asyncio.sleep(60)
    assert c.key in b.gossip.members()
    assert c.key not in a.gossip.members()
    a.refuses.clear()
    await net.until(lambda: c.key in a.gossip.members(), 150)


async def test_a_forged_record_changes_nothing(net: MemoryNet) -> None:
    a, b = net.start("a", contacts=["b:8080"]), net.start("b")
    await net.until(net.know_each_other, 2)
    forged = seal(b.key, (9999, 1), encode_state(NodeState("b")), rotation=None, left=True, sign=lambda m: bytes(64))
    a.gossip.receive(PeerIdentity(b.key, "b"), encode_message(carrying(forged)))
    assert b.key in a.gossip.members()
    b.publish(urgent=True, draining=True)
    await asyncio.sleep(0.5)
    view = net.view(a, b)
    assert view is not None
    assert view.payload == encode_state(b.state), "the owner is not blamed"


async def test_a_record_is_verified_once() -> None:
    identity = FakeIdentity("x")
    record = seal(identity.key, (1, 1), encode_state(NodeState("x")), rotation=None, left=False, sign=identity.sign)
    gate = Gate(verify, lambda key, node_id: True, lambda key: True)
    for _ in range(5):
        passed, refused = gate.pass_on(carrying(record), lambda record: True, 0.0)
        assert [found for found, _ in passed] == [record]
        assert not refused
    assert gate.verifications == 1
    gate.pass_on(carrying(record), lambda record: False, 0.0)
    assert gate.verifications == 1


async def test_a_copied_key_is_reported_once(net: MemoryNet, caplog: pytest.LogCaptureFixture) -> None:
    net.start("a")
    one = net.start("b", contacts=["a:8080"])
    net.start("b", contacts=["a:8080"], address="elsewhere:1", key_name="b", boot="the copy")
    await asyncio.sleep(300)
    assert 1 <= errors(caplog, "another process uses this node's key") <= 2, "once by each of the two"
    assert [change for change, _ in one.changes].count(Change.OWN_KEY) <= 1


async def test_a_restart_with_an_earlier_clock_is_no_alarm(net: MemoryNet, caplog: pytest.LogCaptureFixture) -> None:
    net.start("a")
    b = net.start("b", contacts=["a:8080"], incarnation=5000)
    await net.until(net.know_each_other, 2)
    for incarnation in (4000, 3000, 2000):
        await net.stop(b)
        b = net.start("b", contacts=["a:8080"], incarnation=incarnation)
        await net.until(net.know_each_other, 20)
        await asyncio.sleep(20)
    assert errors(caplog, "another process") == 0


async def test_a_callback_that_fails_does_not_stop_gossip(net: MemoryNet, caplog: pytest.LogCaptureFixture) -> None:
    a = net.start("a")
    a.changes = None  # type: ignore[assignment]
    net.start("b", contacts=["a:8080"])
    await net.until(net.know_each_other, 2)
    assert errors(caplog, "on_change failed") == 1


async def test_old_and_new_versions_understand_each_other(net: MemoryNet) -> None:
    """trap 66: a message with nothing but the minimum, and one with fields of the future."""
    a = net.start("a")
    old, new = FakeIdentity("old"), FakeIdentity("new")
    minimal = msgspec.msgpack.encode({"v": 1})
    assert decode_message(a.gossip.receive(PeerIdentity(old.key, "old"), minimal)).me is not None
    body = msgspec.msgpack.encode(
        {"k": new.key, "i": 7, "v": 1, "p": msgspec.msgpack.encode({"node_id": "new", "gpu": 1}), "colour": "blue"}
    )
    carried = {"b": body, "s": new.sign(b"llama-mesh gossip record 1\x00" + body), "ttl": 3}
    future = {"v": 1, "r": [carried], "me": [new.key[:8], 7, 1, "more"], "mood": {"x": 1}}
    a.gossip.receive(PeerIdentity(new.key, "new"), msgspec.msgpack.encode(future))
    assert a.gossip.members()[new.key].incarnation == 7
    wants = msgspec.msgpack.encode({"v": 1, "w": [new.key[:8]]})
    answer = decode_message(a.gossip.receive(PeerIdentity(old.key, "old"), wants))
    assert [found.body for found in answer.records] == [body], "what it does not know it passes on"


async def test_another_protocol_is_refused(net: MemoryNet) -> None:
    a = net.start("a")
    with pytest.raises(ValueError, match="protocol"):
        a.gossip.receive(PeerIdentity(FakeIdentity("x").key, "x"), msgspec.msgpack.encode({"v": 2}))
    with pytest.raises(ValueError, match="limit"):
        a.gossip.receive(PeerIdentity(FakeIdentity("x").key, "x"), bytes(MAX_RECEIVED_BYTES + 1))


class TestFuzz:
    """Any bytes are answered or refused, and hurt nobody."""

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.binary(max_size=300))
    def test_bytes(self, data: bytes) -> None:
        self.answered(data)

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        message=st.dictionaries(
            st.sampled_from(["v", "me", "n", "d", "r", "h", "s", "w", "l", "m", "c", "?"]),
            st.recursive(
                st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=300) | st.just(1),
                lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.integers(-5, 70), inner, max_size=4),
                max_leaves=12,
            ),
        )
    )
    def test_maps(self, message: dict[str, object]) -> None:
        self.answered(msgspec.msgpack.encode({"v": 1, **message}))

    def answered(self, data: bytes) -> None:
        async def receive() -> None:
            net = MemoryNet()
            node: MemoryNode = net.start("a")
            try:
                answer = node.gossip.receive(PeerIdentity(FakeIdentity("x").key, "x"), data)
            except ValueError:
                pass
            else:
                decode_message(answer)
            await net.close()

        asyncio.run(receive())


def carrying(record) -> Message:  # type: ignore[no-untyped-def]
    return Message(records=(Carried(record.body, record.signature, 2),))
