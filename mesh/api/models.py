"""``/v1/models`` as OpenAI's clients expect it, with llamesh's metadata: the union over the mesh, own models first.

Reads the catalog and what other nodes told; never starts anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from mesh.api.context import NodeContext
from mesh.config.profile import Profile
from mesh.core.lifecycle import State
from mesh.core.load_log import parse_load_log
from mesh.core.node_state import Kind, ProfileState
from mesh.engine.kind import Capability
from mesh.engine.kinds import kind_of
from mesh.errors import UnknownModelError

_LOAD_LOG_LINES: Final = 1000


def routes(ctx: NodeContext) -> list[Route]:
    """The listing and the retrieval of one entry; ids may hold slashes and percent-encoding (trap 78)."""
    parameters = ModelParameters(ctx)

    async def listing(request: Request) -> JSONResponse:
        data = [model_entry(ctx, profile, parameters.of(profile)) for profile in ctx.supervisor.catalog.profiles]
        return JSONResponse({"object": "list", "data": data + peers_entries(ctx)})

    async def retrieve(request: Request) -> JSONResponse:
        name = request.path_params["id"].lstrip("/")
        try:
            profile = find_profile(ctx, name)
        except UnknownModelError:
            if (entry := _entry_elsewhere(ctx, name)) is None:
                raise
            return JSONResponse(entry)
        return JSONResponse(model_entry(ctx, profile, parameters.of(profile)))

    return [Route("/v1/models", listing), Route("/v1/models/{id:path}", retrieve)]


def find_profile(ctx: NodeContext, name: str) -> Profile:
    """Return the profile that is listed as *name*, or that a request for *name* would reach."""
    catalog = ctx.supervisor.catalog
    listed = next((profile for profile in catalog.profiles if profile.id == name), None)
    if listed is not None:
        return listed
    if not name:
        raise UnknownModelError("Model '' not found in local cookbook or any peer", param="model")
    return catalog.resolve(name)


def peers_entries(ctx: NodeContext) -> list[dict[str, Any]]:
    """Return an entry for everything that only other nodes have, by id (trap 80)."""
    if ctx.mesh is None:
        return []
    own = {profile.key for profile in ctx.supervisor.catalog.profiles}
    return [_peers_entry(ctx, state, nodes) for state, nodes in ctx.mesh.peers.profiles() if state.key not in own]


def _entry_elsewhere(ctx: NodeContext, name: str) -> dict[str, Any] | None:
    """Return the entry of what live peers know as *name*; an id may be written differently on each."""
    stand_in = ctx.mesh.peers.profile(name) if ctx.mesh is not None else None
    if ctx.mesh is None or stand_in is None:
        return None
    found = ((state, nodes) for state, nodes in ctx.mesh.peers.profiles() if state.key == stand_in.key)
    return next((_peers_entry(ctx, state, nodes) for state, nodes in found), None)


def _peers_entry(ctx: NodeContext, state: ProfileState, nodes: tuple[str, ...]) -> dict[str, Any]:
    profile = state.key.partition(":")[2]
    return {
        "id": state.id,
        "object": "model",
        "created": int(ctx.started_at_wall),
        "owned_by": nodes[0],
        "permission": [],
        "root": state.id.partition(":")[0],
        "parent": None,
        "metadata": {
            "model": state.id.partition(":")[0],
            "model_description": None,
            "profile_id": profile,
            "profile_description": state.description or None,
            "idle_timeout_seconds": None,
            "estimated_tokens_per_second": state.decode_tps or 0.0,
            "parsed_model_params": None,
            "aliases": list(state.aliases),
            "capabilities": _told_capabilities(state),
            "nodes": list(nodes),
        },
    }


def _nodes_with(ctx: NodeContext, profile: Profile) -> list[str]:
    """Return the nodes that have *profile*, this one first."""
    others = [] if ctx.mesh is None else [peer.node_id for peer in ctx.mesh.peers.holders(profile.key)]
    return [ctx.node_id, *others]


def model_entry(ctx: NodeContext, profile: Profile, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return llamesh's entry. ``created`` is the node's start: stable while it runs (trap 80)."""
    return {
        "id": profile.id,
        "object": "model",
        "created": int(ctx.started_at_wall),
        "owned_by": ctx.node_id,
        "permission": [],
        "root": profile.model,
        "parent": None,
        "metadata": {
            "model": profile.model,
            "model_description": profile.model_description,
            "profile_id": profile.profile,
            "profile_description": profile.description,
            "idle_timeout_seconds": int(profile.idle_timeout_s),
            "estimated_tokens_per_second": _tokens_per_second(ctx, profile),
            "parsed_model_params": parameters,
            "aliases": list(profile.aliases),
            "capabilities": _capabilities(profile),
            "nodes": _nodes_with(ctx, profile),
        },
    }


def _capabilities(profile: Profile) -> list[str]:
    """Return what it can do, in words; what every model can goes without saying."""
    return sorted(can.value for can in kind_of(profile).capabilities(profile) if can is not Capability.ANY)


def _told_capabilities(state: ProfileState) -> list[str]:
    """Return the same of what a peer told."""
    return sorted({state.kind, Kind.AUDIO.value}) if state.multimodal else [state.kind]


def _tokens_per_second(ctx: NodeContext, profile: Profile) -> float:
    """Over the whole life of these arguments, restarts included."""
    state = ctx.metrics.hash(profile.args_hash).state()
    return state.tokens_generated_total * 1000 / state.total_latency_ms if state.total_latency_ms else 0.0


class ModelParameters:
    """What llama-server said about each model when it loaded, kept per arguments with the metrics."""

    def __init__(self, ctx: NodeContext) -> None:
        self._ctx = ctx
        self._read: set[str] = set()  # instances whose output was parsed: it says it once

    def of(self, profile: Profile) -> Mapping[str, Any] | None:
        """Return the 19 parameters, or None if no instance of this engine version has told them yet."""
        self._learn(profile)
        stored = self._ctx.metrics.hash(profile.args_hash).parsed_model_params
        if not isinstance(stored, dict) or not isinstance(stored.get("params"), dict):
            return None
        told_by, current = stored.get("llama_cpp_version"), self._version(profile)
        outdated = told_by is not None and current is not None and told_by != current
        return None if outdated else stored["params"]

    def _version(self, profile: Profile) -> str | None:
        """Return which engine runs *profile* now, or would; None if that is not known."""
        views = [v for v in self._ctx.supervisor.instances() if v.key == profile.key and v.state is State.READY]
        if views:
            return min(views, key=lambda v: v.superseded).engine_version
        return self._ctx.engine_version() if profile.engine_build is None else None

    def _learn(self, profile: Profile) -> None:
        """Parse the output of a ready instance, the first time that it is seen."""
        live = {view.id: view for view in self._ctx.supervisor.instances()}
        self._read &= live.keys()
        for instance_id, ring in self._ctx.supervisor.log_ring(profile.key):
            view = live.get(instance_id)
            if view is None or view.stale or view.state is not State.READY or instance_id in self._read:
                continue
            self._read.add(instance_id)
            if params := parse_load_log(ring.tail(_LOAD_LOG_LINES)):
                known = {"params": params, "llama_cpp_version": view.engine_version}
                self._ctx.metrics.hash(profile.args_hash).parsed_model_params = known
