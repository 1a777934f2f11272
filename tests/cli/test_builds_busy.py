"""`rebuild` where a build is in progress already: when that one is watched, and when it is not what was asked for."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from mesh.build.status import Attempt, Outcome, Stage, Trigger
from mesh.cli import build_watch, builds
from mesh.cli.main import run
from tests.api.node import Node
from tests.api.served import serving
from tests.cli.build_node import BuildNode, picture, snapshot, told
from tests.fakes_builds import NEW, FakeBuilds, attempt, ended, status

REBUILD, BUILDS = "POST /admin/rebuild-llama", "POST /admin/builds"
RUNNING = attempt(7, stage=Stage.COMPILING, trigger=Trigger.SCHEDULED)
INSTALLED = ended(Outcome.INSTALLED, 7, commit=NEW)
BUSY_THERE = {"status": "error", "message": "build default is busy", "type": "conflict"}
BUSY = 409, {**BUSY_THERE, "error": {"message": "build default is busy", "type": "conflict", "param": None}}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_watch, "pause", lambda seconds: None)


def builds_already(builder: BuildNode, running: Attempt = RUNNING) -> None:
    """Let the node be at work on *running*, which will be installed."""
    over = replace(running, outcome=Outcome.INSTALLED, ended_at_wall=INSTALLED.ended_at_wall)
    told_of = [status(running.build, current=running), status(running.build, last=over)]
    builder.answers = {REBUILD: [BUSY], BUILDS: [(200, picture(found)) for found in told_of]}
    builder.scripts = [[snapshot(running), told("ended", over)]]


@pytest.mark.parametrize(
    "flags", [["--branch", "b6123"], ["--force"], ["--branch", "master", "--force"], ["--branch", "b6123", "--json"]]
)
def test_another_one_is_not_taken_for_what_was_asked(
    flags: list[str], builder: BuildNode, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script would go on as if b6123 were installed."""
    builds_already(builder)
    assert run(["rebuild", *flags]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    said = "another rebuild of default is in progress (attempt 7, scheduled, master: compiling); "
    assert said + "what was asked for has not started" in captured.err
    watch = "('llama-mesh rebuild' watches it) or stop it ('llama-mesh rebuild --cancel'), then ask again."
    assert watch in captured.err
    assert "GET /admin/builds/events" not in [path for path, _ in builder.asked]


def test_how_to_go_on_names_build_and_node(builder: BuildNode, capsys: pytest.CaptureFixture[str]) -> None:
    builds_already(builder, replace(RUNNING, build="cuda"))
    assert run(["rebuild", "cuda", "--force", "--node", "gpu2"]) == 1
    error = capsys.readouterr().err
    assert "another rebuild of cuda is in progress" in error
    assert "'llama-mesh rebuild cuda --node gpu2' watches it" in error
    assert "'llama-mesh rebuild cuda --node gpu2 --cancel'" in error


@pytest.mark.parametrize(
    ("flags", "ref"),
    [([], "b6123"), (["--branch", "b6123"], "b6123"), (["--branch", "master"], "master")],
    ids=["whatever there is", "the same tag", "the configured branch"],
)
def test_the_one_that_was_asked_for_is_watched(
    flags: list[str], ref: str, builder: BuildNode, capsys: pytest.CaptureFixture[str]
) -> None:
    builds_already(builder, replace(RUNNING, ref=ref))
    assert run(["rebuild", *flags]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("a rebuild of default is in progress already (scheduled)")
    assert f"({ref}) is installed" in captured.out


@pytest.mark.parametrize("flags", [["--branch", "b6123"], ["--force"]])
def test_another_process_is_told_of_as_the_node_does(
    flags: list[str], builder: BuildNode, capsys: pytest.CaptureFixture[str]
) -> None:
    builder.answers = {REBUILD: [BUSY], BUILDS: [(200, picture(status()))]}
    assert run(["rebuild", *flags]) == 1
    assert "build default is busy" in capsys.readouterr().err


# --- every node


def everywhere(**nodes: Any) -> tuple[int, Any]:
    return 200, {"status": "ok", "message": "", "nodes": nodes}


def mesh_builds_already(builder: BuildNode, *, started: bool) -> None:
    """Let gpu1 be at work on master and gpu2 on b6123; gpu3 starts what it is asked for, if *started*."""
    going = {
        "gpu1": picture(status(current=RUNNING)),
        "gpu2": picture(status(current=replace(RUNNING, ref="b6123"))),
    }
    over = picture(status(last=replace(INSTALLED, ref="b6123")))
    begun = msgspec.to_builtins(replace(RUNNING, ref="b6123"))
    third = {"gpu3": {"status": "accepted", "attempt": begun}} if started else {}
    builder.answers = {
        REBUILD: [everywhere(gpu1=BUSY_THERE, gpu2=BUSY_THERE, **third)],
        BUILDS: [everywhere(**going), everywhere(gpu1=over, gpu2=over, gpu3=over)],
    }


def test_everywhere_each_node_is_judged_by_itself(builder: BuildNode, capsys: pytest.CaptureFixture[str]) -> None:
    mesh_builds_already(builder, started=True)
    assert run(["rebuild", "--everywhere", "--branch", "b6123"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "gpu1 another rebuild of default is in progress (attempt 7, scheduled, master: compiling)" in said
    assert "('llama-mesh rebuild --node gpu1' watches it)" in said
    assert "gpu2 0f1e2d3c4 (b6123) is installed" in said
    assert "gpu3 0f1e2d3c4 (b6123) is installed" in said


def test_everywhere_nothing_is_watched_in_place_of_force(
    builder: BuildNode, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh_builds_already(builder, started=False)
    assert run(["rebuild", "--everywhere", "--force", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "error"
    assert {name: said["type"] for name, said in found["nodes"].items()} == {"gpu1": "conflict", "gpu2": "conflict"}
    assert "scheduled, b6123: compiling" in found["nodes"]["gpu2"]["message"]


def test_everywhere_without_flags_all_are_watched(builder: BuildNode, capsys: pytest.CaptureFixture[str]) -> None:
    mesh_builds_already(builder, started=False)
    assert run(["rebuild", "--everywhere"]) == 0
    assert "another rebuild" not in capsys.readouterr().out


# --- at a real node


async def test_at_a_real_node(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of the API is faked here, only what builds."""
    node = Node()
    fake = node.ctx.builds = FakeBuilds(status(), status("cuda"))
    fake.rebuild("cuda", ref="b1")
    for name in ("follow", "poll"):  # it would never end
        monkeypatch.setattr(builds, name, lambda *args: pytest.fail("another build is watched"))
    async with serving(node) as served:
        monkeypatch.setenv("LLAMESH_URL", f"http://127.0.0.1:{served.port}")
        for where in ([], ["--node", node.ctx.node_id], ["--everywhere"]):
            assert await asyncio.to_thread(run, ["rebuild", "cuda", "--branch", "b2", *where]) == 1
            captured = capsys.readouterr()
            said = " ".join((captured.out + captured.err).split())
            assert "another rebuild of cuda is in progress (attempt 1, manual, b1: fetching)" in said
    assert [ref for _, ref, _ in fake.asked] == ["b1", "b2", "b2", "b2"]
