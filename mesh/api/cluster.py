"""``/cluster/nodes``: what this node knows of every node, itself included. Without a mesh that is itself."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from mesh import __version__
from mesh.api.context import NodeContext
from mesh.core.lifecycle import State
from mesh.core.resources import RAM, VRAM


def routes(ctx: NodeContext) -> list[Route]:
    """The one route; never public, since it tells what can be reached where."""

    async def nodes(request: Request) -> JSONResponse:
        return JSONResponse({"nodes": {ctx.node_id: own_state(ctx)}})

    return [Route("/cluster/nodes", nodes)]


def own_state(ctx: NodeContext) -> dict[str, Any]:
    """Return this node's record. No key, token or command line is in it (trap 101)."""
    budget = ctx.supervisor.budget()
    instances = ctx.supervisor.instances()
    profiles = ctx.supervisor.catalog.profiles
    return {
        "node_id": ctx.node_id,
        "address": ctx.settings.public_url or ctx.settings.listen_addr,
        "version": __version__,
        "llama_cpp_version": ctx.engine_version(),
        "started_at_unix": int(ctx.started_at_wall),
        "ready": not ctx.draining and ctx.engine_problem() is None and bool(profiles),
        "draining": ctx.draining,
        "supported_models": [profile.id for profile in profiles],
        "loaded_models": sorted({view.model_id for view in instances if view.state is State.READY}),
        "active_instances": len(instances),
        "current_requests": ctx.metrics.current_requests,
        "queue_length": sum(ctx.supervisor.queues().values()),
        "llamesh_vram_mb": budget.used.mib.get(VRAM, 0),
        "llamesh_sysmem_mb": budget.used.mib.get(RAM, 0),
        "max_vram_mb": budget.capacity.mib.get(VRAM),
        "max_sysmem_mb": budget.capacity.mib.get(RAM),
    }
