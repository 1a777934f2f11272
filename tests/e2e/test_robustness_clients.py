"""Clients that vanish or do not read; the node must not notice for long."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.harness import Models, Node, cookbook, eventually, profile
from tests.e2e.robustness import (
    Client,
    Held,
    assert_at_rest,
    assert_same_fds,
    baseline,
    chat,
    client,
    close_waits,
    fake_node,
    fake_profile,
    report,
    scaled,
)
from tests.e2e.wire import child_get

# -- those who vanish


async def _vanish(node: Node, number: int) -> None:
    """Connect, go some way into a request, and leave; every kind of leaving in turn."""
    one = await Client.connect(node)
    kind = number % 8
    whole = chat("slow" if kind < 5 else "other", stream=kind % 2 == 0, ignore_eos=True, max_tokens=10_000)
    sent = {0: whole, 1: whole, 2: whole, 3: whole[:-20], 4: whole[:60], 5: b"", 6: b"P", 7: whole}[kind]
    one.send(sent)
    await one.writer.drain()
    if kind in (0, 2, 7):  # one that is served soon sees the beginning of its answer
        with suppress(TimeoutError):
            await asyncio.wait_for(one.reader.read(2000), 0.5)
    else:
        await asyncio.sleep(0.2)
    one.vanish(reset=number % 3 == 0)


async def _many(node: Node, count: int, at_once: int) -> None:
    gate = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with gate:
            await _vanish(node, number)

    await asyncio.gather(*(one(number) for number in range(count)))


def test_a_thousand_clients_that_vanish_leave_nothing(tmp_path: Path) -> None:
    """Queued, mid-stream, mid-body, mid-head and silent clients: all counts 0, descriptors flat (traps 1, 2, 3, 9)."""
    models = {
        "slow": fake_profile("-np 2", tokens_per_s=20, max_queue_size=0),
        "other": fake_profile("-np 64", tokens_per_s=100),
    }
    with fake_node(tmp_path, models) as node:
        node.prewarm("slow")
        node.prewarm("other")
        asyncio.run(_many(node, 200, 200))  # whatever grows once, grows here
        assert_at_rest(node)
        before = Held.by(node)
        start = time.monotonic()
        asyncio.run(_many(node, scaled(1000), 1000))
        left = time.monotonic()
        eventually(lambda: close_waits(node) == 0, within_s=5, what="no CLOSE_WAIT socket")
        closed_s = time.monotonic() - left
        assert_at_rest(node)
        rest_s = time.monotonic() - left
        assert_same_fds(node, before)
        after = Held.by(node)
        report(clients=scaled(1000), took_s=left - start, closed_s=closed_s, rest_s=rest_s, before=before, after=after)
        assert after.threads <= before.threads
        assert after.rss_mib < before.rss_mib + 15
        assert node.say("slow") == "hello from fake.gguf"


def test_clients_that_vanish_free_the_slots_of_a_real_server(tmp_path: Path, models: Models) -> None:
    """The same with the real llama-server: every slot is idle again, in its own words too (traps 1, 8, 9)."""
    both = {name: profile(models.alpha, "-t 1 -tb 1 -c 16384 -np 4 --no-warmup") for name in ("slow", "other")}
    with Node(tmp_path, cookbook(both)) as node:
        before = baseline(node, "slow")
        node.prewarm("other")
        asyncio.run(_many(node, scaled(300), 300))
        left = time.monotonic()
        assert_at_rest(node, within_s=40)
        report(clients=scaled(300), rest_s=time.monotonic() - left)
        slots = [slot for name in both for slot in child_get(node.instance(name), "/slots").json()]
        assert [slot["is_processing"] for slot in slots] == [False] * 8
        assert close_waits(node) == 0
        eventually(lambda: node.open_files() <= before.fds + 3, what=f"{before} and one more child's")
        assert node.say("slow") == "I am alpha"


def test_queued_clients_that_leave_make_room_at_once(tmp_path: Path) -> None:
    """A place in the queue is given back by leaving it, and what was behind moves up (traps 2, 38)."""
    with fake_node(tmp_path, {"m": fake_profile("-np 1", tokens_per_s=10)}) as node:
        node.prewarm("m")

        async def scenario() -> None:
            first = await Client.connect(node)
            first.send(chat("m", stream=True, ignore_eos=True, max_tokens=10_000))
            await first.head()
            queued = [await Client.connect(node) for _ in range(50)]
            for one in queued:
                one.send(chat("m", stream=True))
            await asyncio.to_thread(
                eventually, lambda: sum(node.status()["queues"].values()) == 50, what="50 in the queue"
            )
            async with client(node) as last:
                last.send(chat("m"))
                for one in queued:
                    one.vanish(reset=False)
                await asyncio.to_thread(
                    eventually, lambda: sum(node.status()["queues"].values()) == 1, within_s=5, what="one is left"
                )
                first.vanish(reset=True)
                start = time.monotonic()
                status, _ = await asyncio.wait_for(last.answer(), 10)
                report(next_served_after_s=time.monotonic() - start)
                assert status == 200

        asyncio.run(scenario())
        assert_at_rest(node)


# -- those who do not read


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_does_not_read_is_not_buffered_for(tmp_path: Path, streamed: bool) -> None:
    """Back-pressure reaches the instance: the node's memory stays flat below an answer of 100 MB."""
    word, count = "x" * 60_000, 1700
    faults = {"say": word} if streamed else {"reply_bytes": 100 * 10**6}
    with fake_node(tmp_path, {"m": fake_profile(**faults)}) as node:
        node.prewarm("m")

        async def scenario() -> None:
            before = baseline(node)
            one = await Client.connect(node, limit=2**16)
            keys = {"stream": True, "ignore_eos": True, "max_tokens": count} if streamed else {}
            one.send(chat("m", **keys))
            await one.head()
            await asyncio.sleep(1.5)
            during = Held.by(node)
            async with client(node) as other:  # and others are served meanwhile
                assert (await other.ask(chat("m", max_tokens=1)))[0] == 200 if streamed else True
            assert during.rss_mib < before.rss_mib + 20, (before, during)
            received = len(one.reader._buffer)  # type: ignore[attr-defined]
            start = time.monotonic()
            while data := await one.reader.read(2**20):
                received += len(data)
                if data.endswith(b"0\r\n\r\n" if streamed else b"}") and received >= 10**8:
                    break
            report(received_mb=received / 1e6, s=time.monotonic() - start, before=before, during=during)
            assert received > (count * len(word) if streamed else 100 * 10**6)
            assert Held.by(node).rss_mib < before.rss_mib + 25
            await one.close()

        asyncio.run(scenario())
        assert_at_rest(node)


def test_a_client_that_never_reads_is_dropped_in_the_end(tmp_path: Path) -> None:
    """It holds a slot, so it may not do so for ever; the slot is free again and others are served (trap 9)."""
    config = {"http": {"idle_timeout_seconds": 2}}
    with fake_node(tmp_path, {"m": fake_profile("-np 1", say="x" * 60_000)}, config) as node:
        node.prewarm("m")

        async def scenario() -> None:
            one = await Client.connect(node, limit=2**10)
            one.send(chat("m", stream=True, ignore_eos=True, max_tokens=10_000))
            await one.head()
            async with client(node) as other:
                status, _ = await asyncio.wait_for(other.ask(chat("m")), 15)
                assert status == 200
            await one.close()

        asyncio.run(scenario())
        assert_at_rest(node)
