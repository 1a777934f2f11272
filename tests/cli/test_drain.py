"""`drain` and `undrain`: what is asked of which node, and waiting until nothing is left."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from mesh.cli import drain as command
from mesh.cli.main import run
from tests.cli.fake_node import FakeNode
from tests.cli.mesh_answers import nodes

DRAIN, UNDRAIN, NODES = "POST /admin/drain", "POST /admin/undrain", "GET /cluster/nodes"


def drained(name: str, active: int = 0, unloaded: int = 0, **more: Any) -> dict[str, Any]:
    message = f"{name} takes no new work; {active} requests are still served"
    return {
        "status": "ok", "message": message, "drained": True, "active": active, "unloaded": unloaded, **more
    }  # fmt: skip


def answers_in_turn(monkeypatch: pytest.MonkeyPatch, node: FakeNode, *answers: tuple[int, Any]) -> None:
    """Let /cluster/nodes answer the first, and after each pause the next of *answers*; more are not asked for."""
    left = list(answers)
    node.answers[NODES] = left.pop(0)

    def pause(seconds: float) -> None:
        assert left, "it waits although all is told"
        node.answers[NODES] = left.pop(0)

    monkeypatch.setattr(command, "pause", pause)


def peer(requests: int, age_s: float = 0.0, **changes: Any) -> tuple[int, Any]:
    entry = {"draining": True, "current_requests": requests, "record_age_s": age_s}
    return 200, nodes(gpu1={**entry, **changes})


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        ([], {"unload": False}),
        (["gpu1"], {"node": "gpu1", "unload": False}),
        (["gpu1", "--unload"], {"node": "gpu1", "unload": True}),
        (["*"], {"node": "*", "unload": False}),
    ],
)
def test_what_is_asked(node: FakeNode, arguments: list[str], body: dict[str, Any]) -> None:
    node.answers[DRAIN] = (200, drained("gpu1"))
    assert run(["drain", *arguments]) == 0
    assert [(asked.path, asked.body) for asked in node.asked] == [("/admin/drain", body)]


def test_what_is_said(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers[DRAIN] = (200, drained("gpu2", 3, 1))
    assert run(["drain", "--unload"]) == 0
    said = "gpu2 takes no new work; 3 requests are still served; 1 instance stops"
    assert capsys.readouterr().out.strip() == said
    assert run(["drain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == drained("gpu2", 3, 1)


def test_undrain(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers[UNDRAIN] = (200, {"status": "ok", "message": "gpu1 takes new work", "drained": False})
    assert run(["undrain", "gpu1"]) == 0
    assert node.asked[-1].body == {"node": "gpu1"}
    assert capsys.readouterr().out == "gpu1 takes new work\n"
    assert run(["undrain", "--json"]) == 0
    assert node.asked[-1].body == {}
    assert json.loads(capsys.readouterr().out)["drained"] is False


def test_several_nodes_get_a_line_each_and_one_refusal_is_a_failure(
    node: FakeNode, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"gpu1": drained("gpu1"), "gpu22": {"status": "error", "message": "[b]gone", "type": "peer_error"}}
    node.answers[DRAIN] = (502, {"status": "error", "message": "1 of 2 nodes did it", "nodes": answers})
    assert run(["drain", "*"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "gpu1   gpu1 takes no new work; 0 requests are still served",
        "gpu22  [b]gone",
    ]


def test_an_unknown_node_points_to_the_list(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    status, envelope = node.error(400, "invalid_request_error", "there is no node 'x'; there are: gpu1, gpu2")
    envelope["error"]["param"] = "node"
    node.answers[DRAIN] = (status, {"status": "error", **envelope})
    assert run(["drain", "x"]) == 1
    error = capsys.readouterr().err
    assert "there are: gpu1, gpu2" in error
    assert "'llama-mesh nodes' lists them." in error


# --- waiting


def test_nothing_to_wait_for(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers[DRAIN] = (200, drained("gpu2"))
    assert run(["drain", "--wait"]) == 0
    assert capsys.readouterr().out.endswith("\nno requests are left\n")
    assert len(node.asked) == 1


def test_wait_until_this_nodes_requests_have_ended(
    node: FakeNode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says of itself is as of now: it needs no record."""
    node.answers[DRAIN] = (200, drained("gpu2", 2))
    own = [(200, nodes(gpu2={"draining": True, "current_requests": count})) for count in (2, 1, 1, 0)]
    answers_in_turn(monkeypatch, node, *own)
    assert run(["drain", "--wait", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["seconds"] >= 0
    assert captured.err.splitlines() == ["gpu2: 2 requests are left", "gpu2: 1 request is left"]


def test_another_nodes_record_from_before_says_nothing(
    node: FakeNode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been idle a minute ago; it said itself that it has work."""
    node.answers[DRAIN] = (200, drained("gpu1", 1))
    answers_in_turn(monkeypatch, node, peer(0, 60.0, draining=False), peer(0, 60.0), peer(1), peer(0))
    assert run(["drain", "gpu1", "--wait"]) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["gpu1: not heard of yet", "gpu1: 1 request is left"]
    assert captured.out.endswith("no requests are left\n")


def test_all_that_had_work_are_waited_for(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"gpu0": drained("gpu0", 0), "gpu1": drained("gpu1", 1), "gpu2": drained("gpu2", 1)}
    node.answers[DRAIN] = (200, {"status": "ok", "message": "", "nodes": answers})
    gone = {"draining": True, "current_requests": 0, "record_age_s": 0.0}
    one, none = {**gone, "current_requests": 1}, gone
    answers_in_turn(
        monkeypatch,
        node,
        (200, nodes(gpu1=none, gpu2={**one, "record_age_s": None})),
        (200, nodes(gpu1=one, gpu2={**none, "record_age_s": None})),  # gpu1 is done, whatever it says later
    )
    assert run(["drain", "*", "--wait"]) == 0


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (peer(1, status="dead"), "gpu1 is gone"),
        ((200, {"nodes": {}}), "gpu1 is gone"),
        (peer(1, draining=False), "gpu1 is not drained any more"),
    ],
)
def test_what_ends_the_wait_early(
    node: FakeNode,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    entry: tuple[int, Any],
    said: str,
) -> None:
    node.answers[DRAIN] = (200, drained("gpu1", 1))
    answers_in_turn(monkeypatch, node, peer(1), entry)
    assert run(["drain", "gpu1", "--wait"]) == 1
    assert said in capsys.readouterr().err


def test_a_look_may_fail_but_not_for_ever(
    node: FakeNode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node.answers[DRAIN] = (200, drained("gpu1", 1))
    silent = node.error(500, "internal_error", "it stumbled")
    answers_in_turn(monkeypatch, node, *[silent] * 4, peer(1), *[silent] * 4, peer(0))
    assert run(["drain", "gpu1", "--wait"]) == 0
    answers_in_turn(monkeypatch, node, *[silent] * 5)
    assert run(["drain", "gpu1", "--wait"]) == 1
    assert "it stumbled" in capsys.readouterr().err


def test_on_a_terminal_one_line_tells_what_is_left(
    node: FakeNode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(stderr=True, force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr(command, "stderr_console", lambda: console)
    node.answers[DRAIN] = (200, drained("gpu1", 7))
    answers_in_turn(monkeypatch, node, peer(7), peer(0))
    assert run(["drain", "gpu1", "--wait"]) == 0
    assert "gpu1: 7 requests are left" in capsys.readouterr().err
