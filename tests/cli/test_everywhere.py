"""What commands for several nodes share: whom they ask for, and a line for each answer."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from mesh.cli import everywhere
from mesh.cli.failure import CliError
from mesh.cli.node import Node
from tests.cli.fake_node import FakeNode


@pytest.mark.parametrize(
    ("node", "all_nodes", "expected"), [(None, False, {}), ("n", False, {"node": "n"}), (None, True, {"node": "*"})]
)
def test_the_target(node: str | None, all_nodes: bool, expected: dict[str, str]) -> None:
    assert everywhere.target(argparse.Namespace(node=node, everywhere=all_nodes)) == expected


def test_a_refusal_of_some_is_an_answer_and_one_of_all_an_error(node: FakeNode) -> None:
    some = {"status": "error", "message": "1 of 2 nodes did it", "nodes": {"a": {"status": "ok"}}}
    node.answers["POST /x"] = (503, some)
    answer = everywhere.post(Node(node.url), "/x", {})
    assert answer == some
    assert everywhere.status(answer) == 1
    assert everywhere.status({"status": "ok"}) == 0
    for bad in ({"status": "error", "message": "no"}, ["no"], "no JSON", {"message": "no", "nodes": 5}):
        node.answers["POST /x"] = (503, bad)
        with pytest.raises(CliError, match="no"):
            everywhere.post(Node(node.url), "/x", {})


def test_lines_are_text_and_stand_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    answers: dict[str, Any] = {"a": {"status": "ok"}, "[b]long": {"status": "error", "message": "[i]why", "type": "t"}}
    everywhere.print_each({"status": "error", "nodes": answers}, lambda said: "done")
    assert capsys.readouterr().out == "a        done\n[b]long  [i]why\n"
