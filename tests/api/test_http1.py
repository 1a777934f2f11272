"""Heads: the strict grammar, what is dropped, the memo; held against llhttp on any bytes (trap 71)."""

from __future__ import annotations

from contextlib import suppress

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.api.http1 import RequestHead, parse_request, parse_response, read_known
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
