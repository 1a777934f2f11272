"""Admin work on this node, on another one, or on every one at once: what ``node`` in the body of a request asks for.

What comes on a link is for this node alone, whatever its body says (trap 60).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mesh.api.access import peer_of
from mesh.api.context import NodeContext
from mesh.api.request_scope import json_object, unless_client_leaves
from mesh.api.responses import error_response
from mesh.errors import MeshError, RequestError

#: How long another node may take for what does not wait for a model.
_CALL_S: Final = 30.0
#: It runs each version that it might go back to, and gives each of them 30 s; clients wait longer than that.
_ROLLBACK_CALL_S: Final = 120.0

Handler = Callable[[Request, dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]
#: What stands beside the message of a refusal, by the refusal.
Beside = Callable[[MeshError], Mapping[str, Any]]


def _nothing(error: MeshError) -> Mapping[str, Any]:
    return {}


async def here_or_there(
    ctx: NodeContext,
    request: Request,
    path: str,
    here: Handler,
    *,
    done: int = 200,
    bodiless: bool = False,
    beside: Beside = _nothing,
) -> Response:
    """Do it on this node, or on those that ``node`` names: another one, or ``"*"`` for every one.

    *done* is the status of success; *bodiless* takes a request without a body for an empty object. A client that
    leaves ends the wait, here and there.
    """
    try:
        timeout_s = ctx.settings.http.body_read_timeout_ms / 1000
        body = await json_object(request, timeout_s=timeout_s, optional=bodiless)
        node = body.get("node")
        if node is not None and (not isinstance(node, str) or not node):
            raise RequestError("'node' must be a node's id, or '*' for all", param="node")
        if peer_of(request.scope) is not None or node in (None, ctx.node_id):
            work = here(request, body)
        elif node == "*":
            return await unless_client_leaves(request, _everywhere(ctx, request, path, body, here, done), path)
        else:
            work = _there(ctx, node, path, body)
        return JSONResponse(await unless_client_leaves(request, work, path), done)
    except MeshError as error:
        return failed(error, beside(error))


async def _there(ctx: NodeContext, node: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return {**await call_node(ctx, node, path, body), "node": node}


async def _everywhere(
    ctx: NodeContext, request: Request, path: str, body: dict[str, Any], here: Handler, done: int
) -> Response:
    """Ask every node at once; each one's own answer is told. Who does not have the thing has nothing to do."""
    own = ctx.node_id
    known = ctx.mesh.peers.by_name() if ctx.mesh is not None else {}
    nodes = [own, *(name for name, peer in known.items() if peer.alive and name != own)]

    async def ask(node: str) -> dict[str, Any] | MeshError:
        try:
            return await (here(request, body) if node == own else call_node(ctx, node, path, body))
        except MeshError as error:
            return error

    answers = dict(zip(nodes, await asyncio.gather(*(ask(node) for node in nodes)), strict=True))
    errors = [answer for answer in answers.values() if isinstance(answer, MeshError)]
    if len(errors) < len(nodes):
        errors = [error for error in errors if error.status != 404]
    count = sum(not isinstance(answer, MeshError) for answer in answers.values())
    content = {
        "status": "error" if errors else "ok",
        "message": f"{count} of {len(nodes)} nodes did it",
        "nodes": {n: _said(answer) if isinstance(answer, MeshError) else answer for n, answer in answers.items()},
    }
    return JSONResponse(content, errors[0].status if errors else done)


async def call_node(ctx: NodeContext, node: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Have another node do what an operator asked for there; raise its refusal, or why it cannot be asked."""
    if ctx.mesh is None:
        raise RequestError(f"there is no node '{node}': this one is '{ctx.node_id}' and in no mesh", param="node")
    waits = path == "/admin/prewarm" and body.get("wait", True) is not False
    there = {name: value for name, value in body.items() if name != "node"}
    timeout_s = _ROLLBACK_CALL_S if path == "/admin/rollback-llama" else _CALL_S
    answer = await ctx.mesh.call(node, path, there, timeout_s=None if waits else timeout_s)
    return answer if isinstance(answer, dict) else {"answer": answer}


def failed(error: MeshError, beside: Mapping[str, Any] | None = None) -> Response:
    """Return *error* in llamesh's shape with the usual envelope in it; *beside* adds to it, or replaces the message."""
    status, headers, body = error_response(error)
    content = {"status": "error", "message": error.message, **json.loads(body), **(beside or {})}
    response = JSONResponse(content, status)
    for name, value in headers:
        if name.lower() != b"content-type":
            response.raw_headers.append((name.lower(), value))
    return response


def _said(error: MeshError) -> dict[str, Any]:
    return {"status": "error", "message": error.message, "type": error.type}
