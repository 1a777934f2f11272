"""A node's state as bytes: nodes of other versions, and bytes that mean no good (trap 66)."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mesh.core.node_state import Fit, NodeState, ProfileState, decode_state, encode_state

_FULL = NodeState(
    node_id="gpu-1",
    version="0.5.0",
    engine_version="b9",
    addresses=("192.0.2.1:8080", "[2001:db8::1]:8080"),
    public_url="https://gpu-1.example",
    started_at_unix=1_700_000_000,
    boot="b00t",
    ready=False,
    draining=True,
    left=True,
    current_requests=3,
    queue_length=2,
    capacity_mib={"vram": 24000, "gpu0": 24564},
    used_mib={"vram": 13000},
    profiles=(
        ProfileState(
            key="qwen:fast",
            id="Qwen:Fast",
            aliases=("q",),
            kind="embedding",
            description="d",
            fit="evict",
            ready=1,
            loading=1,
            slots=4,
            busy=3,
            queued=2,
            load_s=12.5,
            prefill_tps=900.0,
            decode_tps=35.0,
            service_s=4.0,
            max_instances=2,
        ),
        ProfileState("a:default", "a"),
    ),
)


def packed(**fields: Any) -> bytes:
    return msgspec.msgpack.encode(fields)


def test_everything_survives_the_way() -> None:
    assert decode_state(encode_state(_FULL)) == _FULL
    assert encode_state(decode_state(encode_state(_FULL))) == encode_state(_FULL)


def test_what_is_not_said_takes_no_room() -> None:
    assert encode_state(NodeState("n")) == packed(node_id="n")


def test_the_least_that_a_node_may_say() -> None:
    """trap 66: an old node that knows hardly any field takes part."""
    found = decode_state(packed(node_id="old", profiles=[{"key": "Qwen:Default", "id": "Qwen"}]))
    assert found == NodeState("old", profiles=(ProfileState("qwen:default", "Qwen"),))
    (profile,) = found.profiles
    assert (profile.fit, profile.max_instances, profile.ready, profile.decode_tps) == (Fit.NOW, 1, 0, None)


def test_what_a_newer_node_says_besides_is_ignored() -> None:
    """trap 66: also new values of what is a list of words today."""
    found = decode_state(
        packed(
            node_id="new",
            version="9.9.9",
            moods=["sunny", {"deep": [1, 2]}],
            profiles=[{"key": "a:default", "id": "a", "fit": "tomorrow", "kind": "video", "smell": 1.5}],
        )
    )
    assert (found.node_id, found.profiles[0].fit, found.profiles[0].kind) == ("new", "tomorrow", "video")


def test_figures_can_be_reckoned_with() -> None:
    """Whatever somebody else wrote: counts are not negative, and rates can be divided by."""
    bad = {"ready": -1, "loading": -2, "slots": -3, "busy": -4, "queued": -5}
    rates = ("load_s", "prefill_tps", "decode_tps", "service_s")
    for rate in (0.0, -1.0, float("nan"), float("inf"), 1e300):
        (found,) = decode_state(
            packed(node_id="n", profiles=[{"key": "a", "id": "a", **bad, **dict.fromkeys(rates, rate)}])
        ).profiles
        assert [getattr(found, name) for name in bad] == [0] * 5
        assert [getattr(found, name) for name in rates] == [None] * 4


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        packed(),
        packed(node_id=""),
        packed(node_id="a\nb"),
        packed(node_id="a\x1b[31m"),
        packed(node_id="x" * 513),
        packed(node_id=5),
        packed(node_id=None),
        packed(node_id="n", profiles=[{"key": "a"}]),
        packed(node_id="n", ready="yes"),
        packed(node_id="n", addresses="a:1"),
        msgspec.msgpack.encode(["n"]),
        packed(node_id="n") + b"\x00",
        b"\x81\xa7node_id\xa2\xff\xfe",
        b"\x91" * 100_000,
    ],
)
def test_what_is_no_state_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="a node's state"):
        decode_state(payload)


_WORDS = st.sampled_from([*NodeState.__struct_fields__, *ProfileState.__struct_fields__, "unknown"])
_NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats()
_VALUES = st.recursive(
    st.none() | st.booleans() | _NUMBERS | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner, max_size=6),
    max_leaves=20,
)


def _decodes_or_raises(payload: bytes) -> None:
    try:
        found = decode_state(payload)
    except ValueError:
        return
    assert found.node_id
    assert found.node_id.isprintable()
    assert min(found.current_requests, found.queue_length) >= 0
    assert decode_state(encode_state(found)) == found, "what was read can be passed on"
    for profile in found.profiles:
        assert min(profile.ready, profile.loading, profile.slots, profile.busy, profile.queued) >= 0
        assert profile.decode_tps is None or profile.decode_tps > 0


@given(st.binary(max_size=200))
@example(b"\xde\xff\xff")
@example(b"\xc9\x7f\xff\xff\xff\x01")
def test_any_bytes_decode_or_raise(payload: bytes) -> None:
    _decodes_or_raises(payload)


@given(st.dictionaries(_WORDS, _VALUES, max_size=8), st.lists(st.dictionaries(_WORDS, _VALUES, max_size=8), max_size=2))
def test_any_values_decode_or_raise(fields: dict[str, Any], profiles: list[dict[str, Any]]) -> None:
    whole = [{"key": "K", "id": "i", **profile} for profile in profiles]
    _decodes_or_raises(packed(**{"node_id": "n", "profiles": whole, **fields}))


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_damaged_record_decodes_or_raises(position: int, byte: int) -> None:
    payload = bytearray(encode_state(_FULL))
    payload[position % len(payload)] = byte
    _decodes_or_raises(bytes(payload))
    _decodes_or_raises(bytes(payload[: position % len(payload)]))


def test_what_others_write_is_fit_for_a_terminal() -> None:
    """Records are shown by ``llama-mesh nodes`` and in logs: no escape sequence gets that far."""
    evil = "\x1b]0;owned\x07\x1b[2J" + "x" * 600
    state = NodeState("n", version=evil, engine_version=evil, public_url=evil, addresses=(evil,) * 99,
                      profiles=(ProfileState(evil, evil, aliases=(evil,), description=evil),))  # fmt: skip
    seen = decode_state(encode_state(state))
    (profile,) = seen.profiles
    texts = [seen.version, seen.engine_version, seen.public_url, *seen.addresses, profile.id, profile.key,
             profile.description, *profile.aliases]  # fmt: skip
    assert len(seen.addresses) == 16
    assert all(text.isprintable() and len(text) <= 512 for text in texts)
