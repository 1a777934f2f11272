"""Many requests: nothing grows, nothing is miscounted, and the event loop stays free."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

from tests.e2e.harness import Node
from tests.e2e.robustness import (
    Client,
    Held,
    Latency,
    assert_at_rest,
    assert_same_fds,
    baseline,
    chat,
    client,
    fake_node,
    fake_profile,
    report,
    scaled,
)


async def _ask_many(node: Node, data: bytes, count: int, connections: int) -> Counter[int]:
    """Send *count* requests over kept connections and return how often each status came."""
    statuses: Counter[int] = Counter()
    left = iter(range(count))

    async def worker() -> None:
        async with client(node) as one:
            for _ in left:
                status, body = await one.ask(data)
                assert b"usage" in body
                statuses[status] += 1

    await asyncio.gather(*(worker() for _ in range(connections)))
    return statuses


def test_nothing_grows_over_many_requests(tmp_path: Path) -> None:
    """20,000 small requests, 3,000 streams: memory and descriptors flat, counters exact (traps 1, 95, 110)."""
    plain, streamed = scaled(20_000), scaled(3_000)
    with fake_node(tmp_path, {"m": fake_profile("-np 32", say="one two three four five")}) as node:
        node.prewarm("m")
        small, stream = chat("m"), chat("m", stream=True)
        asyncio.run(_ask_many(node, small, 3000, 16))
        asyncio.run(_ask_many(node, stream, 300, 16))
        assert_at_rest(node)
        before = baseline(node)
        start = time.monotonic()
        assert asyncio.run(_ask_many(node, small, plain, 16)) == {200: plain}
        plain_s = time.monotonic() - start
        assert asyncio.run(_ask_many(node, stream, streamed, 16)) == {200: streamed}
        assert_at_rest(node)
        after = Held.by(node)
        report(plain_per_s=plain / plain_s, seconds=time.monotonic() - start, before=before, after=after)
        assert_same_fds(node, before)
        assert after.threads <= before.threads
        assert after.rss_mib < before.rss_mib + 4
        sent = plain + streamed + 3301
        metrics = node.http.get("/metrics/json").json()
        assert metrics["requests_total"] == sent
        assert metrics["errors_total"] == 0
        assert metrics["queue_wait_count"] == sent
        (entry,) = metrics["hashes"].values()
        assert entry["requests_total"] == sent
        assert entry["tokens_generated_total"] == 5 * sent
        assert sum(entry["models"]["m"]["latency"]["counts"]) == sent
        assert sum(entry["models"]["m"]["ttft"]["counts"]) >= streamed
        assert node.metric("llama_mesh_requests_total") == sent
        assert node.metric("llama_mesh_client_disconnects_total") == 0
        lines = node.wait_log('"path":"/v1/chat/completions"', count=sent)
        assert len(lines) == sent, "one line in the access log for each"
        assert len({line["fields"]["request_id"] for line in lines}) == sent


def test_two_hundred_streams_leave_the_loop_free(tmp_path: Path) -> None:
    """While 200 streams run, another client's /healthz answers at once: the lag is small (trap 108)."""
    count, words = 200, 25
    with fake_node(tmp_path, {"m": fake_profile("-np 200", tokens_per_s=10, say="a " * words)}) as node:
        node.prewarm("m")

        async def one_stream() -> float:
            async with client(node) as one:
                one.send(chat("m", stream=True))
                status, body = await one.answer()
                assert status == 200
                assert body.endswith(b"data: [DONE]\n\n")
                assert body.count(b"data: {") == words + 2
                return time.monotonic()

        async def scenario() -> Latency:
            latency = Latency(node)
            streams = [asyncio.ensure_future(one_stream()) for _ in range(count)]
            await asyncio.sleep(0.5)  # the connects are over
            measuring = asyncio.ensure_future(latency.measure())
            await asyncio.wait_for(asyncio.gather(*streams), 60)
            measuring.cancel()
            await asyncio.gather(measuring, return_exceptions=True)
            return latency

        quantiles = asyncio.run(scenario()).quantiles()
        report(streams=count, healthz=quantiles)
        # the goal is p99 < 20 ms; client, node and 200 threads of the fake server share these cores with other tests
        assert quantiles["p50_ms"] < 20
        assert quantiles["p99_ms"] < 150
        assert_at_rest(node)


def test_a_huge_request_does_not_stop_the_streams(tmp_path: Path) -> None:
    """20 MB of JSON, routed by its last key, amid streams: they go on meanwhile (traps 72, 108)."""
    with fake_node(tmp_path, {"m": fake_profile("-np 20", tokens_per_s=20, say="a " * 40)}) as node:
        node.prewarm("m")
        content = b"QUJD" * 5_000_000
        body = b'{"messages":[{"role":"user","content":"' + content + b'"}],"stream":false,"model":"m"}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % len(body)

        async def stream() -> None:
            async with client(node) as one:
                one.send(chat("m", stream=True))
                assert (await one.answer())[0] == 200

        async def scenario() -> tuple[int, Latency]:
            latency = Latency(node)
            streams = [asyncio.ensure_future(stream()) for _ in range(10)]
            measuring = asyncio.ensure_future(latency.measure())
            await asyncio.sleep(0.2)
            async with client(node) as one:
                one.send(head + body)
                status, _ = await asyncio.wait_for(one.answer(), 30)
            measuring.cancel()
            await asyncio.gather(*streams)
            await asyncio.gather(measuring, return_exceptions=True)
            return status, latency

        status, latency = asyncio.run(scenario())
        assert status == 200
        report(body_mb=20, healthz=latency.quantiles())
        assert max(latency.samples_ms) < 500
        assert_at_rest(node)


def test_connections_by_the_thousand(tmp_path: Path) -> None:
    """2,000 idle kept-alive connections cost little and are all still served; they go when they idle too long."""
    count = 2000
    with fake_node(
        tmp_path, {"m": fake_profile("-np 32", max_queue_size=0)}, {"http": {"idle_timeout_seconds": 3}}
    ) as node:
        node.prewarm("m")
        before = baseline(node)

        async def scenario() -> None:
            clients = [await Client.connect(node) for _ in range(count)]
            start = time.monotonic()
            for turn in range(2):
                answers = await asyncio.gather(*(one.ask(chat("m")) for one in clients))
                assert {status for status, _ in answers} == {200}
                if turn == 0:
                    during = Held.by(node)
                    kib = (during.rss_mib - before.rss_mib) * 1024 / count
                    report(connections=count, kib_per_connection=kib, s_per_round=time.monotonic() - start)
                    assert during.fds >= count
            rests = await asyncio.wait_for(asyncio.gather(*(one.rest() for one in clients)), 20)
            assert set(rests) == {b""}, "closed without a word"
            for one in clients:
                await one.close()

        asyncio.run(scenario())
        assert_at_rest(node)
        assert_same_fds(node, before)
