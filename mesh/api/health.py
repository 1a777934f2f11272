"""Liveness, readiness and version. Answered from memory: nothing is probed while a client waits (trap 98)."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from mesh import __version__
from mesh.api.access import authorised
from mesh.api.context import NodeContext


def routes(ctx: NodeContext) -> list[Route]:
    """The public routes; ``/health`` is where llama.cpp's clients look."""

    async def healthz(request: Request) -> JSONResponse:
        problem = _no_models(ctx) or ctx.engine_problem()
        return JSONResponse({"status": "error", "message": problem}, 503) if problem else JSONResponse({"status": "ok"})

    async def readyz(request: Request) -> JSONResponse:
        if ctx.draining:
            return JSONResponse({"status": "draining", "message": "Node is draining"}, 503)
        if problem := ctx.engine_problem() or _no_models(ctx):
            return JSONResponse({"status": "not_ready", "message": problem}, 503)
        return JSONResponse({"status": "ready", "can_spawn": can_spawn(ctx)})

    async def version(request: Request) -> JSONResponse:
        known = {"version": __version__}
        if authorised(ctx.authenticator, request.scope["headers"]) and (engine := ctx.engine_version()):
            known["llama_cpp_version"] = engine
        return JSONResponse(known)

    return [
        Route("/health", healthz),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/version", version),
    ]


def can_spawn(ctx: NodeContext) -> bool:
    """Whether some memory of every limited kind is left."""
    budget = ctx.supervisor.budget()
    return all(budget.used.mib.get(kind, 0) < limit for kind, limit in budget.capacity.mib.items())


def _no_models(ctx: NodeContext) -> str | None:
    return None if ctx.supervisor.catalog.profiles else "No models configured"
