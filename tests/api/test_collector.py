"""Whole answers, wherever they are cut; what is none is the instance's failure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.api.collector import AnswerCollector
from mesh.errors import UpstreamError

COUNTED = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; x=y\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n" + COUNTED


@pytest.mark.parametrize(
    ("raw", "status", "kind"),
    [(COUNTED, 200, "text/plain; x=y"), (CHUNKED, 500, ""), (CONTINUED, 200, "text/plain; x=y")],
)
def test_an_answer_wherever_it_is_cut(raw: bytes, status: int, kind: str) -> None:
    for cut in range(len(raw)):
        collector = AnswerCollector()
        collector.feed(raw[:cut])
        assert not collector.complete
        collector.feed(raw[cut:])
        assert (collector.complete, collector.reusable) == (True, True)
        assert (collector.status, collector.content_type, bytes(collector.body)) == (status, kind, b"hello")
        assert not collector.end()


def test_no_answer_keeps_the_loop_busy_for_long() -> None:
    with pytest.raises(UpstreamError, match="larger than 16777216 bytes"):
        AnswerCollector().feed(b"HTTP/1.1 200 OK\r\nContent-Length: 16777217\r\n\r\n")


def test_many_heads_before_the_answer_come_in_one_read() -> None:
    collector = AnswerCollector()
    collector.feed(b"HTTP/1.1 100 Continue\r\n\r\n" * 5000 + COUNTED)
    assert bytes(collector.body) == b"hello"


def test_the_end_of_the_connection_ends_only_an_answer_without_length() -> None:
    collector = AnswerCollector()
    assert not collector.end()
    collector.feed(b"HTTP/1.1 200 OK\r\n\r\nhel")
    collector.feed(b"lo")
    assert not collector.complete
    assert collector.end()
    assert (bytes(collector.body), collector.reusable) == (b"hello", False)
    short = AnswerCollector()
    short.feed(COUNTED[:-1])
    assert not short.end()


@pytest.mark.parametrize("raw", [COUNTED + b"x", COUNTED.replace(b"200 OK\r\n", b"200 OK\r\nConnection: close\r\n")])
def test_what_is_out_of_step_is_not_used_again(raw: bytes) -> None:
    collector = AnswerCollector()
    collector.feed(raw)
    assert (collector.complete, collector.reusable, bytes(collector.body)) == (True, False, b"hello")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"garbage\r\n\r\n", "did not answer in HTTP"),
        (b"HTTP/1.1 101 S\r\n\r\n", "switched protocols"),
        (b"x" * 70_000, "head is too large"),
        (CHUNKED.replace(b"2\r\nhe", b"zz\r\n"), "malformed answer"),
        (COUNTED.replace(b": 5", b": 50"), "larger than 10 bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 11, "larger than 10 bytes"),
    ],
)
def test_what_is_no_answer(raw: bytes, text: str) -> None:
    with pytest.raises(UpstreamError, match=text):
        AnswerCollector(limit_bytes=10).feed(raw)


@given(data=st.lists(st.one_of(st.binary(), st.sampled_from([COUNTED, CHUNKED[:60], b"\r\n\r\n"])), max_size=4))
def test_any_bytes_are_read_or_refused(data: list[bytes]) -> None:
    collector = AnswerCollector()
    try:
        for piece in data:
            if not collector.complete:
                collector.feed(piece)
    except UpstreamError:
        pass
