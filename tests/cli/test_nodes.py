"""`nodes`: the table, what it makes of each state, and the watch that outlives a silent node."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from mesh.cli import nodes as command
from mesh.cli.main import run
from tests.cli.fake_node import FakeNode
from tests.cli.mesh_answers import OWN, PEER, nodes

ANSWER = "GET /cluster/nodes"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def table(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]


def after_each_pause(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> list[float]:
    """Let *steps* happen in the pauses of a watch, one each; in the one after the last, Ctrl-C."""
    waited: list[float] = []
    left = list(steps)

    def pause(seconds: float) -> None:
        waited.append(seconds)
        if not left:
            raise KeyboardInterrupt
        left.pop(0)()

    monkeypatch.setattr(command, "pause", pause)
    return waited


def test_this_node_is_first_and_marked_the_others_by_name(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers[ANSWER] = (200, nodes(gpu3={}, gpu0={"rtt_ms": None, "record_age_s": 0.2}))
    assert run(["nodes"]) == 0
    head, own, *others = table(capsys.readouterr().out)
    assert head == [
        "NODE", "STATUS", "ADDRESS", "VERSION", "MODELS", "REQUESTS", "QUEUED", "MEMORY", "RTT", "CIRCUIT", "AGE"
    ]  # fmt: skip
    assert own == [
        "gpu2 (this)", "alive", "0.0.0.0:8080", "0.5.0", "1/2", "3", "1", "vram 13,000/24,000 MiB", "-", "-", "-"
    ]  # fmt: skip
    assert [row[0] for row in others] == ["gpu0", "gpu1", "gpu3"]
    assert others[1] == [
        "gpu1", "alive", "192.168.1.20:8080", "0.5.0", "0/2", "0", "0", "ram 512 MiB", "1.23 ms", "half-open", "1m"
    ]  # fmt: skip
    assert others[0][8:] == ["-", "half-open", "0s"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "alive"),
        ({"status": "suspect"}, "suspect"),
        ({"status": "dead", "draining": True, "rejected": "old"}, "dead"),
        ({"draining": True, "ready": False}, "draining"),
        ({"rejected": "its version is rejected", "draining": True}, "rejected"),
        ({"ready": False}, "not ready"),
        ({"status": "suspect", "draining": True}, "draining"),
    ],
)
def test_the_status_is_what_matters_most(changes: dict[str, Any], said: str) -> None:
    assert command.status_of({**PEER, **changes}) == said


def test_why_a_node_is_rejected_stands_below(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever others call themselves is text, never markup."""
    why = "its version 9.0 is rejected (version_mismatch_action: reject_any)"
    node.answers[ANSWER] = (200, nodes(**{"[red]gpu9[/]": {"rejected": why, "version": "9.0"}}))
    assert run(["nodes"]) == 0
    assert f"\n[red]gpu9[/]: {why}\n" in capsys.readouterr().out


def test_a_node_alone_and_an_older_one_can_be_shown(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    """trap 66: everything that an older node does not tell is a dash."""
    node.answers[ANSWER] = (200, {"nodes": {"n": {"node_id": "n", "self": True}}})
    assert run(["nodes"]) == 0
    _, own = table(capsys.readouterr().out)
    assert own == ["n (this)", "alive", "-", "-", "0/0", "0", "0", "-", "-", "-", "-"]


def test_json_is_what_the_node_said(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers[ANSWER] = (200, nodes())
    assert run(["nodes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == nodes()


def test_a_watch_in_a_pipe_prints_one_table_after_the_other(
    node: FakeNode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is the normal end."""
    node.answers[ANSWER] = (200, nodes())
    busy = (200, nodes(gpu1={"current_requests": 42}))
    waited = after_each_pause(monkeypatch, lambda: node.answers.update({ANSWER: busy}))
    assert run(["nodes", "--watch", "5"]) == 0
    first, second = capsys.readouterr().out.split("NODE")[1:]
    assert "42" not in first
    assert "42" in second
    assert waited == [5.0, 5.0]


def test_a_silent_node_does_not_end_the_watch(
    node: FakeNode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node.answers[ANSWER] = (200, nodes())
    silent = node.error(500, "internal_error", "it stumbled")
    after_each_pause(
        monkeypatch,
        lambda: node.answers.update({ANSWER: silent}),
        lambda: node.answers.update({ANSWER: (200, nodes(gpu1={"status": "dead"}))}),
    )
    assert run(["nodes", "--watch"]) == 0
    captured = capsys.readouterr()
    _, first, second, third = captured.out.split("NODE")
    assert "it stumbled" in first  # right after the table of before
    assert "gpu2 (this)" in second
    assert "it stumbled" not in second + third
    assert "dead" in third
    assert captured.err == ""


def test_on_a_terminal_the_table_is_redrawn(
    node: FakeNode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "stdout_console", lambda: Console(width=70, force_terminal=True, color_system=None))
    node.answers[ANSWER] = (200, nodes())
    silent = node.error(500, "internal_error", "it stumbled")
    waited = after_each_pause(monkeypatch, lambda: node.answers.update({ANSWER: silent}))
    assert run(["nodes", "--watch"]) == 0
    text = capsys.readouterr().out
    assert "\x1b[1A" in text or "\x1b[2K" in text
    frames = ESCAPE.sub("", text).split("NODE")[1:]
    assert "ADDRESS" not in frames[0]  # 70 columns: what matters least is left out
    assert "it stumbled" in frames[-1]
    assert waited == [2.0, 2.0]


def test_a_watch_as_json_is_one_line_for_each_look(
    node: FakeNode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node.answers[ANSWER] = (200, nodes())
    silent = node.error(503, "draining", "it goes")
    after_each_pause(monkeypatch, lambda: node.answers.update({ANSWER: silent}))
    assert run(["nodes", "--watch", "--json"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["nodes"]["gpu2"] == OWN
    assert second["error"]["message"] == "it goes"


def test_a_wrong_key_ends_even_a_watch(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers[ANSWER] = node.error(401, "authentication_error", "Unauthorized")
    assert run(["nodes", "--watch"]) == 1
    assert "--key" in capsys.readouterr().err
