"""Instances that hang, lie or babble: each request gets a right answer or one clear error."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path

import psutil

from tests.e2e.harness import eventually
from tests.e2e.robustness import (
    Client,
    Held,
    assert_at_rest,
    assert_broken_off,
    baseline,
    chat,
    chunks,
    client,
    fake_node,
    fake_profile,
    report,
)
from tests.e2e.wire import child_get

END = b"0\r\n\r\n"


# -- those that hang


def test_a_child_that_hangs_health_fails_its_load_only(tmp_path: Path) -> None:
    """The stall timer ends it; those who waited learn why, another model is served meanwhile (traps 19, 21, 22, 40)."""
    models = {"hung": fake_profile(hang_health=True, startup_timeout_seconds=3), "good": fake_profile()}
    with fake_node(tmp_path, models) as node:

        async def scenario() -> tuple[float, list[int]]:
            start = time.monotonic()
            waiting = [await Client.connect(node) for _ in range(5)]
            for one in waiting:
                one.send(chat("hung"))
            async with client(node) as other:
                for _ in range(20):
                    assert (await other.ask(chat("good")))[0] == 200
                served_s = time.monotonic() - start
            statuses = []
            for one in waiting:
                status, body = await asyncio.wait_for(one.answer(), 20)
                assert json.loads(body)["error"]["type"] == "instance_failed"
                statuses.append(status)
                await one.close()
            report(others_served_after_s=served_s, failed_after_s=time.monotonic() - start)
            return served_s, statuses

        served_s, statuses = asyncio.run(scenario())
        assert statuses == [503] * 5
        assert served_s < 3, "not only after the other had failed"
        eventually(lambda: len(node.instances()) == 1, what="the hung one is gone")
        assert_at_rest(node)


def test_a_child_that_never_answers_is_left_by_its_client(tmp_path: Path) -> None:
    """``upstream_read_timeout_ms`` ends a stream that stands still, as an error event; the slot is free again."""
    config = {"upstream_read_timeout_ms": 1500}
    with fake_node(tmp_path, {"m": fake_profile("-np 1", stall_after=2)}, config) as node:
        node.prewarm("m")

        async def scenario() -> bytes:
            async with client(node) as one:
                one.send(chat("m", stream=True))
                await one.head()
                return await asyncio.wait_for(one.rest(), 10)

        assert_broken_off(asyncio.run(scenario()))
        assert_at_rest(node)


def test_slow_answers_are_not_cut(tmp_path: Path) -> None:
    """No default limit ends a request that is merely slow (trap 79)."""
    short = {"idle_timeout_seconds": 1, "head_read_timeout_ms": 1000, "body_read_timeout_ms": 1000}
    with fake_node(tmp_path, {"m": fake_profile(prefill_s=1.5, tokens_per_s=2)}, {"http": short}) as node:
        assert node.say("m") == "hello from fake.gguf"


# -- those that babble


def test_a_line_of_a_mebibyte_does_not_stop_a_child(tmp_path: Path) -> None:
    """The pipe is drained without a limit on lines, and the ring stays small (trap 20)."""
    with fake_node(tmp_path, {"m": fake_profile(log_line_bytes=2**20)}) as node:
        node.prewarm("m")
        before = baseline(node)
        for _ in range(5):
            node.unload("m")
            eventually(lambda: not node.instances())
            assert node.say("m")
        text = node.http.get("/admin/logs", params={"model": "m"}).text
        assert "listening" in text
        assert len(text) < 400_000
        assert Held.by(node).rss_mib < before.rss_mib + 10


def test_half_an_event_and_a_close_is_an_error(tmp_path: Path) -> None:
    """What did arrive is passed on; then the error event begins on a line of its own (traps 7, 76)."""
    with fake_node(tmp_path, {"m": fake_profile(half_event_after=2)}) as node:
        node.prewarm("m")
        with node.connection() as raw:
            raw.post("/v1/chat/completions", {"model": "m", "messages": [], "stream": True})
            assert raw.head()[0] == 200
            whole, rest = chunks(raw.rest())
        assert rest == b""
        assert whole[-1] != b""
        text = b"".join(whole)
        assert b"[DONE]" not in text
        error = json.loads(text.rstrip(b"\n").rsplit(b"\n", 1)[1].removeprefix(b"data: "))["error"]
        assert error["type"] == "upstream_error"
        assert b'data: {"id"' in text
        assert node.metric("llama_mesh_errors_total") == 1
        assert_at_rest(node)


def test_kept_connections_that_the_child_closes_at_any_time(tmp_path: Path) -> None:
    """A child that closes idle connections after 20 ms races every request; none of 600 fails (trap 75)."""
    with fake_node(tmp_path, {"m": fake_profile("-np 8", keepalive_s=0.02, keepalive_max=1000)}) as node:
        node.prewarm("m")

        async def worker(seed: int) -> list[int]:
            statuses = []
            async with client(node) as one:
                for n in range(100):
                    statuses.append((await one.ask(chat("m")))[0])
                    await asyncio.sleep(0.0195 + (seed * 37 + n) % 20 / 10_000)
            return statuses

        async def scenario() -> list[int]:
            return [status for statuses in await asyncio.gather(*map(worker, range(6))) for status in statuses]

        assert set(asyncio.run(scenario())) == {200}
        report(retries=node.metric("llama_mesh_upstream_retries_total"))
        assert node.metric("llama_mesh_errors_total") == 0
        assert_at_rest(node)


def test_a_stopped_child_is_not_a_dead_one(tmp_path: Path) -> None:
    """SIGSTOP and SIGCONT in the middle of streams: they wait, then go on to a clean end; nothing else is disturbed."""
    with fake_node(tmp_path, {"m": fake_profile(tokens_per_s=50, say="a " * 50), "n": fake_profile()}) as node:
        process = psutil.Process(node.prewarm("m")["pid"])
        node.prewarm("n")

        async def scenario() -> bytes:
            async with client(node) as one, client(node) as other:
                one.send(chat("m", stream=True))
                await one.head()
                process.send_signal(signal.SIGSTOP)
                try:
                    for _ in range(20):
                        assert (await other.ask(chat("n")))[0] == 200
                    await asyncio.sleep(1)
                finally:
                    process.send_signal(signal.SIGCONT)
                parts = b""
                while not parts.endswith(END):
                    parts += await asyncio.wait_for(one.reader.read(65536), 5)
                return parts

        assert b"[DONE]" in asyncio.run(scenario())
        assert_at_rest(node)


def test_a_slot_stays_taken_until_the_child_says_otherwise(tmp_path: Path) -> None:
    """A child too busy to answer /slots has not freed its slot: a new request waits for it here (trap 9)."""
    with fake_node(tmp_path, {"m": fake_profile("-np 1", tokens_per_s=10)}) as node:
        instance = node.prewarm("m")
        process = psutil.Process(instance["pid"])

        async def scenario() -> float:
            async with client(node) as one, client(node) as next_one:
                one.send(chat("m", stream=True, ignore_eos=True, max_tokens=1000))
                await one.head()
                process.send_signal(signal.SIGSTOP)  # as deep in a batch as one can be
                try:
                    one.vanish(reset=True)
                    next_one.send(chat("m"))
                    await asyncio.sleep(4.7)
                    (queued,) = (await asyncio.to_thread(node.status))["queues"].values()
                    assert queued == 1, "it is not sent into a child that still computes for somebody else"
                finally:
                    process.send_signal(signal.SIGCONT)
                start = time.monotonic()
                assert (await asyncio.wait_for(next_one.answer(), 15))[0] == 200
                return time.monotonic() - start

        report(served_after_s=asyncio.run(scenario()))
        assert child_get(instance, "/fake/state").json()["slots"] == [False]
        assert_at_rest(node)
