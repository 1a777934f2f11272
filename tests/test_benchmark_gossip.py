"""The gossip benchmark, small: the five figures are there, and nobody is wrongly held for dead."""

from __future__ import annotations

import json

import pytest

from benchmarks import gossip


@pytest.mark.parametrize(("nodes", "loss"), [(10, 0.0), (30, 0.02)])
def test_the_last_line_has_the_figures(nodes: int, loss: float, capsys: pytest.CaptureFixture[str]) -> None:
    assert gossip.main(["--nodes", str(nodes), "--loss", str(loss), "--json", "--check"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == [
        "nodes",
        "rounds_to_converge",
        "bytes_per_node_per_s",
        "false_deaths",
        "detect_rounds_p99",
    ]
    assert found["nodes"] == nodes
    assert found["rounds_to_converge"] <= 15
    assert found["false_deaths"] == 0
    assert 0 < found["bytes_per_node_per_s"] < 5000
    assert 3 < found["detect_rounds_p99"] < 15


def test_the_same_seed_gives_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for _ in range(2):
        gossip.main(["--nodes", "12", "--seed", "5", "--json"])
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1]


def test_a_mesh_of_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        gossip.main(["--nodes", "1"])
    assert raised.value.code == 2
