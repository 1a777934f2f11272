"""A server that does what none should: it answers without end, or leaves processes behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mesh.build.server_under_test import MAX_ANSWER_BYTES, Child, Connection, Line, ServerFailedError
from mesh.host.warden import Warden
from tests.host.deaths import wait_for_death

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def answering(piece: bytes, times: int | None = None) -> AsyncIterator[tuple[Connection, Callable[[], int]]]:
    """Answer everything with *piece*, *times* or for ever; the function says how many bytes were taken."""
    sent, writers = 0, list[asyncio.StreamWriter]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writers.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD)
        left = times
        try:
            while left is None or left > 0:
                writer.write(piece)
                await writer.drain()
                sent += len(piece)
                left = None if left is None else left - 1
        except ConnectionError:
            pass
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    connection = Connection(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with server:
        yield connection, lambda: sent
        await connection.close()
        for writer in writers:
            writer.close()


@pytest.mark.parametrize(
    "piece", [b"data: {}\n\n" * 1000, b"x" * 10_000, b"\n" * 10_000], ids=["events", "one line", "no text"]
)
async def test_an_answer_without_end_is_not_kept(piece: bytes) -> None:
    """The node's memory is not the new build's."""
    async with answering(piece) as (connection, sent):
        with pytest.raises(ServerFailedError, match="was answered with more than 4 MiB"):
            await connection.post("/completion", {}, 60.0)
        assert sent() < 4 * MAX_ANSWER_BYTES, "some of it is in buffers of the system"


async def test_lines_without_text_are_counted_too() -> None:
    """A hundred kilobytes of them are many times that in our memory."""
    async with answering(b"\n" * 10_000, times=10) as (connection, _):
        with pytest.raises(ServerFailedError, match="was answered with more than 4 MiB"):
            await connection.post("/completion", {}, 60.0)


async def test_a_health_without_end_is_a_health() -> None:
    async with asyncio.timeout(30), answering(b"x" * 10_000) as (connection, _):
        assert await connection.healthy()


async def test_lines_are_whole_however_they_come() -> None:
    async with answering("dätä\r\n\nlast".encode(), times=2) as (connection, _):
        lines = await connection.post("/completion", {}, 60.0)
    assert [line.text for line in lines] == ["dätä", "", "lastdätä", "", "last"]
    assert all(isinstance(line, Line) and line.at > 0 for line in lines)


WRAPPER = """
import os, sys, time
if os.fork() == 0:
    os.setpgid(0, 0)
    print(os.getpid(), flush=True)
time.sleep(1000)
"""
NODE = """
import asyncio, os, signal, sys
from mesh.build.server_under_test import Child
from mesh.host.warden import Warden

async def main() -> None:
    child = Child((sys.executable, "-c", sys.argv[1]), os.environ, Warden())
    async for line in child.ring.subscribe():
        print(line, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_a_wrapper_and_its_server_end_together() -> None:
    """An operator's script may start the real one in a group of its own."""
    warden = Warden()
    child = Child((sys.executable, "-c", WRAPPER), os.environ, warden)
    async for line in child.ring.subscribe():
        await child.kill()
        wait_for_death(int(line))
        break
    warden.close()


async def test_they_end_with_the_node_however_it_ends() -> None:
    node = await asyncio.create_subprocess_exec(
        sys.executable, "-c", NODE, WRAPPER, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert node.stdout is not None
    pid = int(await node.stdout.readline())
    assert await node.wait() == -signal.SIGKILL
    wait_for_death(pid)
