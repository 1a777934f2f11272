"""`version`: ours and the engine's, whatever state the files are in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mesh import __version__
from mesh.cli.main import run


def test_prints_both_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version"]) == 0
    out = capsys.readouterr().out
    assert f"llama-mesh    {__version__}" in out
    assert "llama-server  " in out


def test_a_broken_configuration_is_told_and_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("nonsense: 1\n")
    assert run(["version", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["llama_mesh"] == __version__
    assert "config.yaml:1: nonsense" in result["engine"]["reason"]
