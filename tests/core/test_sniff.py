"""Any first bytes, in any pieces, get one verdict that no later byte changes (trap 71)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.sniff import MAX_PREFIX, NEED_MORE, UNKNOWN, Protocol, sniff

_METHODS = st.sampled_from(
    [b"GET ", b"POST ", b"PRI ", b"DELETE ", b"M-SEARCH ", b"\x16\x03\x01", b"\x16", b"\x00", b"P", b"\r\nGET "]
)


@pytest.mark.parametrize(
    ("prefix", "verdict"),
    [
        (b"", NEED_MORE),
        (b"P", NEED_MORE),
        (b"PRI", NEED_MORE),
        (b"PRI * HTTP/2.0\r\n", Protocol.HTTP2),
        (b"POST /v1", Protocol.HTTP1),
        (b"PROPFIND ", Protocol.HTTP1),
        (b"\r", NEED_MORE),
        (b"\r\n", Protocol.HTTP1),
        (b"\rG", UNKNOWN),
        (b"\x16", NEED_MORE),
        (b"\x16\x03\x01", Protocol.TLS),
        (b"\x16\x05", UNKNOWN),
        (b"\x00\x20", Protocol.NOISE),
        (b"get / ", UNKNOWN),
        (b"SSH-2.0-OpenSSH", UNKNOWN),
        (b"\xff\xfe", UNKNOWN),
        (b"A" * 24, UNKNOWN),
    ],
)
def test_verdicts(prefix: bytes, verdict: object) -> None:
    assert sniff(prefix) is verdict


@given(st.binary(max_size=40) | st.builds(bytes.__add__, _METHODS, st.binary(max_size=30)))
def test_a_verdict_is_final_and_comes_in_time(data: bytes) -> None:
    verdicts = [sniff(data[:n]) for n in range(len(data) + 1)]
    decided = [v for v in verdicts if v is not NEED_MORE]
    assert decided == [decided[0]] * len(decided) if decided else len(data) < MAX_PREFIX
    first = len(verdicts) - len(decided)
    assert all(v is NEED_MORE for v in verdicts[:first])
