"""`models` and `ps`, as people and as programs read them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mesh.cli.main import run
from tests.cli.fake_node import INSTANCE, FakeNode


def _instances(**changes: Any) -> dict[str, Any]:
    return {"node_id": "n", "draining": False, "instances": [], "queues": {}, "budget": {}, "failures": {}, **changes}


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


def test_models_lists_ids_nodes_and_descriptions(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    data = [
        {
            "id": "qwen3",
            "owned_by": "gpu1",
            "metadata": {"profile_description": "the [fast] one", "aliases": ["q", "gpt-4o"]},
        },
        {"id": "org/model-with-a-long-name:profile", "owned_by": "gpu2", "metadata": None},
    ]
    node.answers["GET /v1/models"] = (200, {"object": "list", "data": data})
    assert run(["models"]) == 0
    assert _lines(capsys.readouterr().out) == [
        ["MODEL", "ALIASES", "NODE", "DESCRIPTION"],
        ["qwen3", "q,", "gpt-4o", "gpu1", "the", "[fast]", "one"],
        ["org/model-with-a-long-name:profile", "-", "gpu2", "-"],
    ]
    assert run(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == data


def test_models_of_an_empty_node_says_what_to_do(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers["GET /v1/models"] = (200, {"object": "list", "data": []})
    assert run(["models"]) == 0
    assert "cookbook.yaml" in capsys.readouterr().out


def test_ps_shows_instances_queues_failures_and_budget(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    idle = {
        **INSTANCE,
        "key": "bge:default",
        "model_id": "bge",
        "active": 0,
        "slots": None,
        "memory": {},
        "stale": True,
        "engine": {"version": "b11000", "build": "cuda", "path": "/opt/cuda/llama-server"},
        "superseded": True,
    }
    of_an_older_node = {**INSTANCE, "key": "old:default", "model_id": "old", "engine": None}
    node.answers["GET /admin/instances"] = (
        200,
        _instances(
            instances=[
                INSTANCE,
                {**INSTANCE, "pid": 4243, "live": {"gpu0": 20001}, "source": "learned"},
                idle,
                of_an_older_node,
            ],
            queues={"qwen3:default": 3, "big:default": 2, "none:default": 0},
            budget={"capacity": {"vram": 24000, "instances": 100}, "used": {"vram": 20480, "instances": 3}},
            failures={
                "bad:default": {"reason": "exited with [1]", "count": 2, "retry_in_s": 8.0, "log_tail": []},
                "bad:fast": {"reason": "crashed", "count": 1, "retry_in_s": 0.4, "log_tail": []},
            },
        ),
    )
    assert run(["ps"]) == 0
    memory = ["ram", "512", "MiB,", "vram", "20,480", "MiB"]
    assert _lines(capsys.readouterr().out) == [
        ["MODEL", "STATE", "PID", "PORT", "SLOTS", "QUEUED", "MEMORY", "SOURCE", "LIVE", "ENGINE", "IDLE"],
        ["qwen3", "ready", "4242", "40001", "1/4", "3", *memory, "-", "-", "b11549", "-"],
        ["qwen3", "ready", "4243", "40001", "1/4", "0", *memory, "learned", "gpu0", "20,001", "MiB", "b11549", "-"],
        ["bge", "ready", "(old)", "4242", "40001", "0/-", "0", "-", "-", "-", "b11000", "cuda", "(old)", "1m"],
        ["old", "ready", "4242", "40001", "1/4", "0", *memory, "-", "-", "-", "-"],
        ["big", "waiting", "-", "-", "-", "2", "-", "-", "-", "-", "-"],
        ["bad", "failed", "(2", "times):", "exited", "with", "[1];", "next", "try", "in", "8s"],
        ["bad:fast", "failed:", "crashed"],
        ["budget"],
        ["vram", "20,480", "used,", "3,520", "free", "of", "24,000", "MiB"],
        ["instances", "3", "of", "100"],
    ]


def test_ps_of_an_idle_node_and_as_json(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers["GET /admin/instances"] = (200, _instances())
    assert run(["ps"]) == 0
    assert "Nothing is loaded" in capsys.readouterr().out
    assert run(["ps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == _instances()


def test_ps_tells_used_foreign_and_free_of_each_kind(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    gpu0 = {"capacity_mib": 24000, "used_mib": 20480, "foreign_mib": 3000, "free_mib": 520}
    budget = {"capacity": {"gpu0": 24000}, "used": {"gpu0": 20480}, "memory": {"gpu0": gpu0}}
    node.answers["GET /admin/instances"] = (200, _instances(budget=budget))
    assert run(["ps"]) == 0
    assert capsys.readouterr().out.endswith("budget\n  gpu0  20,480 used, 3,000 foreign, 520 free of 24,000 MiB\n")
