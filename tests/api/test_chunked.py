"""Chunked coding: any pieces give the same payload, anything malformed our error, h11 as the oracle (traps 71, 76)."""

from __future__ import annotations

from itertools import pairwise

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.api.chunked import ChunkedDecoder, ChunkError, chunk

_PAYLOADS = st.lists(st.binary(min_size=1, max_size=40), max_size=5)


def _encode(payloads: list[bytes]) -> bytes:
    return b"".join(chunk(p) for p in payloads) + b"0\r\n\r\n"


def _decode(data: bytes, cuts: list[int]) -> tuple[bytes, int, bool]:
    decoder, out, consumed = ChunkedDecoder(), bytearray(), 0
    edges = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    for start, stop in pairwise(edges):
        piece = data[start:stop]
        consumed += decoder.feed(piece, 0, out.extend)
    return bytes(out), consumed, decoder.done


@given(_PAYLOADS, st.lists(st.integers(0, 200), max_size=8), st.binary(max_size=8))
def test_any_pieces_give_the_same_payload(payloads: list[bytes], cuts: list[int], behind: bytes) -> None:
    coded = _encode(payloads)
    assert _decode(coded + behind, cuts) == (b"".join(payloads), len(coded), True)


@given(
    st.binary(max_size=60)
    | st.builds(
        lambda p, i, b: _encode(p)[:i] + b + _encode(p)[i:], _PAYLOADS, st.integers(0, 60), st.binary(max_size=2)
    ),
    st.lists(st.integers(0, 60), max_size=4),
)
def test_any_bytes_decode_or_raise_ours_and_h11_agrees(data: bytes, cuts: list[int]) -> None:
    try:
        payload, consumed, done = _decode(data, cuts)
    except ChunkError:
        with pytest.raises(ChunkError):
            _decode(data, [])
        return
    assert (payload, consumed, done) == _decode(data, [])
    if done:
        server = h11.Connection(h11.SERVER)
        server.receive_data(b"POST / HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\n" + data[:consumed])
        assert isinstance(server.next_event(), h11.Request)
        seen = b""
        while isinstance(event := server.next_event(), h11.Data):
            seen += event.data
        assert isinstance(event, h11.EndOfMessage)
        assert seen == payload


@pytest.mark.parametrize(
    "bad",
    [
        b"0x1\r\na\r\n",
        b"+1\r\na\r\n",
        b" 1\r\na\r\n",
        b"1_0\r\n",
        b"\r\n",
        b"1\na\r\n",
        b"1\r\nab\r\n",
        b"1\r\na\n0\r\n",
        b"1" * 16 + b"\r\n",
        b"0\r\nbad trailer\r\n\r\n",
        b"1;" + b"x" * 5000,
        b"0\r\n" + b"T: 1\r\n" * 4000,
        b"1;\x00\r\n",
    ],
)
def test_malformed(bad: bytes) -> None:
    for cuts in ([], list(range(len(bad)))[:100]):
        with pytest.raises(ChunkError):
            _decode(bad, cuts)


@given(_PAYLOADS, st.integers(0, 300))
def test_an_interruption_is_read_and_leaves_the_message_open(payloads: list[bytes], cut: int) -> None:
    coded = _encode(payloads)
    cut = min(cut, len(coded) - 5)  # before the last chunk
    decoder = ChunkedDecoder()
    decoder.feed(coded[:cut], 0, bytes)
    words = decoder.interruption(b"\n\nEVENT")
    if words:
        payload, _, done = _decode(coded[:cut] + words, [])
        assert payload.endswith(b"\n\nEVENT")
        assert not done


def test_a_read_that_is_exactly_one_chunk() -> None:
    """The shortcut for what nearly every read of a stream is: it tells such a read by its length and first line."""
    for size in (1, 15, 16, 255, 256, 257, 2046, 2047, 2048):
        payload = b"x" * size
        decoder, out = ChunkedDecoder(), list[bytes]()
        for _ in range(2):
            assert decoder.feed(chunk(payload), 0, out.append) == len(chunk(payload))
        assert out == [payload, payload]
        assert decoder.feed(b"0\r\n\r\n", 0, out.append) == 5
        assert decoder.done
    for bad in (b"2\r\nab\r\r\n", b"2\r\nab\n\n", b"g\r\nab\r\n"):
        with pytest.raises(ChunkError):
            ChunkedDecoder().feed(bad, 0, out.append)
    decoder, out = ChunkedDecoder(), []
    inner = chunk(b"ab")  # inside a chunk, what looks like one is payload
    decoder.feed(b"%x\r\n" % len(inner), 0, out.append)
    decoder.feed(inner, 0, out.append)
    assert out == [inner]
