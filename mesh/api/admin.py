"""``/admin/*``: start, stop and look at instances. Every route needs an admin key when auth is on.

Prewarm and unload answer in llamesh's shape (``status``, ``message``); failures carry the usual envelope beside it.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mesh.api.access import peer_of
from mesh.api.budget import budget_entry, memory_entry
from mesh.api.context import InstanceView, NodeContext
from mesh.api.elsewhere import call_node, here_or_there
from mesh.api.log_stream import LogStream
from mesh.api.request_scope import flag_of
from mesh.core.resources import Resources
from mesh.engine.memory_report import Holder
from mesh.errors import DrainedError, DrainingError, NoNodeError, RequestError, UnknownModelError
from mesh.logs import Log

_log = Log(__name__)

_MAX_TAIL_LINES: Final = 10_000


def routes(ctx: NodeContext) -> list[Route]:
    """All admin routes."""
    admin = _Admin(ctx)
    return [
        Route("/admin/prewarm", admin.prewarm, methods=["POST"]),
        Route("/admin/unload", admin.unload, methods=["POST"]),
        Route("/admin/drain", admin.drain, methods=["POST"]),
        Route("/admin/undrain", admin.undrain, methods=["POST"]),
        Route("/admin/instances", admin.instances),
        Route("/admin/budget", admin.budget),
        Route("/admin/logs", admin.logs),
    ]


class _Admin:
    def __init__(self, ctx: NodeContext) -> None:
        self._ctx = ctx

    async def prewarm(self, request: Request) -> Response:
        """Load a model; by default answer once it is ready. A client that leaves stops waiting, not the load."""
        return await here_or_there(self._ctx, request, "/admin/prewarm", self._prewarm)

    async def _prewarm(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        if self._ctx.draining:
            raise DrainingError("Node is draining for shutdown")
        if self._ctx.drained:
            raise DrainedError()
        name = _model_of(body)
        if "node" not in body and (node := self._only_elsewhere(request, name)) is not None:
            return {**await call_node(self._ctx, node, "/admin/prewarm", body), "node": node}
        profile = self._resolve(name)
        wait, timeout_s = flag_of(body, "wait", True), _seconds(body, "timeout_s")
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        view = await self._ctx.supervisor.prewarm(profile, wait=wait, deadline=deadline)
        instance = None if view is None else instance_entry(view, self._holder(view.id))
        return {"status": "ok", "message": "Model prewarmed", "instance": instance}

    def _only_elsewhere(self, request: Request, name: str) -> str | None:
        """Return the node that should load what only others have; None if it is for this one."""
        if self._ctx.mesh is None or peer_of(request.scope) is not None:
            return None
        if name.lower() in self._ctx.supervisor.catalog.names:
            return None
        profile, ranked = self._ctx.mesh.explain(name, prompt_tokens=0, max_tokens=1)
        best = next((entry.candidate for entry in ranked if entry.excluded is None), None)
        if best is None:
            raise NoNodeError(f"no node that has '{profile.id}' can load it now")
        return best.node_id

    async def unload(self, request: Request) -> Response:
        """Drain the instances of one model, or of all: each ends once its requests have."""
        return await here_or_there(self._ctx, request, "/admin/unload", self._unload)

    async def _unload(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        key = None if flag_of(body, "all", False) else self._running_key(_model_of(body))
        count = self._ctx.supervisor.unload(key)
        message = f"{count} instance{'' if count == 1 else 's'} told to stop"
        return {"status": "ok", "message": message, "unloaded": count}

    async def drain(self, request: Request) -> Response:
        """Take a node out of rotation: what runs and waits is served, new work goes elsewhere or gets 503."""
        return await here_or_there(self._ctx, request, "/admin/drain", self._drain)

    async def _drain(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        unload = flag_of(body, "unload", False)
        if not self._ctx.drained:
            self._ctx.drained = True
            _log.info("drained by an operator: no new work until /admin/undrain", unload=unload)
        unloaded = self._ctx.supervisor.unload(None) if unload else 0
        active = self._ctx.metrics.current_requests
        message = f"{self._ctx.node_id} takes no new work; {active} requests are still served"
        return {"status": "ok", "message": message, "drained": True, "active": active, "unloaded": unloaded}

    async def undrain(self, request: Request) -> Response:
        """Let a node work again."""
        return await here_or_there(self._ctx, request, "/admin/undrain", self._undrain)

    async def _undrain(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        if self._ctx.draining:
            raise DrainingError("Node is draining for shutdown")
        if self._ctx.drained:
            self._ctx.drained = False
            _log.info("undrained by an operator: takes work again")
        return {"status": "ok", "message": f"{self._ctx.node_id} takes new work", "drained": False}

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
        "engine": {"version": view.engine_version, "build": view.engine_build, "path": view.engine_path},
        "superseded": view.superseded,
    }


def _memory(resources: Resources) -> dict[str, int]:
    return dict(resources.mib)


def _model_of(body: dict[str, Any]) -> str:
    model = body.get("model")
    if model is None:
        raise RequestError("Missing model field", param="model")
    if not isinstance(model, str) or not model:
        raise RequestError("'model' must be a non-empty string", param="model")
    return model


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
