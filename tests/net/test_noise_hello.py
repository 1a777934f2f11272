"""What a hello has to prove, and what other versions may put into it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.node_state import PROTOCOL, PeerIdentity
from mesh.errors import LinkError
from mesh.net.noise_hello import Binding, encode_hello, verify_hello
from tests.net.link_sessions import FakeIdentity

BINDING = Binding(initiator=True, handshake_hash=b"h" * 32, static=b"s" * 32)
NODE = FakeIdentity(1)


def hello(**changes: Any) -> bytes:
    fields = msgspec.msgpack.decode(encode_hello(NODE, "node1", "1.0", BINDING))
    return msgspec.msgpack.encode({name: value for name, value in (fields | changes).items() if value != "leave out"})


def refused(content: bytes, binding: Binding = BINDING) -> str:
    with pytest.raises(LinkError) as caught:
        verify_hello(content, binding)
    return caught.value.message


def test_a_good_one() -> None:
    assert verify_hello(hello(), BINDING) == (PeerIdentity(NODE.key, "node1", "1.0"), None)
    assert verify_hello(hello(rotation=b"statement"), BINDING)[1] == b"statement"


def test_a_newer_one_and_an_older_one() -> None:
    """trap 66: unknown fields are ignored, missing ones that have a default get it."""
    assert verify_hello(hello(colour="blue", more={"a": [1]}), BINDING)[0].node_id == "node1"
    assert verify_hello(hello(rotation="leave out"), BINDING)[1] is None


def test_another_protocol_is_named() -> None:
    said = refused(hello(protocol=PROTOCOL + 1, version="9.9", signature=b"of another kind"))
    assert f"protocol {PROTOCOL + 1} " in said
    assert f"protocol {PROTOCOL};" in said
    assert "9.9" in said


@pytest.mark.parametrize(
    "other",
    [
        msgspec.structs.replace(BINDING, initiator=False),
        msgspec.structs.replace(BINDING, handshake_hash=b"x" * 32),
        msgspec.structs.replace(BINDING, static=b"x" * 32),
    ],
)
def test_it_is_for_one_side_of_one_handshake(other: Binding) -> None:
    assert "not signed" in refused(hello(), other)


@pytest.mark.parametrize("key", [FakeIdentity(2).key, b"", b"short", bytes(32), b"\xff" * 32])
def test_it_is_of_the_key_that_it_shows(key: bytes) -> None:
    assert "not signed" in refused(hello(key=key))


@pytest.mark.parametrize(
    "changes",
    [{"node_id": ""}, {"node_id": "x" * 513}, {"version": "x" * 513}, {"node_id": "a\nb"}, {"version": "\x1b[31m"}],
)
def test_names_that_nobody_should_have_to_print(changes: dict[str, str]) -> None:
    assert "name" in refused(hello(**changes))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    refused(content)


@settings(deadline=None)
@given(st.sampled_from(["node_id", "version", "protocol", "key", "signature", "rotation"]), st.from_type(type).map(str))
def test_fields_of_another_kind(name: str, value: str) -> None:
    refused(hello(**{name: [value]}))
