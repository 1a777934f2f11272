"""`check`: all mistakes with their places, or what the files amount to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mesh.cli.main import run

COOKBOOK = """
models:
  - name: Qwen3
    profiles:
      - id: default
        model_path: {model}
        llama_server_args: "-c 4096"
        aliases: [qwen]
        estimated_vram_mb: 9000
      - id: hub
        hf_repo: org/repo
        hf_file: a.gguf
        llama_server_args: ""
"""


def test_good_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    (tmp_path / "cookbook.yaml").write_text(COOKBOOK.format(model=model))
    assert run(["check"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("ok")
    assert "config    none, all defaults" in out
    assert "vram 9000 MiB" in out
    assert "hf:org/repo/a.gguf" in out
    assert "(missing)" not in out
    model.unlink()
    assert run(["check"]) == 0
    assert f"{model} (missing)" in capsys.readouterr().out


def test_good_files_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.yaml").write_text(COOKBOOK.format(model="nowhere.gguf"))
    assert run(["check", "--json", "--cookbook", "book.yaml"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is True
    assert [(p["key"], p["aliases"], p["model_file_missing"]) for p in result["profiles"]] == [
        ("qwen3:default", ["qwen"], True),
        ("qwen3:hub", [], False),
    ]
    assert result["engine"]["found"] in (True, False)


def test_every_mistake_is_listed_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("max_hops: many\n\nlisten_adr: x\n")
    assert run(["check"]) == 1
    out = capsys.readouterr().out
    assert "config.yaml:1: max_hops" in out
    assert "config.yaml:3: listen_adr" in out
    assert out.rstrip().endswith("2 mistakes")
    assert run(["check", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert [(error["file"], error["line"]) for error in result["errors"]] == [("config.yaml", 1), ("config.yaml", 3)]


def test_a_missing_engine_is_a_remark_with_the_ways_to_get_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("llama_cpp: {binary_path: /nowhere/llama-server}\n")
    assert run(["check"]) == 0
    assert "/nowhere/llama-server" in capsys.readouterr().out
