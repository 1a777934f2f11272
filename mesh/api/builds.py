"""``/admin/rebuild-llama`` and its kin: build llama.cpp anew, go back, stop it, and see what is going on.

The rebuild answers as llamesh does (202 or 409, with the state from before it); attempts and versions are told with the
field names of ``mesh.build.status``, here and in the events. A node without builds takes a rebuild and does nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mesh.api.access import peer_of
from mesh.api.build_stream import BuildStream
from mesh.api.context import BuildsView, NodeContext
from mesh.api.elsewhere import here_or_there
from mesh.api.request_scope import flag_of, text_of
from mesh.build.status import Attempt, BuildStatus, Outcome, Summary
from mesh.config.builds import DEFAULT_BUILD
from mesh.errors import BuildBusyError, DrainingError, MeshError, RequestError, UnknownBuildError
from mesh.logs import Log
from mesh.metrics import Metrics
from mesh.tasks import rfc3339, wall_time

_log = Log(__name__)

_REBUILD: Final = "/admin/rebuild-llama"
#: What git could take for an option, and what no ref can hold; whether there is such a ref, the build itself finds out.
_REF: Final = re.compile(r"[^\s\x00-\x1f\x7f~^:?*\[\\-][^\s\x00-\x1f\x7f~^:?*\[\\]{0,199}")
#: Attempts that built nothing; their seconds say nothing about a build.
_QUICK: Final = frozenset({Outcome.UNCHANGED, Outcome.SKIPPED, Outcome.DISABLED})


def routes(ctx: NodeContext) -> list[Route]:
    """All of them need an admin key when auth is on; the POSTs may also come from members of the mesh."""
    builds = _Builds(ctx)
    return [
        Route(_REBUILD, builds.rebuild, methods=["POST"]),
        Route(_REBUILD + "/cancel", builds.cancel, methods=["POST"]),
        Route("/admin/rollback-llama", builds.rollback, methods=["POST"]),
        Route("/admin/builds", builds.here),
        Route("/admin/builds", builds.anywhere, methods=["POST"]),
        Route("/admin/builds/events", builds.events),
    ]


class ForeignRefError(RequestError):
    """Another node names the code to be compiled and run here; one bad member would have all machines."""

    status = 403
    type = "permission_error"


class _Builds:
    def __init__(self, ctx: NodeContext) -> None:
        self._ctx = ctx

    async def rebuild(self, request: Request) -> Response:
        """Start a build in the background."""
        return await here_or_there(
            self._ctx, request, _REBUILD, self._rebuild, done=202, bodiless=True, beside=self._beside_refusal
        )

    async def _rebuild(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        if self._ctx.draining:
            raise DrainingError("Node is draining for shutdown")
        name, ref, force = text_of(body, "build"), _ref_of(body), flag_of(body, "force", False)
        if ref is not None and peer_of(request.scope) is not None:
            raise ForeignRefError(
                f"what is built on node '{self._ctx.node_id}' is not for other nodes to choose: leave out 'branch', or "
                f"run 'llama-mesh rebuild --branch {ref}' on that node, or set llama_cpp.branch there",
                param="branch",
            )
        builds, before = self._ctx.builds, self._build_status()
        attempt = None
        if builds is not None:
            attempt = builds.rebuild(name, ref=ref, force=force)
            _log.info("a rebuild was asked for", build=attempt.build, attempt=attempt.id, ref=ref, force=force)
        return {
            "status": "accepted",
            "message": "Rebuild triggered in background",
            "build_status": before,
            "attempt": None if attempt is None else as_json(attempt),
        }

    def _beside_refusal(self, error: MeshError) -> Mapping[str, Any]:
        if not isinstance(error, BuildBusyError):
            return {}
        return {"message": "Rebuild already in progress", "build_status": self._build_status()}

    async def cancel(self, request: Request) -> Response:
        """Stop a build; what ran before runs on."""
        return await here_or_there(self._ctx, request, _REBUILD + "/cancel", self._cancel, bodiless=True)

    async def _cancel(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        name = text_of(body, "build") or DEFAULT_BUILD
        builds = self._ctx.builds
        stopped = builds is not None and builds.cancel(name)
        message = f"the rebuild of {name} was told to stop" if stopped else f"no rebuild of {name} is in progress"
        return {"status": "ok", "message": message, "cancelled": stopped}

    async def rollback(self, request: Request) -> Response:
        """Let a build be again what it was before; answers when it is."""
        return await here_or_there(self._ctx, request, "/admin/rollback-llama", self._rollback, bodiless=True)

    async def _rollback(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        name = text_of(body, "build") or DEFAULT_BUILD
        if self._ctx.draining:
            raise DrainingError("Node is draining for shutdown")
        if self._ctx.builds is None:
            raise UnknownBuildError(f"this node builds nothing, so there is nothing to go back to: {name}")
        version = await self._ctx.builds.rollback(name)
        _log.info("rolled back", build=name, commit=version.commit, directory=version.directory)
        return {"status": "ok", "message": f"{name} is back at {version.commit}", "version": as_json(version)}

    async def here(self, request: Request) -> Response:
        """Everything that `llama-mesh builds` shows."""
        return JSONResponse(self._told(self._statuses()))

    async def anywhere(self, request: Request) -> Response:
        """The same of another node, or of every one: what is asked on links has a body."""
        return await here_or_there(self._ctx, request, "/admin/builds", self._told_on_a_link, bodiless=True)

    async def _told_on_a_link(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        return self._told(self._statuses())

    async def events(self, request: Request) -> Response:
        """What happens from now on, after a picture of what is, as server-sent events; ``build`` filters."""
        name = request.query_params.get("build") or None
        if name is not None and all(status.name != name for status in self._statuses()):
            raise UnknownBuildError(f"there is no build '{name}'", param="build")
        snapshot = lambda: self._told([s for s in self._statuses() if name in (None, s.name)])  # noqa: E731
        return BuildStream(self._ctx, name, snapshot, follow=request.method == "GET")

    def _told(self, statuses: list[BuildStatus]) -> dict[str, Any]:
        return {
            "node_id": self._ctx.node_id,
            "started_at_wall": self._ctx.started_at_wall,  # ids of attempts begin anew with the node
            "now_wall": wall_time(),  # what is so many seconds ago for the clock that stamped it
            "build_status": self._build_status(),
            "builds": [as_json(status) for status in statuses],
        }

    def _statuses(self) -> list[BuildStatus]:
        return [] if self._ctx.builds is None else list(self._ctx.builds.statuses())

    def _build_status(self) -> dict[str, Any]:
        """Return all builds together, as llamesh tells it."""
        summary = Summary() if self._ctx.builds is None else self._ctx.builds.summary()
        return {
            "is_building": summary.is_building,
            "last_build_error": summary.last_build_error,
            "last_build_at": rfc3339(summary.last_build_at_wall),
        }


def as_json(value: Any) -> Any:
    """Return one of the values of ``mesh.build.status`` as JSON has it, by its field names."""
    return msgspec.to_builtins(value)


def _ref_of(body: dict[str, Any]) -> str | None:
    ref = text_of(body, "branch")
    if ref is not None and not _REF.fullmatch(ref):
        raise RequestError("'branch' must be a branch, a tag or a commit", param="branch")
    return ref


async def count_builds(builds: BuildsView, metrics: Metrics) -> None:
    """Count every attempt that ends, until cancelled."""
    subscription = builds.subscribe()
    try:
        async for event in subscription:
            if event.kind == "ended":
                ended = msgspec.convert(event.data["attempt_state"], Attempt)
                _count(metrics, ended)
    finally:
        subscription.close()


def _count(metrics: Metrics, ended: Attempt) -> None:
    if ended.outcome is None or ended.ended_at_wall is None:
        return
    seconds = max(0.0, ended.ended_at_wall - ended.started_at_wall)
    metrics.build_ended(ended.build, ended.outcome, duration_s=None if ended.outcome in _QUICK else seconds)
