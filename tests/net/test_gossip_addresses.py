"""Where members say they are, kept up with each change; and that gossip does not go over all of them for nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.membership import MemberView, Status
from mesh.core.node_state import NodeState, PeerKey, encode_state
from mesh.net.gossip_addresses import AddressBook
from tests.members import key_of
from tests.memory_net import MemoryNet


@pytest.fixture
async def net() -> AsyncIterator[MemoryNet]:
    net = MemoryNet()
    yield net
    await net.close()


def view(number: int, *addresses: str, status: Status = Status.ALIVE) -> MemberView:
    payload = encode_state(NodeState(f"n{number}", addresses=addresses))
    return MemberView(key_of(number), payload, status, 1, 1, last_heard=None, updated_at=0.0)


def test_an_address_is_taken_while_somebody_lives_there() -> None:
    book = AddressBook()
    assert not book.changed(view(1, "a:1", "b:1"))
    assert not book.changed(view(2, "b:1"))
    assert book.is_taken("a:1")
    assert not book.changed(view(1, "b:1", "a:1")), "the same ones"
    assert book.changed(view(1, "b:1", status=Status.SUSPECT)), "nobody lives at a:1"
    assert not book.is_taken("a:1")
    assert book.is_taken("b:1")
    assert book.changed(view(2, "b:1", status=Status.DEAD))
    assert not book.is_taken("b:1")
    assert book.of(view(2, "b:1")) == ("b:1",), "the dead are tried there"


def test_who_moves_leaves_its_address() -> None:
    book = AddressBook()
    book.changed(view(1, "a:1"))
    assert book.changed(view(1, "c:1"))
    assert (book.is_taken("a:1"), book.is_taken("c:1")) == (False, True)


def test_who_left_leaves_nothing() -> None:
    """trap 63"""
    book = AddressBook()
    for number in range(200):
        book.changed(view(number, f"a:{number}", "nat:1"))
        book.changed(view(number, f"a:{number}", "nat:1", status=Status.LEFT))
    assert (len(book), book._living, book._taken) == (0, {}, {})


def test_a_record_that_cannot_be_read_has_no_address() -> None:
    book = AddressBook()
    broken = MemberView(key_of(1), b"\xc1", Status.ALIVE, 1, 1, last_heard=None, updated_at=0.0)
    book.changed(broken)
    assert book.of(broken) == ()


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(list(Status)), st.sets(st.sampled_from("abc")))))
def test_it_is_as_if_made_anew(changes: list[tuple[int, Status, set[str]]]) -> None:
    book = AddressBook()
    now: dict[PeerKey, set[str]] = {}
    for number, status, addresses in changes:
        before = set().union(*now.values())
        now[key_of(number)] = addresses if status is Status.ALIVE else set()
        after = set().union(*now.values())
        assert book.changed(view(number, *addresses, status=status)) == bool(before - after)
        assert {address for address in "abc" if book.is_taken(address)} == after


@pytest.mark.looptime
async def test_contacts_are_looked_at_when_something_changes_for_them(net: MemoryNet) -> None:
    """At a thousand nodes there is a message every few milliseconds; each costs the same as in a mesh of two."""
    looks = 0
    a = net.start("a", contacts=["b:8080", "nobody:1"])
    discovered = a.gossip._discovered

    def counted() -> list[str]:
        nonlocal looks
        looks += 1
        return list(discovered())

    a.gossip._discovered = counted
    b = net.start("b")
    await net.until(net.know_each_other, 2)
    await asyncio.sleep(200)
    tries, looks = a.dialled.count("nobody:1"), 0
    for number in range(500):
        b.publish(urgent=True, queue_length=number)
        await asyncio.sleep(0.1)
    tries = a.dialled.count("nobody:1") - tries
    assert looks <= 50 / 4 + 2 * tries


@pytest.mark.looptime
async def test_where_nobody_is_any_more_is_tried_at_once(net: MemoryNet) -> None:
    a, b = net.start("a", contacts=["b:8080"]), net.start("b")
    b.publish(urgent=True, addresses=("b:8080", "door:1"))
    await net.until(net.know_each_other, 2)
    await asyncio.sleep(1)
    a.contacts.append("door:1")
    await asyncio.sleep(60)
    assert "door:1" not in a.dialled
    b.publish(urgent=True, addresses=("b:8080",))
    await net.until(lambda: "door:1" in a.dialled, 0.1)
