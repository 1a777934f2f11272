"""GET /modelFits: what each model takes and what would have to go."""

from __future__ import annotations

from mesh.core.estimate import Estimate, Part
from mesh.core.footprint import Footprint, Source
from mesh.core.placement import Need
from mesh.core.resources import Resources
from mesh.engine.memory_report import Fit, ModelFit
from tests.api.asgi import request
from tests.api.node import AUTH, Node
from tests.fakes_supervisor import FakeInstance

MIB = 1024 * 1024
ESTIMATE = Estimate(
    weights=Part(gpu=90 * MIB, cpu=28 * MIB),
    kv=Part(gpu=11 * MIB + MIB // 2),
    recurrent=Part(),
    compute=Part(gpu=97 * MIB, cpu=5 * MIB),
    output=Part(cpu=MIB // 4),
    draft=Part(),
    projector=Part(),
    largest_layer_bytes=3 * MIB,
    context=8192,
    slots=4,
    notes=("an unknown architecture: a guess",),
)
NEED = Need(Resources({"ram": 370}), split_mib=105, each_mib=600)


def node() -> Node:
    node = Node(auth=AUTH)
    node.supervisor.views = [FakeInstance("i-7", "org/big model:long", "org/Big Model:long")]
    placed = Resources({"gpu1": 705, "vram": 705, "ram": 370})
    footprint = Footprint(NEED, Source.ESTIMATED, ESTIMATE, notes=ESTIMATE.notes)
    node.supervisor.fits = (
        ModelFit("smol:default", "Smol", Fit.AFTER_EVICTION, footprint, placed, ("i-7", "i-8")),
        ModelFit("org/big model:long", "org/Big Model:long", Fit.LOADED),
    )
    return node


async def test_every_model_with_its_parts_in_mib() -> None:
    answer = await request(node().app, "GET", "/modelFits", headers={"x-api-key": "user-key"})
    assert answer.status == 200
    smol, big = answer.json["models"]
    assert smol == {
        "model": "Smol",
        "key": "smol:default",
        "fit": "after_eviction",
        "source": "estimated",
        "problem": None,
        "failure": None,
        "need_mib": {"ram": 370, "vram": 705},
        "placement_mib": {"gpu1": 705, "vram": 705, "ram": 370},
        "evict": [{"instance": "i-7", "model": "org/Big Model:long"}, {"instance": "i-8", "model": None}],
        "weights": {"gpu": 90.0, "cpu": 28.0},
        "kv": {"gpu": 11.5, "cpu": 0.0},
        "recurrent": {"gpu": 0.0, "cpu": 0.0},
        "compute": {"gpu": 97.0, "cpu": 5.0},
        "output": {"gpu": 0.0, "cpu": 0.25},
        "draft": {"gpu": 0.0, "cpu": 0.0},
        "projector": {"gpu": 0.0, "cpu": 0.0},
        "total": {"gpu": 198.5, "cpu": 33.25},
        "context": 8192,
        "slots": 4,
        "notes": ["an unknown architecture: a guess"],
    }
    assert big.keys() == smol.keys()
    assert (big["fit"], big["source"], big["need_mib"], big["kv"], big["total"]) == ("loaded", None, None, None, None)


async def test_a_problem_has_no_figures() -> None:
    """A file that is not there must not look like a model that needs nothing."""
    broken = node()
    footprint = Footprint(Need(), Source.UNKNOWN, problem="there is no such file: /m/x.gguf", notes=("a guess",))
    broken.supervisor.fits = (ModelFit("smol:default", "Smol", Fit.UNKNOWN, footprint),)
    answer = await request(broken.app, "GET", "/modelFits", headers={"x-api-key": "user-key"})
    (entry,) = answer.json["models"]
    assert (entry["problem"], entry["need_mib"], entry["notes"]) == ("there is no such file: /m/x.gguf", None, [])


async def test_why_the_last_start_failed_is_told() -> None:
    """Figures alone would say that it fits, and every request for it is refused."""
    failing = node()
    footprint = Footprint(NEED, Source.ESTIMATED, ESTIMATE)
    failing.supervisor.fits = (ModelFit("smol:default", "Smol", Fit.NOW, footprint, failure="invalid argument: -x"),)
    answer = await request(failing.app, "GET", "/modelFits", headers={"x-api-key": "user-key"})
    (entry,) = answer.json["models"]
    assert (entry["fit"], entry["failure"]) == ("now", "invalid argument: -x")


async def test_only_the_models_asked_for_by_any_name() -> None:
    path = "/modelFits?model=GPT-4o"  # an alias
    answer = await request(node().app, "GET", path, headers={"x-api-key": "user-key"})
    assert [entry["model"] for entry in answer.json["models"]] == ["Smol"]
    path = "/modelFits?model=smol&model=org/Big%20Model:long"
    answer = await request(node().app, "GET", path, headers={"x-api-key": "user-key"})
    assert len(answer.json["models"]) == 2


async def test_an_unknown_name_is_a_404_that_helps() -> None:
    answer = await request(node().app, "GET", "/modelFits?model=smoll", headers={"x-api-key": "user-key"})
    assert (answer.status, answer.json["error"]["type"]) == (404, "model_not_found")
    assert "did you mean 'Smol'" in answer.json["error"]["message"]


async def test_it_needs_a_key_and_only_answers_get() -> None:
    """trap 99"""
    assert (await request(node().app, "GET", "/modelFits")).status == 401
    answer = await request(node().app, "POST", "/modelFits", headers={"x-api-key": "user-key"})
    assert (answer.status, sorted(answer.headers["allow"].split(", "))) == (405, ["GET", "HEAD"])
