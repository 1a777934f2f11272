"""`prewarm` and `unload`: what is asked of the node, and how its answers read."""

from __future__ import annotations

import json

import pytest

from mesh.cli.main import run
from tests.cli.fake_node import INSTANCE, FakeNode


def test_prewarm_waits_and_says_how_long_it_took(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers["POST /admin/prewarm"] = (200, {"status": "ok", "message": "Model prewarmed", "instance": INSTANCE})
    assert run(["prewarm", "qwen3", "--timeout", "30"]) == 0
    assert node.asked[-1].body == {"model": "qwen3", "wait": True, "timeout_s": 30}
    assert "qwen3 ready after" in capsys.readouterr().out
    assert run(["prewarm", "qwen3", "--no-wait", "--json"]) == 0
    assert node.asked[-1].body["wait"] is False
    answer = json.loads(capsys.readouterr().out)
    assert answer["instance"]["pid"] == 4242
    assert answer["seconds"] >= 0


def test_a_model_that_will_not_load_is_a_failure(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "llama-server exited with 1: error: invalid argument: --nope"
    status, envelope = node.error(503, "instance_failed", reason)
    node.answers["POST /admin/prewarm"] = (status, {"status": "error", "message": reason, **envelope})
    node.retry_after = "2"  # for clients that try by themselves; it does not help a person
    assert run(["prewarm", "bad"]) == 1
    error = capsys.readouterr().err
    assert "invalid argument: --nope" in error
    assert "See 'llama-mesh logs bad'." in error
    assert "Try again" not in error


def test_a_node_without_an_engine_is_to_be_checked(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers["POST /admin/prewarm"] = node.error(503, "engine_missing", "no llama-server found")
    node.retry_after = "2"
    assert run(["prewarm", "m"]) == 1
    assert "fix:   Run 'llama-mesh check'" in capsys.readouterr().err


def test_a_timeout_may_be_a_fraction(node: FakeNode) -> None:
    node.answers["POST /admin/prewarm"] = (200, {"status": "ok", "message": "", "instance": INSTANCE})
    assert run(["prewarm", "m", "--timeout", "0.5"]) == 0
    assert node.asked[-1].body["timeout_s"] == 0.5


def test_an_unknown_model_points_to_the_list(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers["POST /admin/prewarm"] = node.error(404, "model_not_found", "Model not found")
    assert run(["prewarm", "nope"]) == 1
    error = capsys.readouterr().err
    assert "Model not found" in error
    assert "llama-mesh models" in error


@pytest.mark.parametrize(
    ("arguments", "count", "body", "said"),
    [
        (["qwen3"], 1, {"model": "qwen3"}, "qwen3: 1 instance stops after running requests"),
        (["--all"], 2, {"all": True}, "all models: 2 instances stop after running requests"),
        (["qwen3"], 0, {"model": "qwen3"}, "qwen3: nothing was loaded"),
    ],
)
def test_unload(
    node: FakeNode,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    count: int,
    body: dict[str, object],
    said: str,
) -> None:
    node.answers["POST /admin/unload"] = (200, {"status": "ok", "message": "", "unloaded": count})
    assert run(["unload", *arguments]) == 0
    assert node.asked[-1].body == body
    assert capsys.readouterr().out.strip() == said


def test_unload_needs_a_model_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["unload"], ["unload", "qwen3", "--all"]):
        with pytest.raises(SystemExit) as caught:
            run(arguments)
        assert caught.value.code == 2
    assert "--all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "target"), [([], {}), (["--node", "gpu1"], {"node": "gpu1"}), (["--everywhere"], {"node": "*"})]
)
def test_where_it_is_done(node: FakeNode, flags: list[str], target: dict[str, str]) -> None:
    node.answers["POST /admin/prewarm"] = (200, {"status": "ok", "message": "", "instance": INSTANCE})
    node.answers["POST /admin/unload"] = (200, {"status": "ok", "message": "", "unloaded": 1})
    assert run(["prewarm", "qwen3", *flags]) == 0
    assert node.asked[-1].body == {"model": "qwen3", "wait": True, "timeout_s": 600.0, **target}
    assert run(["unload", "--all", *flags]) == 0
    assert node.asked[-1].body == {"all": True, **target}


def test_on_another_node_its_name_is_told(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if the node chose it: what is only elsewhere is loaded there."""
    node.answers["POST /admin/prewarm"] = (200, {"status": "ok", "message": "", "instance": None, "node": "gpu1"})
    node.answers["POST /admin/unload"] = (200, {"status": "ok", "message": "", "unloaded": 2, "node": "gpu1"})
    assert run(["prewarm", "qwen3"]) == 0
    assert capsys.readouterr().out.endswith(" s on gpu1\n")
    assert run(["unload", "qwen3", "--node", "gpu1"]) == 0
    assert capsys.readouterr().out == "qwen3 on gpu1: 2 instances stop after running requests\n"


NOT_THERE = {"status": "error", "message": "Model not found", "type": "model_not_found"}
NO_MEMORY = {"status": "error", "message": "node gpu3: needs [9000] MiB", "type": "model_too_large"}


@pytest.mark.parametrize(
    ("answers", "status", "lines"),
    [
        (
            {"gpu1": {"status": "ok"}, "gpu22": NOT_THERE},
            200,
            ["gpu1   ready", "gpu22  does not have it"],
        ),
        (
            {"gpu1": {"status": "ok"}, "gpu2": NOT_THERE, "gpu3": NO_MEMORY},
            503,
            ["gpu1  ready", "gpu2  does not have it", "gpu3  node gpu3: needs [9000] MiB"],
        ),
        ({"gpu1": NOT_THERE, "gpu2": NOT_THERE}, 404, ["gpu1  Model not found", "gpu2  Model not found"]),
    ],
)
def test_everywhere_is_a_line_for_each_node_and_one_failure_is_exit_1(
    node: FakeNode,
    capsys: pytest.CaptureFixture[str],
    answers: dict[str, dict[str, str]],
    status: int,
    lines: list[str],
) -> None:
    outcome = "ok" if status == 200 else "error"
    answer = {"status": outcome, "message": "1 of 2 nodes did it", "nodes": answers}
    node.answers["POST /admin/prewarm"] = (status, answer)
    expected = 0 if status == 200 else 1
    assert run(["prewarm", "qwen3", "--everywhere"]) == expected
    captured = capsys.readouterr()
    assert captured.out.splitlines() == lines
    assert captured.err == ""
    assert run(["prewarm", "qwen3", "--everywhere", "--json"]) == expected
    assert json.loads(capsys.readouterr().out)["nodes"] == answers


def test_unload_everywhere(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {"gpu1": {"status": "ok", "unloaded": 1}, "gpu2": {"status": "ok", "unloaded": 0}}
    node.answers["POST /admin/unload"] = (200, {"status": "ok", "message": "", "nodes": answers})
    assert run(["unload", "qwen3", "--everywhere"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "gpu1  1 instance stops after running requests",
        "gpu2  nothing was loaded",
    ]


def test_everywhere_without_a_key_is_an_error_as_usual(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    status, envelope = node.error(403, "permission_error", "this route needs one of auth.admin_keys")
    node.answers["POST /admin/prewarm"] = (status, {"status": "error", **envelope})
    assert run(["prewarm", "qwen3", "--everywhere"]) == 1
    assert "auth.admin_keys" in capsys.readouterr().err
