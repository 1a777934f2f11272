"""The ring of log lines and its subscriptions."""

from __future__ import annotations

import asyncio
import itertools

from hypothesis import given
from hypothesis import strategies as st

from mesh.host.logring import MAX_LINE_BYTES, LogRing


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=10))
def test_lines_do_not_depend_on_how_the_output_is_cut(data: bytes, cuts: list[int]) -> None:
    ring = LogRing()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        ring.feed(data[start:end])
    lines = [line.rstrip(b"\r").decode("utf-8", "replace") for line in data.split(b"\n")]
    assert ring.tail() == (lines if data.split(b"\n")[-1] else lines[:-1])


def test_a_line_of_a_mebibyte_is_cut_and_the_next_one_is_whole() -> None:
    """trap 20"""
    ring = LogRing()
    for _ in range(16):
        ring.feed(b"x" * 65536)
        assert len(ring._partial) <= MAX_LINE_BYTES + 1, "what is cut is not kept"
    ring.feed(b"\nnext\n")
    long, following = ring.tail()
    assert len(long) < MAX_LINE_BYTES + 100
    assert long.endswith("[... line cut]")
    assert following == "next"


def test_memory_is_bounded_by_lines_and_by_bytes() -> None:
    ring = LogRing(max_lines=3, max_bytes=100)
    ring.feed(b"a\nb\nc\nd\n")
    assert ring.tail() == ["b", "c", "d"]
    ring.feed(b"y" * 99 + b"\n")
    assert ring.tail() == ["d", "y" * 99]
    assert ring.tail(1) == ["y" * 99]
    assert ring.tail(0) == []


def test_the_tail_shows_an_unfinished_line() -> None:
    ring = LogRing()
    ring.feed(b"loading ....")
    assert ring.tail() == ["loading ...."]
    ring.close()
    ring.close()
    assert ring.tail() == ["loading ...."]


async def test_a_watcher_gets_every_line_until_the_process_ends() -> None:
    ring = LogRing()
    ring.feed(b"before\n")
    subscription = ring.subscribe()
    ring.feed(b"one\ntwo")
    ring.close()
    async with asyncio.timeout(5):
        assert [line async for line in subscription] == ["one", "two"]
        assert [line async for line in ring.subscribe()] == []


async def test_a_waiting_watcher_is_woken() -> None:
    ring = LogRing()
    subscription = ring.subscribe()
    first = asyncio.get_running_loop().create_task(subscription.__anext__())
    await asyncio.sleep(0)
    ring.feed(b"line\n")
    assert await asyncio.wait_for(first, 5) == "line"
    subscription.close()
    async with asyncio.timeout(5):
        assert [line async for line in subscription] == []
    ring.feed(b"nobody listens\n")


async def test_a_slow_watcher_loses_lines_and_is_told_how_many() -> None:
    """trap 20: the drain never waits for a viewer."""
    ring = LogRing()
    subscription = ring.subscribe(max_lines=2)
    ring.feed(b"1\n2\n3\n4\n5\n")
    ring.close()
    assert [line async for line in subscription] == ["4", "5"]
    assert subscription.dropped == 3


def test_lines_are_counted_also_those_that_are_forgotten() -> None:
    ring = LogRing(max_lines=2)
    assert ring.count == 0
    ring.feed(b"a\nb\nc\nunfini")
    assert (ring.count, len(ring.tail())) == (4, 3)
    before = ring.count
    ring.feed(b"shed\nd\n")
    assert ring.tail(ring.count - before) == ["d"]
