"""``GET /modelFits``: for each model of the cookbook what it takes, where it would go and what would have to go first.

Also the one JSON shape of such an entry, which `llama-mesh fit` prints without a node as well. Needs an inference key;
names of models and figures are in it, command lines and paths are not, except in ``problem`` and ``failure``, which say
what a request for the model is told, too (trap 101).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from mesh.api.context import NodeContext
from mesh.core.estimate import Estimate, Part
from mesh.core.footprint import Footprint
from mesh.engine.memory_report import ModelFit, unplaced

_MIB: Final = 1024 * 1024
#: The parts of an estimate, as ``Estimate`` and every answer name them.
PARTS: Final = ("weights", "kv", "recurrent", "compute", "output", "draft", "projector")


def routes(ctx: NodeContext) -> list[Route]:
    """The one route, for all models or for those of ``?model=NAME``.

    The supervisor looks at the files in a thread, so the answer may take a moment.
    """

    async def model_fits(request: Request) -> JSONResponse:
        wanted = {ctx.supervisor.catalog.resolve(name).key for name in request.query_params.getlist("model")}
        fits = await ctx.supervisor.model_fits()
        names = {view.id: view.model_id for view in ctx.supervisor.instances()}
        entries = [fit_entry(fit, names) for fit in fits if not wanted or fit.key in wanted]
        return JSONResponse({"node_id": ctx.node_id, "models": entries})

    return [Route("/modelFits", model_fits)]


def fit_entry(fit: ModelFit, names: Mapping[str, str]) -> dict[str, Any]:
    """Return *fit* as JSON; *names* are the models of the instances. All memory is in MiB.

    The parts and their ``total`` are the estimate of llama-server's own buffers; ``need_mib`` is what will be charged,
    which may come from elsewhere (``source``) and includes what a process takes besides.
    """
    footprint = fit.footprint
    estimate = None if footprint is None else footprint.estimate
    return {
        "model": fit.model_id,
        "key": fit.key,
        "fit": str(fit.fit),
        "source": None if footprint is None else str(footprint.source),
        "problem": None if footprint is None else footprint.problem,
        "failure": fit.failure,
        "need_mib": _need(footprint),
        "placement_mib": None if fit.placement is None else dict(fit.placement.mib),
        "evict": [{"instance": victim, "model": names.get(victim)} for victim in fit.evict],
        "notes": [] if footprint is None or footprint.problem else list(footprint.notes),
        **(_nothing() if estimate is None else _estimated(estimate)),
    }


def _need(footprint: Footprint | None) -> dict[str, int] | None:
    return None if footprint is None or footprint.problem else dict(unplaced(footprint.need).mib)


def _estimated(estimate: Estimate) -> dict[str, Any]:
    return {
        **{name: _mib(getattr(estimate, name)) for name in PARTS},
        "total": _mib(estimate.total),
        "context": estimate.context,
        "slots": estimate.slots,
    }


def _nothing() -> dict[str, Any]:
    return dict.fromkeys((*PARTS, "total", "context", "slots"))


def _mib(part: Part) -> dict[str, float]:
    return {"gpu": round(part.gpu / _MIB, 3), "cpu": round(part.cpu / _MIB, 3)}
