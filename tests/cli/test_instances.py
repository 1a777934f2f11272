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
