"""`route`: who would serve a model, in which order, and why."""

from __future__ import annotations

import json
import re

import pytest
from rich.console import Console

from mesh.cli import route as command
from mesh.cli.main import run
from tests.cli.fake_node import FakeNode
from tests.cli.mesh_answers import candidate, route

ANSWER = "GET /admin/route"


def table(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]


def test_candidates_with_the_terms_as_columns_and_the_reasons_of_the_first(
    node: FakeNode, capsys: pytest.CaptureFixture[str]
) -> None:
    node.answers[ANSWER] = (
        200,
        route(
            candidate("gpu1", 1.5, reasons=["decode 1.5 s: 200 tokens at 133/s"]),
            candidate("gpu2", 123.4, self=True, reasons=["load 121.9 s: not loaded"]),
            candidate("[b]gpu3", None, excluded="circuit open for another 4.0 s"),
        ),
    )
    assert run(["route", "qwen3"]) == 0
    lines = table(capsys.readouterr().out)
    assert lines == [
        ["NODE", "COST", "QUEUE", "LOAD", "DECODE", "EXCLUDED"],
        ["gpu1", "1.50 s", "0.00 s", "0.00 s", "1.50 s", "-"],
        ["gpu2 (this)", "123 s", "0.00 s", "122 s", "1.50 s", "-"],
        ["[b]gpu3", "-", "-", "-", "-", "circuit open for another 4.0 s"],
        ["gpu1 would serve qwen3:"],
        ["decode 1.5 s: 200 tokens at 133/s"],
        ["for a prompt of 1000 tokens"],
    ]


def test_what_is_asked(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers[ANSWER] = (200, route(candidate("gpu1", 12.34), max_tokens=7))
    assert run(["route", "org/a model:x&y", "--prompt-tokens", "30000", "--max-tokens", "7"]) == 0
    query = {"model": ["org/a model:x&y"], "prompt_tokens": ["30000"], "max_tokens": ["7"]}
    assert node.asked[-1].query == query
    text = capsys.readouterr().out
    assert "12.3 s" in text
    assert "and an answer of at most 7" in text
    assert "EXCLUDED" not in text
    assert run(["route", "qwen3"]) == 0
    assert node.asked[-1].query == {"model": ["qwen3"]}


def test_nobody_can_serve_it(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers[ANSWER] = (200, route(candidate("gpu1", excluded="draining", reasons=["draining"])))
    assert run(["route", "qwen3"]) == 0
    text = capsys.readouterr().out
    assert "draining" in text
    assert "No node can serve qwen3 now." in text
    node.answers[ANSWER] = (200, route())
    assert run(["route", "qwen3"]) == 0
    assert capsys.readouterr().out.strip() == "No node has qwen3."


def test_the_excluded_are_faint(
    node: FakeNode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(width=100, force_terminal=True, color_system="standard", highlight=False)
    monkeypatch.setattr(command, "stdout_console", lambda: console)
    monkeypatch.delenv("NO_COLOR", raising=False)
    node.answers[ANSWER] = (200, route(candidate("gpu1", 1.5), candidate("gpu3", excluded="draining")))
    assert run(["route", "qwen3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not lines[1].startswith("\x1b[2m")
    assert lines[2].startswith("\x1b[2mgpu3")


def test_json_is_what_the_node_said(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    answer = route(candidate("gpu1", 1.5))
    node.answers[ANSWER] = (200, answer)
    assert run(["route", "qwen3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == answer


def test_an_unknown_model_points_to_the_list(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers[ANSWER] = node.error(404, "model_not_found", "Model 'x' not found in local cookbook or any peer")
    assert run(["route", "x"]) == 1
    assert "llama-mesh models" in capsys.readouterr().err
