"""Heads: the strict grammar, what is dropped, the memo; held against llhttp on any bytes (trap 71)."""

from __future__ import annotations

from contextlib import suppress

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.api.http1 import RequestHead, parse_request, parse_response
from mesh.api.known_heads import read_known, take_id, without_id
from mesh.api.responses import ProtocolError

HOST = b"Host: n\r\n"


def _parse(lines: bytes, start: bytes = b"POST / HTTP/1.1\r\n", host: bytes = HOST) -> RequestHead:
    return parse_request(start + host + lines + b"\r\n", b"x-api-key")


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 5\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5, 5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length: 5 5\r\n",
        b"Content-Length:\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: \xb2\r\n",
        b"Content-Length: " + b"9" * 30 + b"\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding\r\n",
        b" Content-Length: 5\r\n",
        b"X: 1\r\n folded\r\n",
        b"X: 1\nY: 2\r\n",
        b"X: 1\rY: 2\r\n",
        b"X: a\x00b\r\n",
        b"X: a\x7fb\r\n",
        b": empty\r\n",
        b"X[]: 1\r\n",
        b"Host: other\r\n",
    ],
)
def test_whatever_two_parsers_could_read_differently_is_refused(lines: bytes) -> None:
    with pytest.raises(ProtocolError):
        _parse(lines)


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (b"GET / HTTP/2.0\r\n", 505),
        (b"GET / HTTP/1.2\r\n", 505),
        (b"GET / HTTP/0.9\r\n", 505),
        (b"GET /\r\n", 400),
        (b"GET  / HTTP/1.1\r\n", 400),
        (b"GET / a HTTP/1.1\r\n", 400),
        (b"GET / HTTP/1.1 \r\n", 400),
        (b"GET / http/1.1\r\n", 400),
        (b"G@T / HTTP/1.1\r\n", 400),
        (b"GET /\xc3\xa9 HTTP/1.1\r\n", 400),
        (b"CONNECT host:443 HTTP/1.1\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\n", 400),
        (b"GET ftp://n/ HTTP/1.1\r\n", 400),
    ],
)
def test_request_lines_that_are_refused(start: bytes, status: int) -> None:
    with pytest.raises(ProtocolError) as error:
        _parse(b"", start=start)
    assert error.value.status == status


def test_http_1_0() -> None:
    head = _parse(b"Expect: 100-continue\r\n", start=b"POST / HTTP/1.0\r\n", host=b"")
    assert (head.http10, head.keep_alive, head.expect) == (True, False, None)
    with pytest.raises(ProtocolError):
        _parse(b"Transfer-Encoding: chunked\r\n", start=b"POST / HTTP/1.0\r\n")
    with pytest.raises(ProtocolError):
        _parse(b"", host=b"")  # 1.1 needs a Host


def test_targets_are_kept_verbatim() -> None:
    assert _parse(b"", start=b"GET /a%2Fb/../c?x=%20&y=? HTTP/1.1\r\n").target == b"/a%2Fb/../c?x=%20&y=?"
    absolute = _parse(b"", start=b"GET http://n:1/a?b HTTP/1.1\r\n")
    assert (absolute.path, absolute.query) == (b"/a", b"b")
    assert absolute.forward.startswith(b"GET /a?b HTTP/1.1\r\n")
    assert _parse(b"", start=b"GET HTTP://n?b HTTP/1.1\r\n").target == b"/?b"


def test_a_known_head_is_recognised_with_another_length() -> None:
    raw = b"POST / HTTP/1.1\r\nHost: n\r\nContent-Length: 12\r\nX: 1\r\n\r\n"
    head = parse_request(raw, b"x-api-key")
    other = raw.replace(b"12", b"34567")
    assert read_known(head, raw + b"body") == (len(raw), 12)
    for _ in range(2):  # found by the number of digits of the last time, and without it
        assert read_known(head, b"xx" + other, 2) == (2 + len(other), 34567)
    for bad in (b"", b"1x", b" 12", b"12 ", b"+1", b"1" * 16, b"12\r\nX: 2"):
        assert read_known(head, raw.replace(b"12", bad, 1)) == (0, 0), bad
    assert read_known(head, raw[:-1]) == (0, 0)
    for bad in (b"-5", b"+5", b" 5", b"5 ", b"1_0", b"0x1"):
        assert read_known(head, raw) == (len(raw), 12)
        assert read_known(head, raw.replace(b"12", bad, 1)) == (0, 0), bad


def test_responses() -> None:
    head = parse_response(b"HTTP/1.0 200\r\nContent-Length: 3\r\n\r\n")
    assert (head.status, head.closes, head.length) == (200, True, 3)
    assert head.forward == b"HTTP/1.1 200 \r\n"
    for bad in (b"HTTP/1.1 20 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n"):
        with pytest.raises(ProtocolError):
            parse_response(bad)


class _Oracle:
    """llhttp, strict, collecting what it read."""

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.complete = True


_NAMES = st.sampled_from(
    [b"Host", b"Content-Length", b"Transfer-Encoding", b"Connection", b"X", b"Expect", b"Upgrade", b"X-Api-Key", b"x y"]
)
_VALUES = st.sampled_from([b"5", b"chunked", b"close", b"a, b", b"5\r\n 6", b" 7 ", b"n", b"keep-alive"]) | st.binary(
    max_size=6
)
_LINES = st.builds(
    lambda n, s, v, e: n + s + v + e,
    _NAMES,
    st.sampled_from([b": ", b":", b" : "]),
    _VALUES,
    st.sampled_from([b"\r\n"] * 9 + [b"\n", b"\r"]),
)
_STARTS = st.sampled_from(
    [b"POST / HTTP/1.1\r\n", b"GET /a?b HTTP/1.1\r\n", b"GET / HTTP/1.0\r\n", b"GET / HTTP/1.1\n"]
)
_HEADS = st.builds(lambda s, ls: s + b"Host: n\r\n" + b"".join(ls) + b"\r\n", _STARTS, st.lists(_LINES, max_size=4))


@given(_HEADS | st.binary(max_size=60))
def test_what_we_accept_llhttp_reads_the_same_way(raw: bytes) -> None:
    """Any bytes parse or raise our own error; and if they parse, the strict parser agrees on method and framing."""
    try:
        head = parse_request(raw, b"x-api-key")
    except ProtocolError:
        return
    oracle = _Oracle()
    parser = httptools.HttpRequestParser(oracle)
    with suppress(httptools.HttpParserUpgrade):
        parser.feed_data(raw)
    assert oracle.complete
    assert parser.get_method() == head.method
    headers = {name.lower(): value.strip(b" \t") for name, value in oracle.headers}
    assert head.chunked == (headers.get(b"transfer-encoding", b"").lower() == b"chunked")
    assert head.length == int(headers.get(b"content-length", b"0"))
    assert len(head.credentials) == (b"x-api-key" in headers)


@given(st.binary(max_size=80))
def test_any_response_bytes_parse_or_raise_ours(raw: bytes) -> None:
    for data in (raw, b"HTTP/1.1 200 OK\r\n" + raw + b"\r\n\r\n"):
        with suppress(ProtocolError):
            parse_response(data)


# --- what nodes tell each other


@pytest.mark.parametrize(
    ("lines", "hops", "model", "wait_s"),
    [
        (b"X-Llama-Mesh-Hops: 0\r\n", 0, None, None),
        (b"x-llama-mesh-hops:  3 \r\nX-Llama-Mesh-Model: a/b c%C3%B6:default\r\n", 3, "a/b cö:default", None),
        (b"X-Llama-Mesh-Hops: 1\r\nX-Llama-Mesh-Wait-Ms: 1500\r\n", 1, None, 1.5),
        (b"X-Llama-Mesh-Hops: 1\r\nX-Llama-Mesh-Wait-Ms: 0\r\n", 1, None, 0.0),
        (b"X-Llama-Mesh-Hops: 1\r\nX-Llama-Mesh-Wait-Ms: -1\r\n", 1, None, None),
        (b"X-Llama-Mesh-Hops: 1\r\nX-Llama-Mesh-Wait-Ms: 1e3\r\n", 1, None, None),
        (b"X-Llama-Mesh-Hops: 1\r\nX-Llama-Mesh-Wait-Ms: " + b"9" * 13 + b"\r\n", 1, None, None),
    ],
)
def test_what_a_node_says_of_a_request(lines: bytes, hops: int, model: str | None, wait_s: float | None) -> None:
    head = _parse(lines)
    assert head.mesh is not None
    assert (head.mesh.hops, head.mesh.model, head.mesh.wait_s) == (hops, model, wait_s)
    assert b"mesh" not in head.forward.lower()  # it is for this hop only


def test_a_request_that_no_node_passed_on() -> None:
    head = _parse(b"X-Llama-Mesh-Model: other:default\r\nX-Llama-Mesh-Anything: x\r\n")
    assert head.mesh is None
    assert head.forward == b"POST / HTTP/1.1\r\n"


@pytest.mark.parametrize(
    "hops", [b"", b"x", b"-1", b"+1", b"1.0", b"1, 1", b"12345", b"\xb2", b"1\r\nX-Llama-Mesh-Hops: 1"]
)
def test_there_is_one_hop_count(hops: bytes) -> None:
    """trap 60"""
    with pytest.raises(ProtocolError) as error:
        _parse(b"X-Llama-Mesh-Hops: %b\r\n" % hops)
    assert error.value.status == 400


@given(st.binary(max_size=30), st.binary(max_size=30), st.binary(max_size=30))
def test_any_bytes_in_these_fields_parse_or_raise_ours(hops: bytes, model: bytes, wait: bytes) -> None:
    lines = b"X-Llama-Mesh-Hops: %b\r\nX-Llama-Mesh-Model: %b\r\nX-Llama-Mesh-Wait-Ms: %b\r\n" % (hops, model, wait)
    with suppress(ProtocolError):
        _parse(lines)


def test_what_a_peers_answer_says() -> None:
    """A peer's marks are kept, an instance's are not; only a peer can refuse."""
    raw = (
        b"HTTP/1.1 503 S\r\nContent-Length: 3\r\nX-Llama-Mesh-Node: n2\r\nX-Llama-Mesh-Via: n3\r\n"
        b"X-Llama-Mesh-Error: queue_full\r\nX-Request-Id: a\r\n\r\n"
    )
    of_peer = parse_response(raw, of_peer=True)
    assert of_peer.refusal == "queue_full"
    assert of_peer.forward == b"HTTP/1.1 503 S\r\nX-Llama-Mesh-Node: n2\r\nX-Llama-Mesh-Via: n3\r\n"
    of_instance = parse_response(raw)
    assert of_instance.refusal is None
    assert of_instance.forward == b"HTTP/1.1 503 S\r\n"
    assert parse_response(raw.replace(b"Error", b"Other"), of_peer=True).refusal is None


def test_a_known_head_of_a_peer_with_another_id() -> None:
    raw = b"POST / HTTP/1.1\r\nHost: n\r\nContent-Length: 12\r\nX-Request-Id: abc-1\r\n\r\n"
    head = parse_request(raw, b"x-api-key")
    without_id(head)
    assert head.id_last
    for request_id, length in ((b"abc-1", b"12"), (b"z", b"7"), (b"y" * 128, b"12345")):
        other = raw.replace(b"12\r", length + b"\r").replace(b"abc-1", request_id)
        end, known_length = read_known(head, other + b"body")
        assert known_length == int(length)
        assert take_id(head, other + b"body", end) == len(other)
        assert head.request_id == request_id
    for bad in (b"", b"y" * 129, b"a b", b"a\r\nX: 1", b"\xff"):
        other = raw.replace(b"abc-1", bad)
        assert take_id(head, other, read_known(head, other)[0]) == 0, bad
    cut = raw[:-2]
    assert take_id(head, cut, read_known(head, cut)[0]) == 0


def test_a_head_whose_id_is_not_last_is_known_as_a_whole() -> None:
    raw = b"POST / HTTP/1.1\r\nHost: n\r\nContent-Length: 12\r\nX-Request-Id: a\r\nX: 1\r\n\r\n"
    for text in (raw, raw.replace(b"X-Request-Id: a\r\n", b""), raw.replace(b"Content-Length: 12\r\n", b"")):
        head = parse_request(text, b"x-api-key")
        without_id(head)
        assert not head.id_last
        assert read_known(head, text)[0] == len(text)
