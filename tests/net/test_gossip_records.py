"""How many members a node lets in: whoever has the token could make up any number."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.core.gossip_message import Carried, Message
from mesh.core.gossip_record import Record, seal
from mesh.core.node_state import NodeState, PeerKey, encode_state
from mesh.net import gossip_records
from mesh.net.gossip_records import Gate
from mesh.net.keys import verify


def made_up() -> Iterator[tuple[PeerKey, Ed25519PrivateKey]]:
    while True:
        private = Ed25519PrivateKey.generate()
        yield PeerKey(private.public_key().public_bytes_raw()), private


def record(key: PeerKey, private: Ed25519PrivateKey, version: int = 1, padding: int = 0) -> Record:
    state = NodeState("n", public_url="x" * padding)
    return seal(key, (1, version), encode_state(state), rotation=None, left=False, sign=private.sign)


def passed(gate: Gate, *records: Record) -> list[Record]:
    carried = tuple(Carried(r.body, r.signature) for r in records)
    return [r for r, _ in gate.pass_on(Message(records=carried), lambda r: True, 0.0)[0]]


@pytest.mark.parametrize("limit", ["MOST_MEMBERS", "MOST_BYTES"])
def test_there_is_an_end_of_members(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(record(*next(made_up())).body)
    monkeypatch.setattr(gossip_records, limit, {"MOST_MEMBERS": 3, "MOST_BYTES": 3 * size}[limit])
    gone: set[PeerKey] = set()
    gate = Gate(verify, lambda key, node_id: True, lambda key: key not in gone)
    people = made_up()
    three = [next(people) for _ in range(3)]
    assert len(passed(gate, *(record(*one) for one in three))) == 3
    late = next(people)
    assert passed(gate, record(*late, version=1)) == []
    assert len(passed(gate, record(*three[0], version=2))) == 1, "who is one may have news"
    gone.add(three[1][0])
    assert len(passed(gate, record(*late, version=2))) == 1, "who is gone leaves room"
    assert passed(gate, record(*next(people))) == []


def test_a_member_may_not_grow_beyond_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gossip_records, "MOST_BYTES", 400)
    gate, one = Gate(verify, lambda key, node_id: True, lambda key: True), next(made_up())
    assert len(passed(gate, record(*one))) == 1
    assert passed(gate, record(*one, version=2, padding=500)) == []
