"""Any bytes, cut anywhere, are read as the same requests or refused with our error; sans-io (trap 71)."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mesh.api.http1 import RequestHead
from mesh.api.request_reader import MAX_AHEAD_BYTES, Limits, RequestReader, Stage
from mesh.api.responses import ProtocolError
from mesh.errors import MeshError

LIMITS = Limits(head_bytes=300, body_bytes=100, key_header=b"x-api-key")


class Taker:
    """Counts a body's bytes as the app's session would; only for bodies with a length."""

    def __init__(self, length: int) -> None:
        self.left = length
        self.body_complete = length == 0

    def feed(self, data: bytes, position: int) -> int:
        end = min(len(data), position + self.left)
        self.left -= end - position
        self.body_complete = self.left == 0
        return end


class Recorder:
    """Answers every request at once and notes what it was told."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []
        self.reader = RequestReader(self, LIMITS)
        self.taker: Taker | None = None
        self.paused = False

    def judge(self, head: RequestHead, length: int) -> MeshError | None:
        self.events.append(("head", head.method, head.target))
        return LIMITS.body_error() if length > LIMITS.body_bytes else None

    def take(self, raw_head: bytes, head: RequestHead, length: int) -> Taker:
        self.taker = Taker(0 if head.chunked else length)
        self.events.append(("take", raw_head))
        return self.taker

    def body_awaited(self, expects_continue: bool) -> None:
        pass

    def taken(self) -> None:
        pass

    def complete(self, head: RequestHead, body: bytes | memoryview) -> None:
        self.events.append(("complete", bytes(body)))
        self.reader.next()

    def refused(self, error: MeshError, in_step: bool) -> None:
        self.events.append(("refused", error.status))
        if in_step:
            self.reader.next()
        else:
            self.reader.stop()

    def too_far_ahead(self) -> None:
        self.paused = True

    def feed(self, data: bytes) -> None:
        self.reader.receive(data)
        if self.taker is not None and self.taker.body_complete:
            self.taker = None
            self.reader.next()


def _read(data: bytes, cuts: list[int]) -> list[tuple[object, ...]]:
    recorder = Recorder()
    edges = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    for start, stop in pairwise(edges):
        if start < stop:
            recorder.feed(data[start:stop])
    return recorder.events


def _post(body: bytes, extra: bytes = b"") -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nHost: n\r\n%bContent-Length: %d\r\n\r\n%b" % (extra, len(body), body)


_CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
_REQUESTS = st.sampled_from(
    [
        _post(b"{}"),
        _post(b"x" * 50),
        _post(b"x" * 100),
        _post(b"x" * 101),
        _post(b"", b"X-Request-Id: 1\r\n"),
        _CHUNKED,
        _CHUNKED.replace(b"3\r\nabc", b"80\r\n" + b"y" * 128),
        _CHUNKED.replace(b"3\r\n", b"zz\r\n"),
        b"GET /props HTTP/1.1\r\nHost: n\r\n\r\n",
        b"\r\n" + _post(b"{}"),
        b"GET / HTTP/1.1\nHost: n\n\n",
        b"GET /" + b"a" * 400,
        b"GARBAGE\r\n\r\n",
    ]
)
_STREAMS = st.lists(_REQUESTS, max_size=4).map(b"".join) | st.binary(max_size=80)
_CUTS = st.lists(st.integers(0, 600), max_size=10)


def _outcome(events: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """What was served up to the first refusal; a head may be found malformed before it is found too long."""
    served: list[tuple[object, ...]] = []
    for event in events:
        if event[0] == "refused":
            return [*served, ("refused", 400 if event[1] == 431 else event[1])]
        if event[0] != "head":
            served.append(event)
    return served


@given(_STREAMS, _CUTS)
def test_cuts_change_nothing(data: bytes, cuts: list[int]) -> None:
    assert _outcome(_read(data, cuts)) == _outcome(_read(data, []))


@given(_STREAMS, _CUTS)
def test_any_bytes_are_read_or_refused(data: bytes, cuts: list[int]) -> None:
    for event in _read(data, cuts):
        if event[0] == "refused":
            assert event[1] in (400, 413, 431, 501, 505)


def test_what_comes_ahead_is_bounded() -> None:
    class Silent(Recorder):
        def complete(self, head: RequestHead, body: bytes | memoryview) -> None:
            pass

    owner = Silent()
    owner.feed(_post(b"{}"))
    assert owner.reader.stage is Stage.HELD
    owner.feed(b"x" * MAX_AHEAD_BYTES)
    assert not owner.paused
    owner.feed(b"x")
    assert owner.paused


def test_a_malformed_head_after_a_good_one() -> None:
    assert _read(_post(b"{}") + b"BAD\r\n\r\n" + _post(b"{}"), [])[-1] == ("refused", 400)


def test_our_error_is_the_only_error() -> None:
    assert issubclass(ProtocolError, MeshError)


def test_tiny_chunks_are_kept_in_one_piece() -> None:
    """A body's memory is its size, not the number of its chunks."""
    recorder = Recorder()
    recorder.reader = RequestReader(recorder, Limits(300, 1 << 20, b"x-api-key"))
    recorder.feed(_CHUNKED.partition(b"3\r\n")[0])
    tracemalloc.start()
    try:
        for _ in range(8):
            recorder.feed(b"2\r\nab\r\n" * 10_000)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 2 * 160_000
    recorder.feed(b"0\r\n\r\n")
    assert recorder.events[-1] == ("complete", b"ab" * 80_000)
