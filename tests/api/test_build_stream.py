"""/admin/builds/events: the picture first, then events without gap or double, and that every end frees everything."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from mesh.api import build_stream
from mesh.build.status import Outcome, Stage
from tests.api.asgi import Exchange, request
from tests.api.node import Node
from tests.fakes_builds import FakeBuilds, attempt, ended, status

EVENTS = "/admin/builds/events"


def node_with(builds: FakeBuilds) -> Node:
    node = Node()
    node.ctx.builds = builds
    return node


def tasks() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()}


def events(text: str) -> list[tuple[str, str | None, Any]]:
    """Return (event, id, data) of each whole event, as a browser's EventSource would."""
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            found.append((fields["event"], fields.get("id"), json.loads(fields["data"])))
    return found


async def test_a_picture_first_then_what_happens() -> None:
    builds = FakeBuilds(status(), status("cuda"))
    node = node_with(builds)
    async with Exchange(node.app, "GET", EVENTS) as exchange:
        await exchange.text_until("\n\n")
        assert exchange.headers["content-type"].startswith("text/event-stream")
        assert exchange.headers["x-accel-buffering"] == "no"
        builds.change("started", attempt())
        builds.log("Cloning into 'x'\u2026")
        builds.feed("progress", build="default", attempt=1, stage="compiling", done=3, total=9)
        builds.change("ended", ended(Outcome.INSTALLED))
        found = events(await exchange.text_until("installed"))
    picture, *rest = found
    assert (picture[0], picture[1]) == ("snapshot", None)
    assert [build["name"] for build in picture[2]["builds"]] == ["default", "cuda"]
    assert picture[2]["node_id"] == "node-a"
    assert [(kind, number) for kind, number, _ in rest] == [
        ("started", "1"), ("log", "2"), ("progress", "3"), ("ended", "4")
    ]  # fmt: skip
    assert rest[1][2] == {"build": "default", "attempt": 1, "line": "Cloning into 'x'\u2026"}
    assert rest[3][2]["attempt_state"]["outcome"] == "installed"


async def test_one_build_only() -> None:
    builds = FakeBuilds(status(), status("cuda"))
    async with Exchange(node_with(builds).app, "GET", EVENTS + "?build=cuda") as exchange:
        await exchange.text_until("\n\n")
        builds.log("not this")
        builds.change("stage", attempt(stage=Stage.COMPILING))
        builds.change("started", attempt(2, "cuda"))
        builds.log("this", build="cuda")
        picture, *rest = events(await exchange.text_until("this"))
    assert [build["name"] for build in picture[2]["builds"]] == ["cuda"]
    assert [kind for kind, _, _ in rest] == ["started", "log"]
    assert "not this" not in exchange.body.decode()


async def test_a_build_that_is_not_there() -> None:
    answer = await request(node_with(FakeBuilds()).app, "GET", EVENTS + "?build=x")
    assert (answer.status, answer.json["error"]["type"]) == (404, "build_not_found")


async def test_a_line_of_any_bytes_is_one_event() -> None:
    """A newline would end the field, and what is no UTF-8 would end the stream."""
    builds = FakeBuilds()
    async with Exchange(node_with(builds).app, "GET", EVENTS) as exchange:
        await exchange.text_until("\n\n")
        for line in ("a\nb\r\ndata: x\n\n", "\udcff\x1b[31m", "\u2028é"):
            builds.log(line)
        builds.log("end")
        _, *rest = events(await exchange.text_until("end"))
    assert [data["line"] for _, _, data in rest] == ["a\nb\r\ndata: x\n\n", "\udcff\x1b[31m", "\u2028é", "end"]


async def test_a_slow_viewer_is_told_what_it_missed() -> None:
    """trap 20"""
    builds = FakeBuilds()
    async with Exchange(node_with(builds).app, "GET", EVENTS) as exchange:
        await exchange.text_until("\n\n")
        next(iter(builds.subscriptions)).dropped = 7
        builds.log("nine")
        builds.log("ten")
        _, *rest = events(await exchange.text_until("ten"))
    assert [(kind, data.get("count")) for kind, _, data in rest] == [("dropped", 7), ("log", None), ("log", None)]


async def test_a_silent_stream_is_pinged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_stream, "_LOOK_AGAIN_S", 0.005)
    monkeypatch.setattr(build_stream, "_PING_S", 0.01)
    builds = FakeBuilds()
    async with Exchange(node_with(builds).app, "GET", EVENTS) as exchange:
        await exchange.text_until(": ping\n\n: ping\n\n")
        builds.log("one")
        assert [kind for kind, _, _ in events(await exchange.text_until("one"))] == ["snapshot", "log"]


async def test_a_stream_that_is_not_silent_is_not_pinged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that waits across several looks is one and the same: no event is lost to it."""
    monkeypatch.setattr(build_stream, "_LOOK_AGAIN_S", 0.002)
    builds = FakeBuilds()
    async with Exchange(node_with(builds).app, "GET", EVENTS) as exchange:
        await exchange.text_until("\n\n")
        for number in range(20):
            await asyncio.sleep(0.003)
            builds.log(f"line {number}.")
        text = await exchange.text_until("line 19.")
    assert [data["line"] for _, _, data in events(text)[1:]] == [f"line {number}." for number in range(20)]
    assert "ping" not in text


async def test_a_node_without_builds_has_nothing_to_tell_and_keeps_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_stream, "_LOOK_AGAIN_S", 0.005)
    monkeypatch.setattr(build_stream, "_PING_S", 0.01)
    node = Node()
    async with Exchange(node.app, "GET", EVENTS) as exchange:
        assert events(await exchange.text_until(": ping\n\n"))[0][2]["builds"] == []
        exchange.vanish()
        await exchange.finished()
    assert tasks() == set()


async def test_it_ends_cleanly_when_the_node_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_stream, "_LOOK_AGAIN_S", 0.01)
    builds = FakeBuilds()
    node = node_with(builds)
    async with Exchange(node.app, "GET", EVENTS) as exchange:
        await exchange.text_until("\n\n")
        node.ctx.draining = True
        await exchange.finished()
    assert exchange.complete
    assert not builds.subscriptions
    assert tasks() == set()


async def test_it_ends_cleanly_when_the_builds_close() -> None:
    builds = FakeBuilds()
    async with Exchange(node_with(builds).app, "GET", EVENTS) as exchange:
        await exchange.text_until("\n\n")
        builds.log("last")
        for subscription in tuple(builds.subscriptions):
            subscription.close()
        await exchange.finished()
    assert exchange.complete
    assert [kind for kind, _, _ in events(exchange.body.decode())] == ["snapshot", "log"]


async def test_a_viewer_that_leaves_frees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """trap 2: at once, while nothing happens."""
    monkeypatch.setattr(build_stream, "_LOOK_AGAIN_S", 60.0)
    builds = FakeBuilds()
    async with Exchange(node_with(builds).app, "GET", EVENTS) as exchange:
        await exchange.text_until("\n\n")
        assert len(builds.subscriptions) == 1
        exchange.vanish()
        await exchange.finished()
    assert not builds.subscriptions
    assert not exchange.complete
    assert tasks() == set()


async def test_a_viewer_that_is_cancelled_frees_everything() -> None:
    """trap 1"""
    builds = FakeBuilds()
    async with Exchange(node_with(builds).app, "GET", EVENTS) as exchange:
        await exchange.text_until("\n\n")
    assert not builds.subscriptions
    assert tasks() == set()


async def test_head_has_the_headers_only() -> None:
    builds = FakeBuilds()
    answer = await request(node_with(builds).app, "HEAD", EVENTS)
    assert (answer.status, answer.body) == (200, b"")
    assert not builds.subscriptions
