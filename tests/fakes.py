"""Fakes for the data plane: an admission that does what it is told, and an instance that answers by script.

Small and real: sockets are real, decisions are recorded, nothing is patched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from mesh.config.profile import Catalog, Profile
from mesh.engine.lease import Endpoint, Waiter
from mesh.errors import MeshError


@dataclass(eq=False)
class FakeLease:
    """Records how it ended; ending twice differently, or twice at all through both ways, is an error."""

    endpoint: Endpoint
    ended: list[str] = field(default_factory=list)

    def release(self) -> None:
        self.ended.append("release")

    def abandon(self, *, streaming: bool = False) -> None:
        self.ended.append("abandon")


@dataclass(eq=False)
class FakeTicket:
    """A request that waits; the test admits or refuses it."""

    admission: FakeAdmission
    profile: Profile
    waiter: Waiter
    since: float
    deadline: float | None
    needs_slot: bool
    cancelled: bool = False
    decided: bool = False

    def cancel(self) -> None:
        assert not self.decided, "a ticket is cancelled only while it waits"
        self.cancelled = True
        self.admission.changed.set()

    def admit(self, endpoint: Endpoint | None = None) -> FakeLease:
        assert not self.cancelled
        assert not self.decided
        self.decided = True
        lease = FakeLease(endpoint or self.admission.endpoint)
        self.admission.leases.append(lease)
        self.waiter.admitted(lease)
        return lease

    def refuse(self, error: MeshError) -> None:
        assert not self.cancelled
        assert not self.decided
        self.decided = True
        self.waiter.refused(error)


class FakeAdmission:
    """Admits at once to ``endpoint``; with ``hold`` it queues, with ``refusal`` it refuses at once."""

    def __init__(self, catalog: Catalog, endpoint: Endpoint) -> None:
        self.catalog = catalog
        self.endpoint = endpoint
        self.hold = False
        self.refusal: MeshError | None = None
        self.tickets: list[FakeTicket] = []
        self.leases: list[FakeLease] = []
        self.changed = asyncio.Event()  # set by every submit and cancel

    def submit(
        self,
        profile: Profile,
        waiter: Waiter,
        *,
        since: float,
        deadline: float | None,
        needs_slot: bool = True,
    ) -> FakeTicket:
        ticket = FakeTicket(self, profile, waiter, since, deadline, needs_slot)
        self.tickets.append(ticket)
        self.changed.set()
        if self.refusal is not None:
            ticket.refuse(self.refusal)
        elif not self.hold:
            ticket.admit()
        return ticket

    async def ticket(self, number: int = 0) -> FakeTicket:
        """Wait until request *number* was submitted."""
        await self.until(lambda: len(self.tickets) > number)
        return self.tickets[number]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@dataclass(eq=False)
class Received:
    """One request as an instance got it."""

    head: bytes
    body: bytes
    connection: int

    @property
    def request_line(self) -> bytes:
        return self.head.partition(b"\r\n")[0]

    def field(self, name: bytes) -> list[bytes]:
        lines = [line.partition(b":") for line in self.head.split(b"\r\n")[1:]]
        return [value.strip() for key, _, value in lines if key.lower() == name.lower()]


Script = Callable[["Received", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def reply(*parts: bytes, close: bool = False) -> Script:
    """A script that writes *parts* one by one, each flushed, and may close."""

    async def play(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            writer.close()

    return play


async def hang(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take the request and say nothing, until the node closes the connection."""
    await reader.read()
    raise ConnectionError


def then_hang(*parts: bytes) -> Script:
    """Say *parts*, then nothing until the other side leaves."""

    async def play(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reply(*parts)(request, reader, writer)
        await hang(request, reader, writer)

    return play


async def die(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close without a byte of an answer."""
    writer.transport.abort()


def json_reply(body: bytes, status: bytes = b"200 OK", extra: bytes = b"") -> Script:
    head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n" % (status, extra, len(body))
    return reply(head + body)


class ScriptedUpstream:
    """An instance: reads whole requests, answers each by the next script (the last one repeats)."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.requests: list[Received] = []
        self.connections = 0
        self.writers: list[asyncio.StreamWriter] = []
        self.lost = 0  # connections that the node closed
        self.changed = asyncio.Event()
        self.on_connect: Callable[[asyncio.StreamWriter], None] | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> ScriptedUpstream:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self.writers:
            writer.transport.abort()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self.writers:
            with suppress(OSError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        number = self.connections
        self.writers.append(writer)
        try:
            if self.on_connect is not None:
                self.on_connect(writer)
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                request = Received(head, b"", number)
                lengths = request.field(b"content-length")
                request.body = await reader.readexactly(int(lengths[0])) if lengths else b""
                script = self.scripts[min(len(self.requests), len(self.scripts) - 1)]
                self.requests.append(request)
                self.changed.set()
                await script(request, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.lost += 1
        except asyncio.CancelledError:
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()
            self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                self.changed.clear()
                await self.changed.wait()
