"""The outermost layer of every route that is not inference: who may pass, request ids, and what a failure looks like.

Everything is denied by default; only ``PUBLIC_PATHS`` can be read without a key (trap 99). Pure ASGI, so that streams
and disconnects pass through it untouched.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from typing import Final

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mesh.api.auth import Authenticator, bearer_token
from mesh.api.context import NodeContext
from mesh.api.request_scope import header, sane_request_id
from mesh.api.responses import error_response, internal_error
from mesh.api.routes import BY_PATH, Dialect
from mesh.core.node_state import PeerIdentity
from mesh.errors import AuthError, MeshError, RequestError
from mesh.logs import Log

_log = Log(__name__)


class NotAdminError(RequestError):
    """The key is known, but not one of ``auth.admin_keys``."""

    status = 403
    type = "permission_error"


class NotAPeerError(RequestError):
    """A route for other nodes only, or one that they have no business with (trap 103)."""

    status = 403
    type = "permission_error"


GOSSIP_PATH: Final = "/cluster/gossip"
#: What members of the mesh may use on their links; a client's key is never passed on (trap 102).
PEER_PATHS: Final = frozenset(
    {
        GOSSIP_PATH,
        "/health",
        "/admin/prewarm",
        "/admin/unload",
        "/admin/drain",
        "/admin/undrain",
        "/admin/rebuild-llama",
        "/admin/rebuild-llama/cancel",
        "/admin/rollback-llama",
        "/admin/builds",
    }
)
PUBLIC_PATHS: Final = frozenset({"/health", "/healthz", "/readyz", "/version"})
_ADMIN_PREFIX: Final = "/admin/"


def authorised(authenticator: Authenticator, headers: list[tuple[bytes, bytes]], *, admin: bool = False) -> bool:
    """Whether a request with these headers may pass; always, when auth is off."""
    if not authenticator.enabled:
        return True
    bearer = bearer_token(header(headers, b"authorization") or b"")
    return authenticator.allows(bearer, header(headers, authenticator.header), admin=admin)


def peer_of(scope: Scope) -> PeerIdentity | None:
    """Return the node whose link a request came on, None if a client sent it."""
    peer: PeerIdentity | None = scope.get("state", {}).get("mesh_peer")
    return peer


class AccessMiddleware:
    """Checks the key, marks the response, turns every exception into an error envelope, and logs the request."""

    def __init__(self, app: ASGIApp, ctx: NodeContext) -> None:
        self._app = app
        self._ctx = ctx
        # whatever a node is called, its name must not break a header
        self._node = re.sub(rb"[^!-~]", b"?", ctx.node_id.encode("ascii", "replace"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            exchange = _Exchange(self._ctx, self._node, scope, send)
            try:
                await exchange.run(self._app, receive)
            finally:
                exchange.log()
        else:  # a websocket upgrade: there is nothing here to talk to
            await receive()
            await send({"type": "websocket.close", "code": 1003})


class _Exchange:
    """One request and what became of it."""

    def __init__(self, ctx: NodeContext, node: bytes, scope: Scope, send: Send) -> None:
        self._ctx = ctx
        self._node = node
        self._scope = scope
        self._send = send
        self._path: str = scope["path"]
        self._id = sane_request_id(header(scope["headers"], b"x-request-id")) or uuid.uuid4().hex
        self._since = asyncio.get_running_loop().time()
        self._status = 0
        self._bytes_out = 0
        self._error: str | None = None

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        """Serve the request; whatever it raises before the response began becomes an envelope (trap 74)."""
        try:
            self._check_key()
            self._scope.setdefault("state", {})["request_id"] = self._id
            await app(self._scope, receive, self.send)
        except ClientDisconnect:
            self._error = "client_disconnected"
        except Exception as error:
            answer = error if isinstance(error, MeshError) else internal_error()
            self._error = answer.type
            if answer is not error:
                _log.exception("a request failed unexpectedly", path=self._path, request_id=self._id)
            if self._status:
                raise  # too late for a status: the server aborts the connection, never a clean end
            await _send_error(answer, dialect_of(self._path), self.send)

    def _check_key(self) -> None:
        if self._path in PUBLIC_PATHS:
            return
        peer = peer_of(self._scope)
        if self._path in PEER_PATHS and peer is not None:  # its link proved that it is a member
            return
        if peer is not None:
            raise NotAPeerError("not a route for other nodes")
        authenticator, headers = self._ctx.authenticator, self._scope["headers"]
        if not authorised(authenticator, headers):
            raise AuthError("Unauthorized")
        if self._path == GOSSIP_PATH:
            raise NotAPeerError("this route is for nodes on a link")
        if self._path.startswith(_ADMIN_PREFIX) and not authorised(authenticator, headers, admin=True):
            raise NotAdminError("this route needs one of auth.admin_keys")

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._marks()]
        else:
            self._bytes_out += len(message.get("body", b""))
        await self._send(message)

    def _marks(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-llama-mesh-node", self._node), (b"x-request-id", self._id.encode())]

    def log(self) -> None:
        """Note the request, except probes and gossip that succeed: they come every second and say nothing."""
        if (self._path in PUBLIC_PATHS or self._path == GOSSIP_PATH) and self._status < 400:
            return
        client = self._scope.get("client")
        self._ctx.access_log.write(
            request_id=self._id,
            client=client[0] if client else "",
            method=self._scope["method"],
            path=self._path,
            status=self._status or 499,
            duration_s=asyncio.get_running_loop().time() - self._since,
            bytes_out=self._bytes_out,
            error=self._error,
        )


def dialect_of(path: str) -> Dialect:
    """Whose envelope a client of *path* expects; OpenAI's, unless it is an inference route of somebody else."""
    rows = BY_PATH.get(path.encode(errors="replace"))
    return next(iter(rows.values())).dialect if rows else Dialect.OPENAI


async def _send_error(error: MeshError, dialect: Dialect, send: Send) -> None:
    status, headers, body = error_response(error, dialect)
    lower = [(name.lower(), value) for name, value in headers]
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*lower, length]})
    await send({"type": "http.response.body", "body": body})
