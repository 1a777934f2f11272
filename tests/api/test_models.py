"""/v1/models: llamesh's shape, names of every kind, and what a loaded model told about itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mesh.api import models
from mesh.config.profile import Engine
from mesh.core.lifecycle import State
from mesh.core.load_log import KEYS
from tests.api.asgi import request
from tests.api.mesh import FakeMesh
from tests.api.node import SLASHED, SMOL, STARTED_AT, Node
from tests.fakes_supervisor import FakeInstance, FakeRing
from tests.members import Member, member, profile

LOAD_LOG = ("print_info: arch             = llama", "srv  load: initializing slots, n_slots = 4")


async def listing(node: Node) -> list[dict[str, Any]]:
    answer = await request(node.app, "GET", "/v1/models")
    assert answer.status == 200
    assert answer.json["object"] == "list"
    data: list[dict[str, Any]] = answer.json["data"]
    return data


async def test_an_entry_has_llameshs_keys() -> None:
    """Compatibility contract, llamesh-config.md 9.5."""
    first, second = await listing(Node())
    metadata = first.pop("metadata")
    assert first == {
        "id": "Smol",
        "object": "model",
        "created": int(STARTED_AT),
        "owned_by": "node-a",
        "permission": [],
        "root": "Smol",
        "parent": None,
    }
    assert metadata == {
        "model": "Smol",
        "model_description": "SmolLM2",
        "profile_id": "default",
        "profile_description": "fast",
        "idle_timeout_seconds": 300,
        "estimated_tokens_per_second": 0.0,
        "parsed_model_params": None,
        "aliases": ["gpt-4o", "Tiny"],
        "capabilities": ["text"],
        "nodes": ["node-a"],
    }
    assert (second["id"], second["root"]) == ("org/Big Model:long", "org/Big Model")


async def test_order_and_created_do_not_change() -> None:
    """trap 80"""
    profiles = [replace(SMOL, key=f"m{n}:default", id=f"m{n}", aliases=()) for n in (3, 1, 2)]
    node = Node(*profiles)
    assert [entry["id"] for entry in await listing(node)] == ["m3", "m1", "m2"]
    assert await listing(node) == await listing(node)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("Smol", "Smol"),
        ("smol", "Smol"),
        ("smol:default", "Smol"),
        ("gpt-4o", "Smol"),
        ("org/Big Model:long", "org/Big Model:long"),
        ("/Smol", "Smol"),
    ],
)
async def test_retrieve_takes_every_name(asked: str, found: str) -> None:
    """trap 78: slashes and spaces; the server has decoded the percent signs (see test_real_server)."""
    node = Node()
    answer = await request(node.app, "GET", f"/v1/models/{asked}")
    assert answer.status == 200
    assert answer.json["id"] == found
    assert answer.json in await listing(node)


@pytest.mark.parametrize("asked", ["nope", "", "Smol/more"])
async def test_an_unknown_model_is_model_not_found(asked: str) -> None:
    answer = await request(Node().app, "GET", f"/v1/models/{asked}")
    assert answer.status == 404
    assert answer.json["error"]["type"] == "model_not_found"
    assert answer.json["error"]["message"] == f"Model '{asked}' not found in local cookbook or any peer"
    assert answer.json["error"]["param"] == "model"


async def test_tokens_per_second_are_those_of_the_arguments() -> None:
    node = Node()
    model = node.ctx.metrics.model("a1", "Smol")
    model.tokens_generated_total = 300
    model.observe(2.0)
    first, second = await listing(node)
    assert first["metadata"]["estimated_tokens_per_second"] == 150.0
    assert second["metadata"]["estimated_tokens_per_second"] == 0.0


def loaded(node: Node, **changes: Any) -> FakeRing:
    ring = FakeRing(*LOAD_LOG)
    node.supervisor.views = [replace(FakeInstance("i-1", SMOL.key, SMOL.id), **changes)]
    node.supervisor.rings = {SMOL.key: [("i-1", ring)]}
    return ring


async def test_a_ready_instance_tells_its_parameters_and_they_stay() -> None:
    node = Node()
    loaded(node)
    first, second = await listing(node)
    params = first["metadata"]["parsed_model_params"]
    assert params.keys() == set(KEYS)
    assert (params["arch"], params["n_slots"], params["n_ctx"]) == ("llama", 4, None)
    assert second["metadata"]["parsed_model_params"] is None
    node.supervisor.views, node.supervisor.rings = [], {}
    assert (await listing(node))[0]["metadata"]["parsed_model_params"] == params


@pytest.mark.parametrize("changes", [{"state": State.SPAWNING}, {"state": State.DRAINING}, {"stale": True}])
async def test_only_ready_and_current_instances_are_asked(changes: dict[str, Any]) -> None:
    node = Node()
    loaded(node, **changes)
    assert (await listing(node))[0]["metadata"]["parsed_model_params"] is None


async def test_parameters_told_by_another_engine_version_are_not_shown() -> None:
    node = Node()
    stored: dict[str, Any] = {"params": dict.fromkeys(KEYS), "llama_cpp_version": "b122"}
    node.ctx.metrics.hash("a1").parsed_model_params = stored
    assert (await listing(node))[0]["metadata"]["parsed_model_params"] is None
    stored["llama_cpp_version"] = None  # not known: served
    assert (await listing(node))[0]["metadata"]["parsed_model_params"] is not None


async def test_parameters_are_those_of_the_engine_that_told_them() -> None:
    """An instance that is looked at after an install runs the version before it still."""
    node = Node()
    loaded(node, engine_version="b122", superseded=True)
    assert (await listing(node))[0]["metadata"]["parsed_model_params"] is not None  # it is what runs
    stored = node.ctx.metrics.hash("a1").parsed_model_params
    assert stored is not None
    assert stored["llama_cpp_version"] == "b122"
    node.supervisor.views = []
    assert (await listing(node))[0]["metadata"]["parsed_model_params"] is None  # the next one is another


async def test_the_output_of_an_instance_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node()
    ring = loaded(node)
    calls: list[int] = []
    real = ring.tail

    def tail(n: int) -> list[str]:
        calls.append(n)
        return real(n)

    monkeypatch.setattr(ring, "tail", tail)
    for _ in range(3):
        await listing(node)
    assert len(calls) == 1


async def test_a_model_that_is_never_served_here_is_still_listed() -> None:
    node = Node(replace(SLASHED, max_instances=0))
    assert [entry["id"] for entry in await listing(node)] == [SLASHED.id]


def test_find_profile_prefers_the_listed_id_over_an_alias() -> None:
    """Aliases may not collide (the loader refuses it), so this only matters for the case of letters."""
    assert models.find_profile(Node().ctx, "Smol") is SMOL


# --- in a mesh

BIG = profile("big:long", id="Big:Long", aliases=("b",), description="long texts", decode_tps=35.0)


def mesh_of(*members: Member) -> Node:
    node = Node()
    FakeMesh(node, *members)
    return node


async def test_what_only_others_have_is_listed_after_the_own_models() -> None:
    node = mesh_of(member(2, BIG, profile("a:default")), member(1, BIG, profile(SMOL.key)))
    data = await listing(node)
    assert [entry["id"] for entry in data] == ["Smol", "org/Big Model:long", "Big:Long", "a"]
    assert [entry["metadata"]["nodes"] for entry in data] == [["node-a", "n1"], ["node-a"], ["n1", "n2"], ["n2"]]
    own, _, big, _ = data
    assert big.keys() == own.keys()
    assert big["metadata"].keys() == own["metadata"].keys()
    assert (big["owned_by"], big["root"], big["created"]) == ("n1", "Big", int(STARTED_AT))
    assert (big["metadata"]["model"], big["metadata"]["profile_id"]) == ("Big", "long")
    assert big["metadata"]["profile_description"] == "long texts"
    assert (big["metadata"]["aliases"], big["metadata"]["estimated_tokens_per_second"]) == (["b"], 35.0)


async def test_the_union_is_the_same_whoever_was_met_first() -> None:
    """trap 80"""
    members = [
        member(n, profile("x:default", description=f"by {n}"), profile(f"y{n % 2}:default"), BIG) for n in (1, 2, 3)
    ]
    assert await listing(mesh_of(*members)) == await listing(mesh_of(*members[::-1]))


async def test_the_dead_offer_nothing() -> None:
    node = mesh_of(member(1, BIG, profile(SMOL.key), status="dead"))
    assert [entry["id"] for entry in await listing(node)] == ["Smol", "org/Big Model:long"]
    assert (await listing(node))[0]["metadata"]["nodes"] == ["node-a"]
    assert (await request(node.app, "GET", "/v1/models/big:long")).status == 404


async def test_what_each_can_do_is_told_of_own_models_and_others() -> None:
    whisper = replace(SMOL, key="w:default", id="w", aliases=(), engine=Engine.WHISPER)
    hears = replace(SMOL, key="h:default", id="h", aliases=(), args=("--mmproj", "x.gguf"))
    embeds = replace(SMOL, key="e:default", id="e", aliases=(), args=("--embeddings",))
    theirs = (
        profile("pw:default", kind="audio"),
        profile("ph:default", multimodal=True),
        profile("pr:default", kind="rerank"),
    )
    node = Node(whisper, hears, embeds)
    FakeMesh(node, member(1, *theirs))
    assert {entry["id"]: entry["metadata"]["capabilities"] for entry in await listing(node)} == {
        "w": ["audio"],
        "h": ["audio", "text"],
        "e": ["embedding"],
        "pw": ["audio"],
        "ph": ["audio", "text"],
        "pr": ["rerank"],
    }


@pytest.mark.parametrize("asked", ["Big:Long", "big:long", "B"])
async def test_retrieve_finds_what_others_have(asked: str) -> None:
    node = mesh_of(member(1, BIG))
    answer = await request(node.app, "GET", f"/v1/models/{asked}")
    assert answer.status == 200
    assert answer.json == (await listing(node))[-1]


async def test_nodes_may_write_an_id_differently() -> None:
    """The key is the identity, its letters are lower-case; the listing and the retrieval agree on one of them."""
    node = mesh_of(member(1, profile("qwen:default", id="Qwen")), member(2, profile("qwen:default", id="QWEN")))
    entry = (await listing(node))[-1]
    assert (entry["id"], entry["metadata"]["nodes"]) == ("Qwen", ["n1", "n2"])
    for asked in ("Qwen", "QWEN", "qwen:default"):
        assert (await request(node.app, "GET", f"/v1/models/{asked}")).json == entry


async def test_an_own_model_wins_over_another_nodes_alias() -> None:
    node = mesh_of(member(1, profile("other:default", aliases=("Smol", "tiny"))))
    for asked in ("Smol", "tiny"):
        assert (await request(node.app, "GET", f"/v1/models/{asked}")).json["owned_by"] == "node-a"
