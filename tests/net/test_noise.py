"""The session without a network: published vectors, every kind of damage, what each side is told."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.node_state import PeerIdentity, PeerKey
from mesh.errors import LinkError, UntrustedPeerError
from mesh.net.noise import PROLOGUE, Session, Stage
from mesh.net.noise_handshake import Handshake
from mesh.net.noise_hello import Binding, SelfDialError
from mesh.net.noise_records import MAX_CONTENT, Control
from tests.net.link_sessions import (
    FakeIdentity,
    SignedHellos,
    contents,
    established,
    initiator,
    responder,
    shake_hands,
)

#: A handshake takes a millisecond; on a machine that has other work, more than Hypothesis would wait.
UNTIMED = settings(deadline=None)

VECTORS = json.loads((Path(__file__).parent / "vectors" / "noise_xxpsk3.json").read_text())["vectors"]


class VectorHellos:
    """Says what the vector says, and takes whatever comes."""

    def __init__(self, says: bytes) -> None:
        self.says = says
        self.heard = b""
        self.binding: Binding

    def make(self, binding: Binding) -> bytes:
        self.binding = binding
        return self.says

    def check(self, content: bytes, binding: Binding) -> PeerIdentity:
        self.heard = content
        return PeerIdentity(PeerKey(b""), "")


@pytest.mark.parametrize("vector", VECTORS)
def test_the_published_vectors(vector: dict[str, Any]) -> None:
    """Byte for byte, both sides, the handshake and the transport; the first transport messages are our hellos."""
    messages = [(bytes.fromhex(each["payload"]), bytes.fromhex(each["ciphertext"])) for each in vector["messages"]]
    payloads = [payload for payload, _ in messages]
    records = [len(message).to_bytes(2, "big") + message for _, message in messages]

    def side(name: str, hellos: VectorHellos) -> Session:
        return Session(
            initiator=name == "init",
            psk=bytes.fromhex(vector[f"{name}_psks"][0]),
            static_private=bytes.fromhex(vector[f"{name}_static"]),
            hellos=hellos,
            prologue=bytes.fromhex(vector[f"{name}_prologue"]),
            ephemeral_private=bytes.fromhex(vector[f"{name}_ephemeral"]),
            payloads=(payloads[0], payloads[1], payloads[2]),
        )

    hellos = VectorHellos(payloads[4]), VectorHellos(payloads[3])  # the responder's transport message comes first there
    one, two = side("init", hellos[0]), side("resp", hellos[1])
    written = shake_hands(one, two)
    assert written == ([records[0], records[2] + records[4]], [records[1], records[3]])
    assert (hellos[1].heard, hellos[0].heard) == (payloads[4], payloads[3])
    for each in hellos:
        assert each.binding.handshake_hash == bytes.fromhex(vector["handshake_hash"])
    assert two.sealer.seal(payloads[5]) == records[5]
    assert one.receive_data(records[5]) == [payloads[5]]


def test_both_learn_who_the_other_is() -> None:
    one, two = initiator(1), responder(2)
    first, second = shake_hands(one, two)
    assert one.peer == PeerIdentity(FakeIdentity(2).key, "node2", "1.0")
    assert two.peer == PeerIdentity(FakeIdentity(1).key, "node1", "1.0")
    assert one.stage is two.stage is Stage.ESTABLISHED
    assert first[0][0] == 0  # by which the one port tells a link
    assert [len(first), len(second)] == [2, 2]  # message 3 and the hello are one write


def test_the_hellos_are_bound_to_the_roles_and_statics() -> None:
    hellos = SignedHellos(FakeIdentity(1)), SignedHellos(FakeIdentity(2))
    shake_hands(initiator(1, hellos=hellos[0]), responder(2, hellos=hellos[1]))
    mine, yours = hellos[0].bindings[0], hellos[1].bindings[0]
    assert mine.handshake_hash == yours.handshake_hash
    assert (mine.initiator, yours.initiator) == (True, False)
    assert mine.static != yours.static


# --- what each side is told


def fails(receiver: Session, data: bytes) -> LinkError:
    with pytest.raises(LinkError) as caught:
        receiver.receive_data(data)
    assert receiver.stage is Stage.FAILED
    with pytest.raises(LinkError, match="failed before"):
        receiver.receive_data(b"more")
    return caught.value


def ends(session: Session) -> str:
    with pytest.raises(LinkError) as caught:
        session.receive_eof()
    return caught.value.message


def test_another_token() -> None:
    """Who can know says so; the other guesses well. Nothing is said to who does not know the token."""
    one, two = initiator(psk=bytes(32)), responder()
    two.receive_data(one.data_to_send())
    one.receive_data(two.data_to_send())
    error = fails(two, one.data_to_send())
    assert "cluster token is not the one of this node" in error.message
    assert two.data_to_send() == b""
    assert "most likely the cluster tokens differ" in ends(one)


def test_another_version_of_the_protocol() -> None:
    one, two = initiator(prologue=b"llama-mesh link 2"), responder()
    assert "another version of the link protocol" in fails(two, one.data_to_send()).message
    assert "no llama-mesh node of this version" in ends(one)


def test_who_is_not_trusted_is_told_so() -> None:
    """By the responder, before it says who it is."""
    one, two = initiator(), responder(hellos=SignedHellos(FakeIdentity(2), refusal=UntrustedPeerError("a stranger")))
    two.receive_data(one.data_to_send())
    one.receive_data(two.data_to_send())
    assert isinstance(fails(two, one.data_to_send()), UntrustedPeerError)
    refusal = two.data_to_send()
    assert len(refusal) == 18
    assert "refused this node" in fails(one, refusal).message


def test_a_responder_that_is_not_trusted_is_told_so() -> None:
    """By the initiator, on a link that the responder takes for established."""
    one, two = initiator(hellos=SignedHellos(FakeIdentity(1), refusal=UntrustedPeerError("a stranger"))), responder()
    two.receive_data(one.data_to_send())
    one.receive_data(two.data_to_send())
    two.receive_data(one.data_to_send())
    assert isinstance(fails(one, two.data_to_send()), UntrustedPeerError)
    assert "refused this node" in fails(two, one.data_to_send()).message


def test_reaching_oneself() -> None:
    """The initiator must learn it, and before the other side could refuse it for anything else."""
    one, two = initiator(1), responder(1)
    two.receive_data(one.data_to_send())
    assert isinstance(fails(one, two.data_to_send()), SelfDialError)
    assert one.data_to_send() == b""


def test_hello_too_large_and_none() -> None:
    class Large(SignedHellos):
        def make(self, binding: Binding) -> bytes:
            return b"x" * 9000

    one, two = initiator(hellos=Large(FakeIdentity(1))), responder()
    two.receive_data(one.data_to_send())
    one.receive_data(two.data_to_send())
    assert "too large" in fails(two, one.data_to_send()).message
    for kind, said in (
        (Control.CLOSE, "instead of saying"),
        (Control.PING, "instead of"),
        (Control.REFUSED, "refused"),
    ):
        one, two = initiator(), responder()
        two.receive_data(one.data_to_send())
        one.receive_data(two.data_to_send())
        one._outgoing[1] = _first_control(one, kind)
        assert said in fails(two, one.data_to_send()).message


def _first_control(session: Session, kind: Control) -> bytes:
    session.sealer._count = 0
    return session.sealer.seal_control(kind)


# --- handshake messages have one size


@pytest.mark.parametrize("first", [b"\xff", b"\x00\x31", b"\x00\x2f", b"\x01", b"\x00\x00"])
def test_a_first_record_of_another_size_is_refused_at_once(first: bytes) -> None:
    assert "not the handshake" in fails(responder(), first).message


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_message_of_another_size(number: int) -> None:
    one, two = initiator(), responder()
    for _ in range(number):
        two.receive_data(one.data_to_send())
        one, two = two, one
    assert "not the handshake" in fails(two, b"\xff\xff").message


def test_a_handshake_byte_by_byte() -> None:
    one, two = initiator(), responder()
    for sender, receiver in ((one, two), (two, one), (one, two), (two, one)):
        for byte in sender.data_to_send():
            assert receiver.receive_data(bytes([byte])) == []
    assert one.stage is two.stage is Stage.ESTABLISHED


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31)])
def test_keys_that_lead_to_nothing(public: bytes) -> None:
    """An ephemeral key of low order gives a known secret; it is refused, as our error."""
    two = responder()
    fails(two, b"\x00\x30" + public + bytes(16))


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31)])
def test_such_a_key_in_a_message_that_is_right_otherwise(public: bytes) -> None:
    """The tag of message 1 is over public data, so anybody can make it: the answer cannot be computed, for no token."""
    forged = Handshake(initiator=True, psk=bytes(32), static_private=bytes(range(32)), prologue=PROLOGUE)
    forged._state.e = SimpleNamespace(public_bytes=public)
    message = forged.write()
    assert message.startswith(public)
    fails(responder(), len(message).to_bytes(2, "big") + message)


# --- damage


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:stop] for start, stop in pairwise(bounds)]


CUTS = st.lists(st.integers(0, 10**6), max_size=6)


@UNTIMED
@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=6), CUTS)
def test_any_boundaries(writes: list[bytes], cuts: list[int]) -> None:
    one, two = established()
    wire = b"".join(map(one.sealer.seal, writes)) + one.sealer.seal_control(Control.CLOSE)
    opened = [item for piece in pieces(wire, cuts) for item in two.receive_data(piece)]
    assert opened == [*writes, Control.CLOSE]
    two.receive_eof()


@UNTIMED
@given(st.integers(0, 3), st.data(), CUTS)
def test_one_changed_byte_anywhere_in_the_handshake(number: int, data: st.DataObject, cuts: list[int]) -> None:
    """Nobody gets to say a byte on a handshake that was tampered with."""
    one, two = initiator(), responder()
    sender, receiver = one, two
    for _ in range(number):
        receiver.receive_data(sender.data_to_send())
        sender, receiver = receiver, sender
    message = bytearray(sender.data_to_send())
    message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        for piece in pieces(bytes(message), cuts):
            receiver.receive_data(piece)
        # A key's unused top bit does not change it, so it is found with the next message; a length may ask for more.
        if answer := receiver.data_to_send():
            sender.receive_data(answer)
        assert receiver.stage is not Stage.ESTABLISHED
        receiver.receive_eof()
    except LinkError:
        return
    raise AssertionError("tampered with, and nobody saw it")


@UNTIMED
@given(st.data(), CUTS)
def test_one_changed_byte_on_an_established_link(data: st.DataObject, cuts: list[int]) -> None:
    one, two = established()
    writes = data.draw(st.lists(st.binary(min_size=1, max_size=100), min_size=1, max_size=5))
    wire = bytearray(b"".join(map(one.sealer.seal, writes)))
    wire[data.draw(st.integers(0, len(wire) - 1))] ^= data.draw(st.integers(1, 255))
    delivered: list[bytes | Control] = []
    with pytest.raises(LinkError):  # noqa: PT012  # at the latest when the connection ends
        for piece in pieces(bytes(wire), cuts):
            delivered += two.receive_data(piece)
        two.receive_eof()
    assert delivered == writes[: len(delivered)]
    assert len(delivered) < len(writes)


@UNTIMED
@given(st.permutations([0, 1, 2, 3]), st.integers(0, 4))
def test_records_in_another_order_or_number(order: list[int], count: int) -> None:
    one, two = established()
    records = [one.sealer.seal(b"%d" % number) for number in range(4)]
    delivered: list[bytes | Control] = []
    try:
        for number in order[:count]:
            delivered += two.receive_data(records[number])
    except LinkError:
        assert order[:count] != sorted(order)[:count]
    assert delivered == [b"%d" % number for number in range(len(delivered))]


def test_replay_and_reflection() -> None:
    one, two = established()
    record = one.sealer.seal(b"pay 5")
    assert two.receive_data(record) == [b"pay 5"]
    fails(two, record)
    fails(one, one.sealer.seal(b"to you"))


def test_another_link_of_the_same_two() -> None:
    one, two = established()
    record = established()[0].sealer.seal(b"x")
    fails(two, record)
    assert one.stage is Stage.ESTABLISHED


def test_a_recorded_handshake_cannot_be_played_again() -> None:
    one, two = initiator(), responder()
    first, _ = shake_hands(one, two)
    again = responder()
    again.receive_data(first[0])
    assert again.data_to_send()
    fails(again, first[1])


@UNTIMED
@given(st.lists(st.binary(max_size=200), max_size=5), st.booleans(), st.booleans())
def test_any_bytes(data: list[bytes], begun: bool, theirs: bool) -> None:
    """Whatever comes, at whatever stage: nothing, or our error (h11's invariant)."""
    one, two = established() if begun else (initiator(), responder())
    target = one if theirs else two
    try:
        for piece in data:
            assert contents(target.receive_data(piece)) == b""
        target.receive_eof()
    except LinkError:
        pass
    else:
        raise AssertionError("a clean end that nobody said")


# --- the end, and size


def test_an_end_without_a_goodbye() -> None:
    one, two = established()
    two.receive_data(one.sealer.seal(b"half of it"))
    assert "without a goodbye" in ends(two)


def test_a_goodbye_ends_what_is_listened_to() -> None:
    one, two = established()
    after = one.sealer.seal_control(Control.CLOSE) + one.sealer.seal(b"one more thing") + b"\x00\x00 rubbish"
    assert two.receive_data(after) == [Control.CLOSE]
    assert two.receive_data(b"more") == []
    two.receive_eof()


def test_control_of_a_kind_that_nobody_knows() -> None:
    one, two = established()
    seal = one.sealer._encrypt
    message = seal(bytes(4) + (1).to_bytes(8, "little"), b"", b"dance")
    assert "control record" in fails(two, len(message).to_bytes(2, "big") + message).message
    plain = established()
    assert "control record" in fails(plain[1], plain[0].sealer.seal(b"")).message


@pytest.mark.parametrize("length", range(16))
def test_a_record_that_is_too_short(length: int) -> None:
    assert "too short" in fails(established()[1], length.to_bytes(2, "big") + bytes(length)).message


@pytest.mark.parametrize("size", [1, MAX_CONTENT - 1, MAX_CONTENT, MAX_CONTENT + 1, 3 * MAX_CONTENT, 200_001])
def test_large_writes_become_as_many_records_as_they_need(size: int) -> None:
    one, two = established()
    data = bytes(range(251)) * (size // 251) + bytes(size % 251)
    records = one.sealer.seal_all(data)
    assert len(records) == -(-size // MAX_CONTENT)
    opened = two.receive_data(b"".join(records))
    assert all(opened)
    assert contents(opened) == data
