"""Learned figures over restarts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mesh.core.footprint import Learned
from mesh.engine import learned as module
from mesh.engine.learned import LearnedFigures


def test_peaks_are_kept() -> None:
    figures = LearnedFigures(None)
    assert figures.get("k") is None
    figures.add("k", "m", 500, {"gpu0": 3000, "gpu1": 0}, first=True)
    figures.add("k", "m", 900, {"gpu0": 2000, "gpu1": 2500}, first=False)
    figures.add("k", "m", 400, None, first=True)
    assert figures.get("k") == Learned(400, 900, 4500, 2, 2), "the least at first: the other had prompts cached"


def test_a_driver_that_says_nothing_is_not_taken_for_zero() -> None:
    """In a container the driver's process ids are the host's: there is no process of ours in its list."""
    figures = LearnedFigures(None)
    for gpu_mib in (None, {}, {"gpu0": 0}):
        figures.add("k", "m", 500, gpu_mib, first=False)
    assert figures.get("k") == Learned(0, 500)


async def test_figures_survive_a_restart(tmp_path: Path) -> None:
    """trap 47, trap 97"""
    path = tmp_path / "state" / "footprints.json"
    before = LearnedFigures(path)
    before.restore()
    before.add("k", "m", 500, {"gpu0": 3000}, first=True)
    assert await before.save()
    assert [file.name for file in path.parent.iterdir()] == ["footprints.json"]
    assert json.loads(path.read_text())["launches"]["k"]["model"] == "m"
    after = LearnedFigures(path)
    after.restore()
    assert after.get("k") == before.get("k") == Learned(500, 500, 3000, 1, 1)


async def test_only_a_change_is_written(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    figures = LearnedFigures(path)
    assert await figures.save()
    assert not path.exists()
    figures.add("k", "m", 500, None, first=True)
    assert await figures.save()
    path.unlink()
    figures.add("k", "m", 400, None, first=False)
    assert await figures.save()
    assert not path.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"version": 1}',
        b'{"version": 2, "launches": {}}',
        b'{"version": 1, "launches": {"k": {"model": "m", "ready_ram_mib": "x", "peak_ram_mib": 1}}}',
        b"[" * 100_000,
    ],
)
async def test_a_file_that_is_no_good_costs_its_content_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    """trap 97"""
    path = tmp_path / "f.json"
    path.write_bytes(content)
    figures = LearnedFigures(path)
    with caplog.at_level(logging.WARNING):
        figures.restore()
    assert "learned anew" in caplog.text
    assert str(path) in caplog.text
    figures.add("k", "m", 1, None, first=True)
    assert await figures.save()
    assert json.loads(path.read_text())["version"] == 1


def test_figures_that_cannot_be_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    record = {"model": "m", "ready_ram_mib": 1, "peak_ram_mib": -5}
    path.write_text(json.dumps({"version": 1, "launches": {"k": record}, "new": 1}))
    figures = LearnedFigures(path)
    figures.restore()
    assert figures.get("k") is None


async def test_a_directory_that_cannot_be_written_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    figures = LearnedFigures(tmp_path / "file" / "f.json")
    for ram_mib in (1, 2):
        figures.add("k", "m", ram_mib, None, first=False)
        assert not await figures.save()
    assert caplog.text.count("cannot write") == 1


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 2)
    figures = LearnedFigures(None)
    for key in ("a", "b"):
        figures.add(key, "m", 1, None, first=True)
    figures.add("a", "m", 2, None, first=True)
    figures.add("c", "m", 1, None, first=True)
    assert [key for key in "abc" if figures.get(key)] == ["a", "c"]
