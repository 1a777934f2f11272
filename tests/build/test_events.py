"""Watchers of builds, quick and slow."""

from __future__ import annotations

import asyncio

import pytest

from mesh.build.events import Events


async def test_everything_comes_in_order() -> None:
    events = Events()
    events.publish("log", {"line": "before anybody watched"})
    one = events.subscribe()
    assert events.watched
    for kind in ("started", "log", "stage", "progress", "ended"):
        events.publish(kind, {})
    one.close()
    assert not events.watched
    events.publish("log", {"line": "after it was closed"})
    assert [(event.id, event.kind) async for event in one] == [
        *((2, "started"), (3, "log"), (4, "stage"), (5, "progress"), (6, "ended"))
    ]
    assert one.dropped == 0


async def test_a_slow_reader_loses_lines_and_never_a_stage() -> None:
    events = Events()
    slow, quick = events.subscribe(max_events=3), events.subscribe()
    for number in range(10):
        events.publish("stage", {"n": number})
        events.publish("log", {"n": number})
        events.publish("progress", {"n": number})
    events.close()
    seen = [event async for event in slow]
    assert [event.data["n"] for event in seen if event.kind == "stage"] == list(range(10))
    assert [(event.kind, event.data["n"]) for event in seen if event.kind != "stage"] == [
        *(("progress", 8), ("log", 9), ("progress", 9))
    ]
    assert [event.id for event in seen] == sorted(event.id for event in seen)
    assert slow.dropped == 17
    assert len([event async for event in quick]) == 30


async def test_whoever_waits_is_woken() -> None:
    events = Events()
    subscription = events.subscribe()
    waiting = asyncio.get_running_loop().create_task(anext(subscription))
    await asyncio.sleep(0)
    events.publish("ended", {})
    assert (await waiting).kind == "ended"
    waiting = asyncio.get_running_loop().create_task(anext(subscription))
    await asyncio.sleep(0)
    subscription.close()
    with pytest.raises(StopAsyncIteration):
        await waiting
