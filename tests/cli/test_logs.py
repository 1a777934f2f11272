"""`logs`: lines as they come; Ctrl-C is the normal end of following."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.cli.main import run
from tests.cli.fake_node import FakeNode

ROOT = Path(__file__).parents[2]
LOG = "main: loading model\nsrv: [all slots] are idle é\n"


def test_prints_the_kept_lines(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers["GET /admin/logs"] = (200, LOG)
    assert run(["logs", "qwen3:fast"]) == 0
    assert node.asked[-1].query == {"model": ["qwen3:fast"], "follow": ["false"]}
    assert capsys.readouterr().out == LOG
    assert run(["logs", "--json", "qwen3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[1]) == {"line": "srv: [all slots] are idle é"}


def test_unknown_models_are_a_failure(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers["GET /admin/logs"] = node.error(404, "model_not_found", "Model 'x' not found")
    assert run(["logs", "x"]) == 1
    assert "Model 'x' not found" in capsys.readouterr().err


def test_following_prints_at_once_and_ctrl_c_ends_it_well(node: FakeNode) -> None:
    node.answers["GET /admin/logs"] = (200, LOG)
    command = [sys.executable, "-m", "mesh", "logs", "-f", "qwen3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "main: loading model\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr.read() == ""


def test_a_log_that_ends_while_it_is_followed_is_told(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers["GET /admin/logs"] = (200, LOG)
    node.end_of_log.set()
    assert run(["logs", "-f", "qwen3"]) == 1
    captured = capsys.readouterr()
    assert captured.out == LOG
    assert "shutting down" in captured.err
