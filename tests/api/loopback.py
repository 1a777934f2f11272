"""A data plane on a loopback socket with a fake admission, and a raw HTTP client that shows every byte."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from mesh.api.auth import Authenticator
from mesh.api.context import NodeContext
from mesh.api.dataplane import DataPlane
from mesh.config.profile import Catalog, Profile
from mesh.config.settings import Settings
from mesh.engine.lease import Endpoint
from mesh.logs import AccessLog
from mesh.metrics import Metrics
from tests.fakes import FakeAdmission, ScriptedUpstream

CHAT = b"/v1/chat/completions"


def profile(name: str = "tiny", **changes: Any) -> Profile:
    values: dict[str, Any] = {"args": (), "args_hash": f"hash-{name}"} | changes
    return Profile(key=f"{name}:default", id=name, model=name, profile="default", **values)


def catalog(*profiles: Profile, default_model: str | None = None) -> Catalog:
    names = {name: p for p in profiles for name in (p.key, p.id, *p.aliases)}
    return Catalog(profiles=profiles, names=names, default_model=default_model)


@dataclass
class RecordedAccess:
    """Stands in for the access log and keeps what was written."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def write(self, *values: Any, **fields: Any) -> None:
        bound = inspect.signature(AccessLog.write).bind(self, *values, **fields)
        self.lines.append({name: value for name, value in bound.arguments.items() if name != "self"})


async def _echo(request: Request) -> PlainTextResponse:
    body = await request.body()
    return PlainTextResponse(f"{request.method} {request.url.path} {len(body)}")


class LoopbackNode:
    """The data plane under test, and what its collaborators saw."""

    def __init__(self, plane: DataPlane, ctx: NodeContext, admission: FakeAdmission, access: RecordedAccess) -> None:
        self.plane = plane
        self.ctx = ctx
        self.admission = admission
        self.access = access
        self.port = 0
        self.clients: list[RawClient] = []

    async def client(self) -> RawClient:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        client = RawClient(reader, writer)
        self.clients.append(client)
        return client

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until *condition* holds."""
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110  # conditions of code that signals nobody
                await asyncio.sleep(0.001)

    async def settled(self) -> None:
        """Wait until nothing is under way, then check that everything was given back exactly once (trap 1)."""
        await self.until(lambda: self.ctx.metrics.current_requests == 0)
        await self.until(lambda: all(lease.ended for lease in self.admission.leases))
        for lease in self.admission.leases:
            assert len(lease.ended) == 1, lease.ended
        for ticket in self.admission.tickets:
            assert ticket.decided != ticket.cancelled
        assert not self.plane.detached


@asynccontextmanager
async def loopback(
    upstream: ScriptedUpstream | None = None,
    *,
    profiles: tuple[Profile, ...] | None = None,
    default_model: str | None = None,
    settings: dict[str, Any] | None = None,
    http: dict[str, Any] | None = None,
    auth: dict[str, Any] | None = None,
    api_key: str | None = None,
    sweep_interval_s: float = 0.02,
) -> AsyncIterator[LoopbackNode]:
    configured = Settings.model_validate(
        {"node_id": "node-1", **(settings or {}), "http": http or {}, "auth": auth or {}}
    )
    profiles = profiles or (profile(),)
    endpoint = Endpoint("tiny-1", profiles[0], "127.0.0.1", upstream.port if upstream else 9, api_key)
    admission = FakeAdmission(catalog(*profiles, default_model=default_model), endpoint)
    access = RecordedAccess()
    ctx = NodeContext(
        settings=configured,
        supervisor=cast(Any, admission),
        metrics=Metrics("node-1"),
        access_log=cast(Any, access),
        authenticator=Authenticator(configured.auth),
        node_id="node-1",
        started_at_wall=0.0,
    )
    app = Starlette(routes=[Route("/{path:path}", _echo, methods=["GET", "POST"])])
    plane = DataPlane(ctx, app, sweep_interval_s=sweep_interval_s)
    node = LoopbackNode(plane, ctx, admission, access)
    server = await asyncio.get_running_loop().create_server(plane.protocol, "127.0.0.1", 0)
    node.port = server.sockets[0].getsockname()[1]
    try:
        yield node
        await node.settled()
    finally:
        server.close()
        endpoint.close()
        await plane.close()
        for client in node.clients:
            client.abort()
            with suppress(OSError):
                await client.writer.wait_closed()
        await asyncio.sleep(0.01)  # transports of both loops close one turn after they were told to


@dataclass
class Answer:
    status: int
    head: bytes
    body: bytes
    ended: str  # "length", "chunked", "eof" or "broken"

    def field(self, name: bytes) -> bytes | None:
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.lower() == name.lower():
                return value.strip()
        return None


class RawClient:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def abort(self) -> None:
        self.writer.transport.abort()

    async def answer(self, *, head_only: bool = False) -> Answer:
        """Read one response as a strict client would."""
        async with asyncio.timeout(5):
            head = await self.reader.readuntil(b"\r\n\r\n")
            answer = Answer(int(head[9:12]), head, b"", "length")
            if head_only:
                return answer
            try:
                await self._body(answer)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                answer.body += getattr(error, "partial", b"")
                answer.ended = "broken"
            return answer

    async def _body(self, answer: Answer) -> None:
        length = answer.field(b"content-length")
        if answer.field(b"transfer-encoding") == b"chunked":
            answer.ended = "chunked"
            while size := int((await self.reader.readuntil(b"\r\n")).strip(), 16):
                answer.body += await self.reader.readexactly(size)
                assert await self.reader.readexactly(2) == b"\r\n"
            assert await self.reader.readexactly(2) == b"\r\n"
        elif length is not None:
            answer.body = await self.reader.readexactly(int(length))
        elif answer.status not in (204, 304):
            answer.body = await self.reader.read()
            answer.ended = "eof"

    async def ended(self) -> bytes:
        """Return what still comes until the connection ends."""
        async with asyncio.timeout(5):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""


def post(body: bytes, path: bytes = CHAT, extra: bytes = b"", version: bytes = b"1.1") -> bytes:
    head = b"POST %b HTTP/%b\r\nHost: node\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n"
    return head % (path, version, extra, len(body)) + body


def get(path: bytes, extra: bytes = b"", method: bytes = b"GET") -> bytes:
    return b"%b %b HTTP/1.1\r\nHost: node\r\n%b\r\n" % (method, path, extra)
