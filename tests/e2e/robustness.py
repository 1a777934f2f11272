"""What the robustness tests share: nodes above the fake llama-server, clients by the thousand, and what is held.

``ROBUSTNESS_SCALE`` multiplies the counts of the long tests (default 1, some two minutes in all; 10 for a soak).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import struct
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.harness import Node, cookbook, eventually, profile

FAKE = Path(__file__).parents[1] / "fake_llama_server.py"
CHAT = "/v1/chat/completions"


def scaled(count: int) -> int:
    """Return *count* times ``ROBUSTNESS_SCALE``."""
    return int(count * float(os.environ.get("ROBUSTNESS_SCALE", "1")))


def report(**figures: object) -> None:
    """Print what was measured; ``pytest -s`` shows it."""
    print("measured:", json.dumps(figures, default=str))


# -- nodes above the fake server


def fake_engine(directory: Path, *, by_wrapper: bool = False) -> Path:
    """Write an executable that is the fake server, or a ``bash -c`` wrapper whose grandchild is (trap 14)."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ("wrapper" if by_wrapper else "llama-server")
    server = f"{sys.executable} -I -S {FAKE}"
    # a command after it keeps bash from exec-ing the server in its own place
    run = f'exec bash -c \'{server} "$@"; echo ended\' bash "$@"' if by_wrapper else f'exec {server} "$@"'
    path.write_text(f"#!/bin/sh\n{run}\n")
    path.chmod(0o755)
    return path


def fake_profile(args: str = "-np 4", *, env: Mapping[str, str] | None = None, **faults: Any) -> dict[str, Any]:
    """Return a cookbook profile whose fake server has these faults (and profile keys: those without ``FAKE_``)."""
    keys = {name: faults.pop(name) for name in tuple(faults) if name in PROFILE_KEYS}
    switches = {f"FAKE_{name.upper()}": str(value) for name, value in faults.items()}
    return profile("fake.gguf", args, env={**switches, **(env or {})}, **keys)


PROFILE_KEYS = {
    *("startup_timeout_seconds", "idle_timeout_seconds", "max_instances", "max_queue_size", "drain_on_disconnect"),
    *("max_concurrent_requests_per_instance", "max_wait_in_queue_ms", "estimated_sysmem_mb", "aliases"),
    "max_request_duration_ms",
}


def fake_node(
    directory: Path,
    models: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    *,
    by_wrapper: bool = False,
    **options: Any,
) -> Node:
    """Return a node, not started, whose engine is the fake server."""
    engine = {"binary_path": str(fake_engine(directory, by_wrapper=by_wrapper))}
    return Node(directory, cookbook(models), {"llama_cpp": engine, **(config or {})}, **options)


@contextmanager
def doomed(node: Node) -> Iterator[Node]:
    """Start *node* for a test that ends it in its own way; kill what is left afterwards."""
    try:
        yield node.start()
    except BaseException as error:
        error.add_note(node.tail())
        raise
    finally:
        node._kill_everything()


# -- what a node holds


@dataclass(frozen=True, slots=True)
class Held:
    """What a leak would grow. There is no view of asyncio's tasks from outside; they hold memory and descriptors."""

    fds: int
    threads: int
    rss_mib: float

    @classmethod
    def by(cls, node: Node) -> Held:
        process = psutil.Process(node.pid)
        return cls(process.num_fds(), process.num_threads(), process.memory_info().rss / 2**20)


def baseline(node: Node, model: str = "m") -> Held:
    """Return what the node holds while it keeps one connection to an instance, as it will for 4 s after the test."""
    assert node.chat(model).status_code == 200
    return Held.by(node)


def at_rest(node: Node) -> bool:
    """Whether no request is counted anywhere: node, queues, instances."""
    metrics, status = node.http.get("/metrics/json").json(), node.status()
    counted = [metrics["current_requests"], metrics["queue_length"], *status["queues"].values()]
    return not any(counted) and not any(i["active"] or i["busy"] for i in status["instances"])


def assert_at_rest(node: Node, *, within_s: float = 10.0) -> None:
    eventually(lambda: at_rest(node), within_s=within_s, what=f"nothing counted: {node.status()}")


def close_waits(node: Node) -> int:
    """Return how many sockets the node keeps of clients that closed theirs."""
    connections = psutil.Process(node.pid).net_connections("tcp")
    return sum(1 for c in connections if c.status == psutil.CONN_CLOSE_WAIT)


def assert_same_fds(node: Node, before: Held, *, within_s: float = 10.0) -> None:
    """The node's descriptors come back to what they were; kept connections to instances are dropped after 4 s."""
    eventually(lambda: node.open_files() <= before.fds, within_s=within_s, what=f"{before} again, {Held.by(node)} now")


# -- clients


def request(path: str, body: Any, *headers: str) -> bytes:
    """Return a POST with a JSON body."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data


def chat(model: str, **keys: Any) -> bytes:
    """Return a chat request."""
    return request(CHAT, {"model": model, "messages": [{"role": "user", "content": "hi"}], **keys})


class Client:
    """One connection of an asyncio client, thin enough to be one of thousands."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, node: Node, *, limit: int = 2**20) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", node.port, limit=limit))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> tuple[int, dict[str, str]]:
        text = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in text[1:] if line)
        return int(text[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def answer(self) -> tuple[int, bytes]:
        """Read one whole answer and return its status and body."""
        status, headers = await self.head()
        if headers.get("transfer-encoding") != "chunked":
            return status, await self.reader.readexactly(int(headers.get("content-length", 0)))
        parts = []
        while size := int(await self.reader.readline(), 16):
            parts.append(await self.reader.readexactly(size))
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)
        return status, b"".join(parts)

    async def ask(self, data: bytes) -> tuple[int, bytes]:
        self.send(data)
        return await self.answer()

    async def rest(self) -> bytes:
        """Return all that comes until the connection ends in whatever way."""
        parts = []
        with suppress(ConnectionError):
            while data := await self.reader.read(2**18):
                parts.append(data)
        return b"".join(parts)

    def vanish(self, *, reset: bool) -> None:
        """Close at once, with a RST if *reset* is set, as a machine does that is switched off and on."""
        sock = self.writer.get_extra_info("socket")
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


@asynccontextmanager
async def client(node: Node) -> AsyncIterator[Client]:
    """Connect to *node* for the length of a block."""
    one = await Client.connect(node)
    try:
        yield one
    finally:
        await one.close()


class Latency:
    """The node's answer time, seen by one client that asks all the time: what its event loop's lag looks like."""

    def __init__(self, node: Node, *, every_s: float = 0.01) -> None:
        self._node, self._every_s = node, every_s
        self.samples_ms: list[float] = []

    async def measure(self) -> None:
        """Ask until cancelled."""
        async with client(self._node) as one:
            while True:
                start = time.perf_counter()
                status, _ = await one.ask(b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n")
                assert status == 200
                self.samples_ms.append((time.perf_counter() - start) * 1000)
                await asyncio.sleep(self._every_s)

    def quantiles(self) -> dict[str, float]:
        cuts = statistics.quantiles(self.samples_ms, n=100)
        return {"p50_ms": round(cuts[49], 2), "p99_ms": round(cuts[98], 2), "max_ms": round(max(self.samples_ms), 2)}


def content(events: bytes) -> str:
    """Return the text of a chat's event stream."""
    lines = [line[6:] for line in events.split(b"\n") if line.startswith(b"data: {")]
    choices = [c for line in lines for c in json.loads(line).get("choices", ())]
    return "".join(c["delta"].get("content") or "" for c in choices)


def chunks(raw: bytes) -> tuple[list[bytes], bytes]:
    """Return the whole chunks of a body and what is left over; a clean end leaves an empty chunk as the last."""
    found = []
    while (at := raw.find(b"\r\n")) >= 0:
        size = int(raw[:at], 16)
        if len(raw) < at + size + 4:
            break
        assert raw[at + 2 + size : at + 4 + size] == b"\r\n"
        found.append(raw[at + 2 : at + 2 + size])
        raw = raw[at + 4 + size :]
    return found, raw


def assert_broken_off(raw: bytes, *, kind: str = "upstream_error") -> dict[str, str]:
    """An event stream that ended in an error event, in a chunk of its own, and not in a clean end (trap 7)."""
    whole, rest = chunks(raw)
    assert rest == b"", rest
    assert whole
    assert whole[-1] != b"", "no terminating chunk"
    events = b"".join(whole).split(b"\n\n")
    assert b"[DONE]" not in b"".join(whole)
    assert events[-1] == b""
    error = json.loads(events[-2].removeprefix(b"data: "))["error"]
    assert error["type"] == kind
    assert error["source"] == "instance"
    return error  # type: ignore[no-any-return]
