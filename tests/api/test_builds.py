"""/admin/rebuild-llama, its cancel, /admin/rollback-llama and /admin/builds; and that ended attempts are counted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mesh.api.builds import count_builds
from mesh.build.status import Outcome, Stage
from mesh.errors import BuildBusyError, BuildError, LinkError, UnknownBuildError
from mesh.metrics import Metrics
from mesh.tasks import spawn
from tests.api.asgi import request
from tests.api.mesh import PEER, FakeMesh
from tests.api.node import AUTH, STARTED_AT, Node
from tests.fakes_builds import NEW, OLD, FakeBuilds, attempt, ended, status, version
from tests.members import member

JSON = {"content-type": "application/json"}
REBUILD, CANCEL, ROLLBACK = "/admin/rebuild-llama", "/admin/rebuild-llama/cancel", "/admin/rollback-llama"
POSTS = [REBUILD, CANCEL, ROLLBACK, "/admin/builds"]
QUIET = {"is_building": False, "last_build_error": None, "last_build_at": None}


def node_with(builds: FakeBuilds | None = None, **settings: Any) -> tuple[Node, FakeBuilds]:
    node, builds = Node(**settings), builds or FakeBuilds()
    node.ctx.builds = builds
    return node, builds


async def post(node: Node, path: str, body: Any = ..., **options: Any) -> tuple[int, Any]:
    answer = await request(node.app, "POST", path, json_body=body, **options)
    return answer.status, answer.json


# --- llamesh's contract


@pytest.mark.parametrize(
    "headers",
    [{}, {"content-type": "application/x-www-form-urlencoded"}, JSON, {**JSON, "origin": "http://node"}],
    ids=["curl -X POST", "curl -d ''", "json", "a page of ours"],
)
async def test_llameshs_request_has_no_body(headers: dict[str, str]) -> None:
    node, builds = node_with()
    status, said = await post(node, REBUILD, headers=headers)
    assert (status, said["status"], said["message"]) == (202, "accepted", "Rebuild triggered in background")
    assert said["build_status"] == QUIET, "as it was before"
    assert said["attempt"]["build"] == "default"
    assert said["attempt"]["id"] == 1
    assert builds.asked == [("default", None, False)]


async def test_the_second_one_is_a_409_in_llameshs_words_with_the_envelope() -> None:
    node, builds = node_with()
    builds.last_error, builds.last_at = "cmake failed", 1_700_000_000.0
    await post(node, REBUILD)
    status, said = await post(node, REBUILD, {"force": True})
    assert (status, said["status"], said["message"]) == (409, "error", "Rebuild already in progress")
    assert said["build_status"] == {
        "is_building": True,
        "last_build_error": "cmake failed",
        "last_build_at": "2023-11-14T22:13:20+00:00",
    }
    assert (said["error"]["type"], said["error"]["message"]) == ("conflict", "default is being built already")


async def test_without_builds_it_is_taken_and_nothing_happens() -> None:
    """As in llamesh with builds disabled."""
    node = Node()
    status, said = await post(node, REBUILD)
    assert (status, said["build_status"], said["attempt"]) == (202, QUIET, None)
    assert (await post(node, CANCEL))[1]["cancelled"] is False
    status, said = await post(node, ROLLBACK)
    assert (status, said["error"]["type"]) == (404, "build_not_found")
    assert (await request(node.app, "GET", "/admin/builds")).json["builds"] == []
    metrics = (await request(node.app, "GET", "/metrics/json")).json
    assert {name: metrics[name] for name in QUIET} == QUIET


# --- ours


async def test_which_what_and_whether_anyway() -> None:
    node, builds = node_with(FakeBuilds(status(), status("cuda")))
    code, said = await post(node, REBUILD, {"build": "cuda", "branch": "feature/x-1", "force": True})
    assert (code, said["attempt"]["ref"]) == (202, "feature/x-1")
    assert builds.asked == [("cuda", "feature/x-1", True)]
    code, said = await post(node, REBUILD, {"build": "cdua"})
    assert (code, said["error"]["type"]) == (404, "build_not_found")
    assert "there are: default, cuda" in said["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"build": 5}, "build"),
        ({"build": ""}, "build"),
        ({"force": "yes"}, "force"),
        ({"branch": ""}, "branch"),
        ({"branch": ["x"]}, "branch"),
        ({"branch": "--upload-pack=touch /tmp/x"}, "branch"),
        ({"branch": "-x"}, "branch"),
        ({"branch": "a b"}, "branch"),
        ({"branch": "a\nb"}, "branch"),
        ({"branch": "a:b"}, "branch"),
        ({"branch": "x" * 201}, "branch"),
        ({"node": 5}, "node"),
    ],
)
async def test_bad_requests(body: dict[str, Any], param: str) -> None:
    node, builds = node_with()
    code, said = await post(node, REBUILD, body)
    assert (code, said["error"]["param"]) == (400, param)
    assert builds.asked == []


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"origin": "http://evil.example"}, b""),
        ({"origin": "null", "content-type": "text/plain"}, b""),
        ({"content-type": "text/plain"}, b'{"force": true}'),
        ({}, b"{}"),
    ],
)
async def test_a_web_page_cannot_ask_for_it(path: str, headers: dict[str, str], body: bytes) -> None:
    """Browsers send such requests across origins without asking first, and name the origin."""
    node, builds = node_with()
    answer = await request(node.app, "POST", path, headers=headers, body=body)
    assert answer.status == 415
    assert (builds.asked, builds.rolled_back, builds.cancelled) == ([], [], [])


async def test_a_node_that_shuts_down_starts_nothing() -> None:
    node, builds = node_with()
    node.ctx.draining = True
    for path in (REBUILD, ROLLBACK):
        code, said = await post(node, path)
        assert (code, said["error"]["type"]) == (503, "draining")
    assert (builds.asked, builds.rolled_back) == ([], [])


async def test_a_drained_node_can_be_rebuilt() -> None:
    node, _ = node_with()
    node.ctx.drained = True
    assert (await post(node, REBUILD))[0] == 202


async def test_cancel() -> None:
    node, builds = node_with(FakeBuilds(status(), status("cuda", current=attempt(7, "cuda"))))
    code, said = await post(node, CANCEL)
    assert (code, said["cancelled"], said["message"]) == (200, False, "no rebuild of default is in progress")
    code, said = await post(node, CANCEL, {"build": "cuda"})
    assert (code, said["cancelled"], said["message"]) == (200, True, "the rebuild of cuda was told to stop")
    assert builds.cancelled == ["default", "cuda"]


async def test_rollback() -> None:
    node, builds = node_with(FakeBuilds(status(), status("cuda")))
    code, said = await post(node, ROLLBACK, {"build": "cuda"})
    assert (code, said["status"], said["message"]) == (200, "ok", f"cuda is back at {OLD}")
    assert (said["version"]["commit"], said["version"]["live"]) == (OLD, True)
    await post(node, ROLLBACK)
    assert builds.rolled_back == ["cuda", "default"]


@pytest.mark.parametrize(
    ("error", "code", "type"),
    [
        (UnknownBuildError("nothing to go back to: it is the first"), 404, "build_not_found"),
        (BuildBusyError("default is being built"), 409, "conflict"),
        (BuildError("llama-server --version failed", exit_status=127), 500, "build_failed"),
    ],
)
async def test_why_there_was_no_rollback(error: Any, code: int, type: str) -> None:
    node, builds = node_with()
    builds.refusal = error
    status, said = await post(node, ROLLBACK)
    assert (status, said["status"], said["error"]["type"]) == (code, "error", type)
    assert said["message"] == said["error"]["message"] == error.message


async def test_builds_tells_everything() -> None:
    told = status(
        versions=(version(live=True), version(OLD, previous=True)),
        current=attempt(3, stage=Stage.COMPILING, done=12, total=345, commit=NEW),
        last=ended(Outcome.FAILED, 2, error="cmake --build failed", exit_status=2, log_tail=("error: x",)),
        held={OLD: "rolled back"},
    )
    node, builds = node_with(FakeBuilds(told, status("cuda")))
    builds.last_error = "cmake --build failed"
    answer = (await request(node.app, "GET", "/admin/builds")).json
    assert (answer["node_id"], answer["started_at_wall"]) == ("node-a", STARTED_AT)
    assert answer["build_status"]["last_build_error"] == "cmake --build failed"
    first, second = answer["builds"]
    assert (first["name"], second["name"]) == ("default", "cuda")
    assert first["held"] == {OLD: "rolled back"}
    assert [(v["commit"], v["live"], v["previous"]) for v in first["versions"]] == [
        (NEW, True, False),
        (OLD, False, True),
    ]
    current, last = first["current"], first["last"]
    assert (current["stage"], current["done"], current["total"]) == ("compiling", 12, 345)
    assert (last["outcome"], last["exit_status"], last["log_tail"]) == ("failed", 2, ["error: x"])


async def test_they_are_for_admins() -> None:
    """trap 99"""
    node, builds = node_with(auth=AUTH)
    FakeMesh(node)
    for headers, expected in (({}, 401), ({"x-api-key": "user-key"}, 403)):
        for path in POSTS:
            assert (await post(node, path, headers=headers))[0] == expected
        for path in ("/admin/builds", "/admin/builds/events"):
            assert (await request(node.app, "GET", path, headers=headers)).status == expected
    assert (builds.asked, builds.rolled_back, builds.cancelled) == ([], [], [])


# --- other nodes


@pytest.mark.parametrize("path", POSTS)
async def test_on_another_node(path: str) -> None:
    node, builds = node_with()
    mesh = FakeMesh(node, member(1))
    mesh.answers["n1"] = {"status": "accepted"}
    code, said = await post(node, path, {"build": "cuda", "node": "n1"})
    assert (code, said) == (202 if path == REBUILD else 200, {"status": "accepted", "node": "n1"})
    assert mesh.calls == [("n1", path, {"build": "cuda"}, 120.0 if path == ROLLBACK else 30.0)]
    assert (builds.asked, builds.rolled_back, builds.cancelled) == ([], [], [])


async def test_everywhere_and_who_does_not_have_that_build_has_nothing_to_do() -> None:
    node, _ = node_with()
    mesh = FakeMesh(node, member(1), member(2))
    mesh.answers = {"n1": {"status": "accepted", "attempt": {"id": 4}}, "n2": {"status": "accepted"}}
    code, said = await post(node, REBUILD, {"build": "cuda", "node": "*"})
    assert (code, said["status"], said["message"]) == (202, "ok", "2 of 3 nodes did it")
    assert said["nodes"]["node-a"]["type"] == "build_not_found"
    assert said["nodes"]["n1"]["attempt"] == {"id": 4}
    mesh.answers["n2"] = LinkError("n2 is silent")
    code, said = await post(node, REBUILD, {"build": "cuda", "node": "*"})
    assert (code, said["status"]) == (502, "error")


async def test_a_member_may_ask_on_its_link_for_this_node_alone() -> None:
    """traps 60, 103"""
    node, builds = node_with(auth=AUTH)
    mesh = FakeMesh(node, member(1), member(2))
    for path in POSTS:
        code, said = await post(node, path, {"node": "n2"}, peer=PEER)
        assert code in (200, 202)
        assert said.get("node_id", "node-a") == "node-a"
    assert mesh.calls == []
    assert [name for name, _, _ in builds.asked] == builds.cancelled == builds.rolled_back == ["default"]


async def test_a_member_does_not_choose_the_code() -> None:
    """Else one bad member runs what it likes on every machine."""
    node, builds = node_with(auth=AUTH)
    FakeMesh(node, member(1))
    code, said = await post(node, REBUILD, {"branch": "b6123"}, peer=PEER)
    assert (code, said["error"]["type"], said["error"]["param"]) == (403, "permission_error", "branch")
    assert "run 'llama-mesh rebuild --branch b6123' on that node" in said["message"]
    assert builds.asked == []
    assert (await post(node, REBUILD, {"branch": None, "force": True}, peer=PEER))[0] == 202


# --- metrics


def counted(metrics: Metrics) -> dict[str, dict[str, int]]:
    return {build: state.outcomes for build, state in metrics.snapshot().builds.items()}


async def test_ended_attempts_are_counted_and_those_that_built_are_timed() -> None:
    builds, metrics = FakeBuilds(status(), status("cuda")), Metrics()
    counting = spawn(count_builds(builds, metrics), "count")
    await builds.subscribed.wait()
    builds.change("started", attempt(1))
    builds.log("[1/2] CC a.c")
    builds.change("ended", ended(Outcome.FAILED, seconds=30.0))
    builds.change("ended", ended(Outcome.INSTALLED, 2, seconds=500.0))
    builds.change("ended", ended(Outcome.UNCHANGED, 3, seconds=2.0))
    builds.change("ended", ended(Outcome.UNCHANGED, 4, seconds=2.0))
    builds.change("ended", ended(Outcome.CANCELLED, 5, build="cuda", seconds=-3.0))
    for subscription in tuple(builds.subscriptions):
        subscription.close()
    await asyncio.wait_for(counting, 5)
    assert counted(metrics) == {"default": {"failed": 1, "installed": 1, "unchanged": 2}, "cuda": {"cancelled": 1}}
    assert metrics.snapshot().builds["default"].last_duration_s == 500.0
    assert metrics.snapshot().builds["cuda"].last_duration_s == 0.0, "the clock was set back meanwhile"


async def test_counting_that_is_cancelled_frees_its_subscription() -> None:
    builds = FakeBuilds()
    counting = spawn(count_builds(builds, Metrics()), "count")
    await builds.subscribed.wait()
    counting.cancel()
    await asyncio.gather(counting, return_exceptions=True)
    assert not builds.subscriptions


async def test_metrics_json_tells_it_as_llamesh_does() -> None:
    node, builds = node_with()
    builds.rebuild(None)
    builds.last_error, builds.last_at = "cmake failed", 1_700_000_000.25
    told = (await request(node.app, "GET", "/metrics/json")).json
    assert (told["is_building"], told["last_build_error"]) == (True, "cmake failed")
    assert told["last_build_at"] == "2023-11-14T22:13:20.250000+00:00"
