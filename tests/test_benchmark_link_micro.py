"""The link benchmark runs and says what it promises. Its figures are nobody's to assert: the machine has other work."""

from __future__ import annotations

import json

import msgspec
import pytest

from benchmarks import link_micro


def test_the_last_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    link_micro.main(["--json", "--scale", "0.001"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == set(link_micro.Figures.__struct_fields__)


def test_every_figure_was_measured() -> None:
    figures = msgspec.structs.asdict(link_micro.measure(scale=0.001, rounds=1))
    assert all(0 <= value < 1e9 for value in figures.values())
    for name in ("link_mb_per_s", "tcp_mb_per_s", "link_events_per_s", "tcp_events_per_s"):
        assert figures[name] > 0
    assert figures["handshake_initiator_us"] > 1


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    link_micro.main(["--scale", "0.001"])
    assert len(capsys.readouterr().out.splitlines()) == len(link_micro.Figures.__struct_fields__)
