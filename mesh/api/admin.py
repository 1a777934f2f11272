"""``/admin/*``: start, stop and look at instances. Every route needs an admin key when auth is on.

Prewarm and unload answer in llamesh's shape (``status``, ``message``); failures carry the usual envelope beside it.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mesh.api.budget import budget_entry, memory_entry
from mesh.api.context import InstanceView, NodeContext
from mesh.api.log_stream import LogStream
from mesh.api.request_scope import json_object, unless_client_leaves
from mesh.api.responses import error_response
from mesh.core.resources import Resources
from mesh.engine.memory_report import Holder
from mesh.errors import DrainingError, MeshError, RequestError, UnknownModelError

_MAX_TAIL_LINES: Final = 10_000


def routes(ctx: NodeContext) -> list[Route]:
    """All admin routes."""
    admin = _Admin(ctx)
    return [
        Route("/admin/prewarm", admin.prewarm, methods=["POST"]),
        Route("/admin/unload", admin.unload, methods=["POST"]),
        Route("/admin/instances", admin.instances),
        Route("/admin/budget", admin.budget),
        Route("/admin/logs", admin.logs),
    ]


class _Admin:
    def __init__(self, ctx: NodeContext) -> None:
        self._ctx = ctx

    async def prewarm(self, request: Request) -> Response:
        """Load a model; by default answer once it is ready. A client that leaves stops waiting, not the load."""
        try:
            body = await self._body(request)
            if self._ctx.draining:
                raise DrainingError("Node is draining for shutdown")
            profile = self._resolve(_model_of(body))
            wait, timeout_s = _flag(body, "wait", True), _seconds(body, "timeout_s")
            deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
            work = self._ctx.supervisor.prewarm(profile, wait=wait, deadline=deadline)
            view = await unless_client_leaves(request, work, f"prewarm {profile.key}")
        except MeshError as error:
            return _failed(error)
        instance = None if view is None else instance_entry(view, self._holder(view.id))
        return JSONResponse({"status": "ok", "message": "Model prewarmed", "instance": instance})

    async def unload(self, request: Request) -> Response:
        """Drain the instances of one model, or of all: each ends once its requests have."""
        try:
            body = await self._body(request)
            key = None if _flag(body, "all", False) else self._running_key(_model_of(body))
        except MeshError as error:
            return _failed(error)
        count = self._ctx.supervisor.unload(key)
        message = f"{count} instance{'' if count == 1 else 's'} told to stop"
        return JSONResponse({"status": "ok", "message": message, "unloaded": count})

    async def instances(self, request: Request) -> Response:
        """Everything that `llama-mesh ps` shows."""
        supervisor = self._ctx.supervisor
        budget, report = supervisor.budget(), supervisor.memory_report()
        holders = {holder.instance: holder for holder in report.holders}
        return JSONResponse(
            {
                "node_id": self._ctx.node_id,
                "draining": self._ctx.draining,
                "instances": [instance_entry(view, holders.get(view.id)) for view in supervisor.instances()],
                "queues": dict(supervisor.queues()),
                "budget": {
                    "capacity": _memory(budget.capacity),
                    "used": _memory(budget.used),
                    "memory": memory_entry(report),
                },
                "failures": {
                    key: {
                        "reason": failure.reason,
                        "count": failure.count,
                        "retry_in_s": failure.retry_in_s,
                        "log_tail": list(failure.log_tail),
                    }
                    for key, failure in supervisor.failures().items()
                },
            }
        )

    async def budget(self, request: Request) -> Response:
        """Every kind of memory: what there is, who holds it, and what the machine itself says."""
        return JSONResponse({"node_id": self._ctx.node_id, **budget_entry(self._ctx.supervisor.memory_report())})

    async def logs(self, request: Request) -> Response:
        """The last output lines of a model's instances, and with ``follow=true`` those to come."""
        key = self._running_key(request.query_params.get("model") or None)
        follow = _query_flag(request, "follow") and request.method == "GET"
        return LogStream(self._ctx, key, tail=_query_count(request, "lines", 200), follow=follow)

    def _holder(self, instance: str) -> Holder | None:
        holders = self._ctx.supervisor.memory_report().holders
        return next((holder for holder in holders if holder.instance == instance), None)

    async def _body(self, request: Request) -> dict[str, Any]:
        return await json_object(request, timeout_s=self._ctx.settings.http.body_read_timeout_ms / 1000)

    def _resolve(self, name: str) -> Any:
        try:
            return self._ctx.supervisor.catalog.resolve(name)
        except UnknownModelError as error:
            raise UnknownModelError("Model not found", param="model") from error

    def _running_key(self, name: str | None) -> str:
        """Return the key of a model of the cookbook, or of one that left it and still has an instance."""
        if name is None:
            raise RequestError("Missing model field", param="model")
        for view in self._ctx.supervisor.instances():
            if name.lower() in (view.key, view.model_id.lower()):
                return view.key
        key: str = self._resolve(name).key
        return key


def instance_entry(view: InstanceView, holder: Holder | None = None) -> dict[str, Any]:
    """Return one instance as JSON; *holder* knows what it really uses, and where the figure it is charged is from."""
    live = None if holder is None or holder.live is None else _memory(holder.live)
    return {
        "id": view.id,
        "key": view.key,
        "model_id": view.model_id,
        "state": str(view.state),
        "pid": view.pid,
        "port": view.port,
        "slots": view.slots,
        "active": view.active,
        "busy": view.busy,
        "ready_at_wall": view.ready_at_wall,
        "started_at_wall": view.started_at_wall,
        "last_used_s_ago": view.last_used_s_ago,
        "memory": _memory(view.memory),
        "live": live,
        "source": str(holder.source) if holder is not None and holder.source is not None else None,
        "command": list(view.command),
        "stale": view.stale,
    }


def _memory(resources: Resources) -> dict[str, int]:
    return dict(resources.mib)


def _failed(error: MeshError) -> Response:
    status, headers, body = error_response(error)
    content = {"status": "error", "message": error.message, **json.loads(body)}
    response = JSONResponse(content, status)
    for name, value in headers:
        if name.lower() != b"content-type":
            response.raw_headers.append((name.lower(), value))
    return response


def _model_of(body: dict[str, Any]) -> str:
    model = body.get("model")
    if model is None:
        raise RequestError("Missing model field", param="model")
    if not isinstance(model, str) or not model:
        raise RequestError("'model' must be a non-empty string", param="model")
    return model


def _flag(body: dict[str, Any], name: str, default: bool) -> bool:
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise RequestError(f"'{name}' must be true or false", param=name)
    return value


def _seconds(body: dict[str, Any], name: str) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e7:
        raise RequestError(f"'{name}' must be a positive number of seconds", param=name)
    return float(value)


def _query_flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false").lower()
    if value not in ("true", "false", "1", "0"):
        raise RequestError(f"'{name}' must be true or false", param=name)
    return value in ("true", "1")


def _query_count(request: Request, name: str, default: int) -> int:
    value = request.query_params.get(name, str(default))
    if not (value.isascii() and value.isdigit()) or int(value) > _MAX_TAIL_LINES:
        raise RequestError(f"'{name}' must be a number from 0 to {_MAX_TAIL_LINES}", param=name)
    return int(value)
