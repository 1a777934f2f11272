"""/admin/logs: the tail, following, several instances, and that every end frees the subscriptions."""

from __future__ import annotations

import asyncio

import pytest

from mesh.api import log_stream
from mesh.host.logring import LogRing
from tests.api.asgi import Exchange, request
from tests.api.node import Node
from tests.fakes_supervisor import FakeFailure, FakeRing

FOLLOW = "/admin/logs?model=Smol&follow=true"


def node_with(*rings: FakeRing) -> Node:
    node = Node()
    node.supervisor.rings = {"smol:default": [(f"i-{n}", ring) for n, ring in enumerate(rings, 1)]}
    return node


def tasks() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()}


async def test_the_last_lines_of_one_instance() -> None:
    node = node_with(FakeRing("one", "two", "three"))
    answer = await request(node.app, "GET", "/admin/logs?model=smol&lines=2")
    assert answer.body == b"two\nthree\n"
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    assert (await request(node.app, "GET", "/admin/logs?model=smol&lines=0")).body == b""


async def test_several_instances_are_told_apart() -> None:
    answer = await request(node_with(FakeRing("one"), FakeRing("two")).app, "GET", "/admin/logs?model=Smol")
    assert answer.body == b"==> i-1 <==\none\n==> i-2 <==\ntwo\n"


async def test_a_model_that_never_ran_says_so() -> None:
    answer = await request(Node().app, "GET", "/admin/logs?model=Smol")
    assert (answer.status, answer.body) == (200, b"nothing runs and nothing failed\n")


async def test_a_model_that_failed_says_why() -> None:
    """Exactly then somebody reads the log."""
    node = Node()
    node.supervisor.failed = {"smol:default": FakeFailure("out of memory", 1, 0.0, ("one", "two", "three"))}
    answer = await request(node.app, "GET", "/admin/logs?model=Smol&lines=2")
    assert answer.body == b"two\nthree\nnot running; last failure: out of memory\n"
    answer = await request(node.app, "GET", "/admin/logs?model=Smol&lines=0")
    assert answer.body == b"not running; last failure: out of memory\n"
    node.supervisor.rings = {"smol:default": [("i-2", FakeRing("loading"))]}
    assert (await request(node.app, "GET", "/admin/logs?model=Smol")).body == b"loading\n"


async def test_following_a_model_that_failed_goes_on_with_the_next_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_stream, "_LOOK_AGAIN_S", 0.01)
    node = Node()
    node.supervisor.failed = {"smol:default": FakeFailure("boom", 1, 0.0, ("one",))}
    async with Exchange(node.app, "GET", FOLLOW) as exchange:
        await exchange.text_until("not running; last failure: boom\n")
        node.supervisor.rings["smol:default"] = [("i-2", FakeRing("hello"))]
        assert await exchange.text_until("hello\n") == "one\nnot running; last failure: boom\nhello\n"


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 400),
        ("?model=", 400),
        ("?model=nope", 404),
        ("?model=Smol&lines=-1", 400),
        ("?model=Smol&lines=10001", 400),
        ("?model=Smol&lines=²", 400),
        ("?model=Smol&follow=maybe", 400),
    ],
)
async def test_bad_queries(query: str, status: int) -> None:
    answer = await request(Node().app, "GET", "/admin/logs" + query)
    assert answer.status == status
    assert answer.json["error"]["message"]


async def test_following_shows_old_lines_then_new_ones_without_gap_or_double() -> None:
    ring = FakeRing("one", "two")
    async with Exchange(node_with(ring).app, "GET", FOLLOW) as exchange:
        await exchange.text_until("two\n")
        ring.feed("three")
        ring.feed("four")
        assert await exchange.text_until("four\n") == "one\ntwo\nthree\nfour\n"
    assert not exchange.complete


async def test_following_goes_on_with_the_next_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_stream, "_LOOK_AGAIN_S", 0.01)
    first, second = FakeRing("one"), FakeRing("loading")
    node = node_with(first)
    async with Exchange(node.app, "GET", FOLLOW) as exchange:
        await exchange.text_until("one\n")
        node.supervisor.rings["smol:default"] = [("i-2", second)]
        await exchange.text_until("==> i-2 <==\nloading\n")
        second.feed("ready")
        await exchange.text_until("loading\nready\n")


async def test_a_follower_may_come_before_the_first_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_stream, "_LOOK_AGAIN_S", 0.01)
    node = node_with()
    async with Exchange(node.app, "GET", FOLLOW) as exchange:
        await exchange.text_until("nothing runs and nothing failed\n")
        node.supervisor.rings["smol:default"] = [("i-1", FakeRing("hello"))]
        assert await exchange.text_until("hello\n") == "nothing runs and nothing failed\nhello\n"


async def test_a_follower_that_leaves_frees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """trap 2: subscriptions and tasks, at once, while nothing is being printed."""
    monkeypatch.setattr(log_stream, "_LOOK_AGAIN_S", 60.0)
    rings = FakeRing("one"), FakeRing("two")
    async with Exchange(node_with(*rings).app, "GET", FOLLOW) as exchange:
        await exchange.text_until("two\n")
        assert [len(ring.subscriptions) for ring in rings] == [1, 1]
        exchange.vanish()
        await exchange.finished()
    assert [len(ring.subscriptions) for ring in rings] == [0, 0]
    assert tasks() == set()


async def test_a_follower_that_is_cancelled_frees_everything() -> None:
    """trap 1"""
    ring = FakeRing("one")
    async with Exchange(node_with(ring).app, "GET", FOLLOW) as exchange:
        await exchange.text_until("one\n")
    assert not ring.subscriptions
    assert tasks() == set()


async def test_following_ends_cleanly_when_the_node_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_stream, "_LOOK_AGAIN_S", 0.01)
    ring = FakeRing("one")
    node = node_with(ring)
    async with Exchange(node.app, "GET", FOLLOW) as exchange:
        await exchange.text_until("one\n")
        node.ctx.draining = True
        await exchange.finished()
    assert exchange.complete
    assert not ring.subscriptions


async def test_a_follower_is_told_what_it_missed() -> None:
    """trap 20"""
    ring = FakeRing("one")
    async with Exchange(node_with(ring).app, "GET", FOLLOW) as exchange:
        await exchange.text_until("one\n")
        next(iter(ring.subscriptions)).dropped = 7
        ring.feed("nine")
        ring.feed("ten")
        text = await exchange.text_until("ten\n")
    assert text == "one\n[... 7 lines dropped: the viewer is too slow]\nnine\nten\n"


async def test_the_rings_of_real_instances_are_followed_too() -> None:
    """The fake and mesh.host.logring must not drift apart."""
    ring = LogRing()
    ring.feed(b"one\n")
    node = Node()
    node.supervisor.rings = {"smol:default": [("i-1", ring)]}
    async with Exchange(node.app, "GET", FOLLOW) as exchange:
        await exchange.text_until("one\n")
        ring.feed(b"two\n")
        await exchange.text_until("one\ntwo\n")
        ring.close()
        exchange.vanish()
        await exchange.finished()
    assert tasks() == set()


async def test_a_failure_after_the_first_line_is_no_clean_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """trap 7: the exception reaches the server, which aborts the connection."""
    ring = FakeRing("one")
    node = node_with(ring)
    monkeypatch.setattr(log_stream, "_LOOK_AGAIN_S", 0.01)
    async with Exchange(node.app, "GET", FOLLOW) as exchange:
        await exchange.text_until("one\n")

        def broken(key: str) -> None:
            raise KeyError(key)

        monkeypatch.setattr(node.supervisor, "log_ring", broken)
        with pytest.raises(KeyError):
            await exchange.finished()
    assert (exchange.status, exchange.complete) == (200, False)
    assert not ring.subscriptions


async def test_a_follower_that_does_not_read_keeps_little() -> None:
    """trap 20: at most the queue's bound is held per viewer; the rest stays in the ring's own bounded queue."""
    ring = FakeRing()
    followers = log_stream._Followers()
    followers.follow([("i-1", ring)], 0)
    for number in range(5000):
        ring.feed(str(number))
    for _ in range(1000):
        await asyncio.sleep(0)
    assert followers._lines.qsize() == log_stream._MAX_LINES_AHEAD
    await followers.close()
    assert not ring.subscriptions
    assert tasks() == set()
