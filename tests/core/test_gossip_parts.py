"""Records, messages, buckets, rumours and contacts, each for itself."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.gossip_buckets import DIGEST_BYTES, Buckets, bucket_of, is_empty
from mesh.core.gossip_contacts import Contacts
from mesh.core.gossip_message import Carried, Draft, Heat, Message, decode_message, encode_message, opened
from mesh.core.gossip_record import DOMAIN, MAX_COUNT, MAX_PAYLOAD_BYTES, Record, read, seal
from mesh.core.gossip_rumours import Rumours
from mesh.core.node_state import PeerKey

KEYS = [PeerKey(Random(number).randbytes(32)) for number in range(300)]


def record(number: int, *, age: tuple[int, int] = (1, 1), size: int = 10) -> Record:
    return seal(KEYS[number], age, bytes(size), rotation=b"r", left=False, sign=lambda message: bytes(64))


def test_a_record_survives_its_way() -> None:
    signed: list[bytes] = []

    def sign(message: bytes) -> bytes:
        signed.append(message)
        return bytes(64)

    made = seal(KEYS[0], (3, 4), b"state", rotation=b"old key", left=True, sign=sign)
    assert read(made.body, made.signature) == made
    assert signed == [DOMAIN + made.body] == [made.signed]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_not(data: bytes) -> None:
    try:
        found = read(data, bytes(64))
    except ValueError:
        return
    assert len(found.key) == 32


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_not(data: bytes) -> None:
    try:
        message = decode_message(data)
    except ValueError:
        return
    assert decode_message(encode_message(message)) == message
    opened(message)


def test_a_broken_record_does_not_spoil_the_message() -> None:
    good = record(1)
    message = Message(
        records=(Carried(b"junk", bytes(64)), Carried(good.body, good.signature, 1), Carried(good.body, b""))
    )
    assert opened(message) == [(good, 1)]


@given(
    sizes=st.lists(st.integers(0, MAX_PAYLOAD_BYTES), max_size=8),
    many=st.integers(0, 300),
    cap=st.sampled_from([1000, 65536]),
    count=st.sampled_from([0, 2**20, MAX_COUNT]),
)
def test_no_message_exceeds_its_cap(sizes: list[int], many: int, cap: int, count: int) -> None:
    draft = Draft(record(0, age=(count, count)), members=count, digest=bytes(DIGEST_BYTES), cap=cap)
    for number in range(many):
        small = record(number, age=(count, count), size=5)
        draft.mention(small)
        draft.doubt(small)
        draft.want(small.short)
        draft.list_bucket(number, [small, small])
    for number, size in enumerate(sizes):
        draft.carry(record(number, age=(count, count), size=size), Heat.URGENT)
    assert len(encode_message(draft.message())) <= cap


def test_what_has_no_room_is_said_to_be_missing() -> None:
    draft = Draft(record(0), cap=2000)
    assert draft.carry(record(1, size=1000), Heat.COLD)
    assert not draft.more
    assert not draft.carry(record(2, size=1000), Heat.COLD)
    assert draft.message().more


def test_buckets_show_where_two_differ() -> None:
    one, other = Buckets(), Buckets()
    for key in KEYS:
        one.put(key, (1, 1))
    for key in reversed(KEYS):
        other.put(key, (0, 9))
        other.put(key, (1, 1))
    assert one.digest() == other.digest()
    other.put(KEYS[0], (1, 2))
    other.drop(KEYS[1])
    assert set(one.differing(other.digest())) == {bucket_of(KEYS[0]), bucket_of(KEYS[1])}
    assert one.differing(b"another length") == []
    assert is_empty(Buckets().digest(), 5)


def test_a_rumour_has_a_budget_and_nobody_is_told_twice() -> None:
    rumours = Rumours()
    rumours.limit = 4
    rumours.add(KEYS[0], (1, 1), source=KEYS[1])
    assert rumours.fresh_for(KEYS[1]) == [] == rumours.fresh_for(KEYS[0])
    for peer in KEYS[2:6]:
        assert rumours.fresh_for(peer)
        rumours.sent(KEYS[0], peer)
        assert not rumours.fresh_for(peer)
    assert not len(rumours)


def test_who_shows_that_it_knows_costs_a_send() -> None:
    rumours = Rumours()
    rumours.limit = 2
    rumours.add(KEYS[0], (1, 2))
    rumours.knows(KEYS[1], KEYS[0], (1, 1))
    assert rumours.fresh_for(KEYS[1]), "that was an older one"
    rumours.knows(KEYS[1], KEYS[0], (1, 2))
    rumours.knows(KEYS[2], KEYS[0], (1, 2))
    assert not len(rumours)


class TestContacts:
    def due(self, contacts: Contacts, now: float, alive: tuple[PeerKey, ...] = ()) -> list[str]:
        found = contacts.due(now, lives=lambda key: key in alive, known=lambda address: address == "known")
        return [contact.address for contact in found]

    def test_it_is_tried_while_nobody_lives_there(self) -> None:
        contacts = Contacts(lambda: 0.5)
        contacts.replace(["a", "known"])
        [contact] = contacts.due(0.0, lives=lambda key: False, known=lambda address: address == "known")
        assert self.due(contacts, 0.0) == [], "it is being tried"
        contacts.reached(contact, KEYS[0], 0.1, is_self=False)
        assert self.due(contacts, 100.0, (KEYS[0],)) == []
        assert self.due(contacts, 100.0) == ["a"]

    @pytest.mark.parametrize("chance", [0.0, 1.0])
    def test_it_rests_between_failures(self, chance: float) -> None:
        contacts, now, rests = Contacts(lambda: chance), 0.0, []
        contacts.replace(["a"])
        for number in range(10):
            [contact] = contacts.due(now, lives=lambda key: False, known=lambda address: False)
            assert contacts.failed(contact, now) is (number == 0)
            rests.append(contact.retry_at - now)
            now = contact.retry_at
        assert max(rests) <= 60.1
        assert rests[0] <= 1.1
        assert min(rests) > 0

    def test_who_is_oneself_is_not_tried_again(self) -> None:
        contacts = Contacts(lambda: 0.5)
        contacts.replace(["a"])
        [contact] = contacts.due(0.0, lives=lambda key: False, known=lambda address: False)
        contacts.reached(contact, KEYS[0], 0.0, is_self=True)
        assert self.due(contacts, 1e9) == []
        contacts.replace([])
        assert self.due(contacts, 1e9) == []
