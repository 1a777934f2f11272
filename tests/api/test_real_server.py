"""The app behind uvicorn's own HTTP protocol on a real socket: decoding of paths, HEAD, and clients that vanish."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.api.node import Node
from tests.api.served import Served, serving
from tests.fakes_builds import FakeBuilds
from tests.fakes_supervisor import FakeRing


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(Node()) as found:
        yield found


@pytest.fixture
async def client(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}", trust_env=False) as found:
        yield found


@pytest.mark.parametrize("path", ["org%2FBig%20Model:long", "org/Big%20Model%3Along", "%6Frg/big%20model:LONG"])
async def test_percent_encoded_and_slashed_ids(client: httpx.AsyncClient, path: str) -> None:
    """trap 78"""
    answer = await client.get(f"/v1/models/{path}")
    assert answer.status_code == 200
    assert answer.json()["id"] == "org/Big Model:long"


async def test_head_has_the_headers_and_no_body(client: httpx.AsyncClient) -> None:
    for path in ("/healthz", "/v1/models", "/metrics", "/nowhere", "/admin/logs?model=Smol&follow=true"):
        answer = await client.head(path)
        assert answer.status_code == (404 if path == "/nowhere" else 200)
        assert answer.content == b""
        assert answer.headers["x-request-id"]


async def test_a_connection_is_kept_after_an_error(served: Served, client: httpx.AsyncClient) -> None:
    for _ in range(3):
        assert (await client.get("/nowhere")).status_code == 404
        assert (await client.post("/admin/prewarm", json={})).status_code == 400
    assert len(served.state.connections) == 1


async def test_clients_that_vanish_while_prewarm_waits_leave_nothing(served: Served) -> None:
    """trap 2"""
    loading = served.node.supervisor.loading
    writers = []
    for _ in range(20):
        _, writer = await served.connect("POST /admin/prewarm HTTP/1.1", '{"model": "Smol"}')
        writers.append(writer)
    await served.until(lambda: loading.get("smol:default") == 20)
    for writer in writers:
        writer.transport.abort()
    await served.until(lambda: loading["smol:default"] == 0 and not served.state.tasks)
    assert not served.state.connections
    assert {line["status"] for line in served.node.access_log.lines} == {499}


async def test_followers_that_vanish_leave_nothing(served: Served) -> None:
    """trap 2: also when nothing is ever printed, so that no write could fail."""
    ring = FakeRing("hello")
    served.node.supervisor.rings = {"smol:default": [("i-1", ring)]}
    writers = []
    for _ in range(20):
        reader, writer = await served.connect("GET /admin/logs?model=Smol&follow=true HTTP/1.1")
        async with asyncio.timeout(5):
            await reader.readuntil(b"hello\n")
        writers.append(writer)
    assert len(ring.subscriptions) == 20
    for writer in writers:
        writer.close()
    await served.until(lambda: not ring.subscriptions and not served.state.tasks)
    assert not served.state.connections


async def test_lines_reach_a_follower_as_they_are_printed(served: Served) -> None:
    ring = FakeRing()
    served.node.supervisor.rings = {"smol:default": [("i-1", ring)]}
    reader, writer = await served.connect("GET /admin/logs?model=Smol&follow=true HTTP/1.1")
    async with asyncio.timeout(5):
        await ring.subscribed.wait()
        for line in ("one", "two"):
            ring.feed(line)
            assert line.encode() in await reader.readuntil(line.encode() + b"\n")
    writer.close()
    await served.until(lambda: not served.state.tasks)


async def test_build_events_reach_a_viewer_as_they_happen(served: Served) -> None:
    builds = served.node.ctx.builds = FakeBuilds()
    reader, writer = await served.connect("GET /admin/builds/events HTTP/1.1")
    async with asyncio.timeout(5):
        await reader.readuntil(b"event: snapshot\n")
        for line in ("one", "two"):
            builds.log(line)
            assert b"event: log\n" in await reader.readuntil(b'"line":"%b"}\n\n' % line.encode())
    writer.close()
    await served.until(lambda: not builds.subscriptions and not served.state.tasks)


async def test_viewers_of_builds_that_vanish_leave_nothing(served: Served) -> None:
    """trap 2: also while nothing happens, and also those that never read what they are sent."""
    builds = served.node.ctx.builds = FakeBuilds()
    writers = []
    for _ in range(20):
        reader, writer = await served.connect("GET /admin/builds/events HTTP/1.1")
        async with asyncio.timeout(5):
            await reader.readuntil(b"event: snapshot\n")
        writers.append(writer)
    for writer in writers:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
    for _ in range(20):
        builds.log("x" * 100_000)
    assert len(builds.subscriptions) == 20
    for writer in writers:
        writer.transport.abort()
    await served.until(lambda: not builds.subscriptions and not served.state.tasks)
    assert not served.state.connections
