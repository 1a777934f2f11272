"""The other nodes: what is known of them, what they say, who would serve what, and taking this node out of rotation."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mesh import __version__
from mesh.api.access import GOSSIP_PATH, peer_of
from mesh.api.context import NodeContext
from mesh.api.request_scope import binary_body
from mesh.core.lifecycle import State
from mesh.core.resources import RAM, VRAM
from mesh.core.routing import Ranked
from mesh.errors import RequestError
from mesh.net.peer import Peer

#: Assumed of a question that does not say: the median prompt of published traces.
_USUAL_PROMPT_TOKENS = 1000


def routes(ctx: NodeContext) -> list[Route]:
    """Never public, since they tell what can be reached where; gossip only on links."""

    async def nodes(request: Request) -> JSONResponse:
        peers = ctx.mesh.peers.by_name() if ctx.mesh is not None else {}
        known = {name: peer_state(peer) for name, peer in peers.items()}
        return JSONResponse({"nodes": {**known, ctx.node_id: own_state(ctx)}})

    async def gossip(request: Request) -> Response:
        peer = peer_of(request.scope)
        assert peer is not None, "the access layer lets nobody else pass"
        if ctx.mesh is None:
            raise RequestError("this node is in no mesh")
        body = await binary_body(request, ctx.mesh.largest_message_bytes)
        return Response(ctx.mesh.gossip(peer, body), media_type="application/msgpack")

    async def route(request: Request) -> JSONResponse:
        name = request.query_params.get("model") or None
        prompt_tokens = _count(request, "prompt_tokens", _USUAL_PROMPT_TOKENS)
        max_tokens = _count(request, "max_tokens", None)
        return JSONResponse(_explained(ctx, name, prompt_tokens or 0, max_tokens))

    return [
        Route("/cluster/nodes", nodes),
        Route(GOSSIP_PATH, gossip, methods=["POST"]),
        Route("/admin/route", route),
    ]


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
        "ready": not (ctx.draining or ctx.drained) and ctx.engine_problem() is None and bool(profiles),
        "draining": ctx.draining or ctx.drained,
        "supported_models": [profile.id for profile in profiles],
        "loaded_models": sorted({v.model_id for v in instances if v.state is State.READY and not v.hidden}),
        "active_instances": len(instances),
        "current_requests": ctx.metrics.current_requests,
        "queue_length": sum(ctx.supervisor.queues().values()),
        "llamesh_vram_mb": budget.used.mib.get(VRAM, 0),
        "llamesh_sysmem_mb": budget.used.mib.get(RAM, 0),
        "max_vram_mb": budget.capacity.mib.get(VRAM),
        "max_sysmem_mb": budget.capacity.mib.get(RAM),
        "self": True,
        "status": "alive",
        "fingerprint": ctx.mesh.own_fingerprint if ctx.mesh is not None else None,
    }


def peer_state(peer: Peer) -> dict[str, Any]:
    """Return what is known of another node, in the same shape, and how well it can be reached from here."""
    state = peer.state
    return {
        "node_id": peer.node_id,
        "address": peer.good_address or next(iter(state.addresses), state.public_url),
        "version": state.version,
        "llama_cpp_version": state.engine_version or None,
        "started_at_unix": state.started_at_unix,
        "ready": peer.alive and state.ready and not peer.draining and peer.rejected is None and bool(state.profiles),
        "draining": peer.draining,
        "supported_models": [profile.id for profile in state.profiles],
        "loaded_models": sorted(profile.id for profile in state.profiles if profile.ready),
        "active_instances": sum(profile.ready + profile.loading for profile in state.profiles),
        "current_requests": state.current_requests,
        "queue_length": state.queue_length,
        "llamesh_vram_mb": state.used_mib.get(VRAM, 0),
        "llamesh_sysmem_mb": state.used_mib.get(RAM, 0),
        "max_vram_mb": state.capacity_mib.get(VRAM),
        "max_sysmem_mb": state.capacity_mib.get(RAM),
        "self": False,
        "status": peer.status,
        "fingerprint": peer.fingerprint,
        "circuit": str(peer.breaker.phase),
        "rejected": peer.rejected,
        "rtt_ms": None if peer.rtt_s is None else round(peer.rtt_s * 1000, 2),
        "record_age_s": round(peer.age_s, 1),
        "forwards_in_flight": sum(peer.forwards.values()),
        "forwards_total": peer.forwards_total,
        "forward_failures_total": peer.failures_total,
        "forward_refusals_total": peer.refusals_total,
    }


def _explained(ctx: NodeContext, name: str | None, prompt_tokens: int, max_tokens: int | None) -> dict[str, Any]:
    """Return who would serve a request for *name* now, soonest first, and why."""
    if ctx.mesh is not None:
        profile, ranked = ctx.mesh.explain(name, prompt_tokens=prompt_tokens, max_tokens=max_tokens)
        candidates = [_candidate(entry) for entry in ranked]
    else:
        profile = ctx.supervisor.catalog.resolve(name)
        reasons = ["this node is in no mesh, so it serves everything itself"]
        candidates = [
            {"node": ctx.node_id, "self": True, "cost_s": 0.0, "terms_s": {}, "excluded": None, "reasons": reasons}
        ]
    return {
        "model": profile.id,
        "node_id": ctx.node_id,
        "assumed": {"prompt_tokens": prompt_tokens, "max_tokens": max_tokens},
        "candidates": candidates,
    }


def _candidate(ranked: Ranked) -> dict[str, Any]:
    return {
        "node": ranked.candidate.node_id,
        "self": ranked.candidate.local,
        "cost_s": None if ranked.excluded is not None else round(ranked.cost, 4),
        "terms_s": {name: round(seconds, 4) for name, seconds in ranked.terms.items()},
        "excluded": ranked.excluded,
        "reasons": list(ranked.reasons),
    }


def _count(request: Request, name: str, default: int | None) -> int | None:
    value = request.query_params.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit()) or len(value) > 9:
        raise RequestError(f"'{name}' must be a number of tokens", param=name)
    return int(value)
