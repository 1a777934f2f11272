"""`check`: all mistakes with their places, or what the files amount to."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mesh.cli.main import run
from mesh.core.devices import Devices, Gpu
from mesh.engine import locate
from mesh.engine.locate import EngineBinary
from mesh.errors import EngineMissingError
from mesh.host.devices import DeviceReader
from tests.tiny_models import write_chat
from tests.tiny_whisper import write_whisper

ROOT = Path(__file__).parents[2]
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


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An embedded engine on Linux, whatever this machine has."""
    found = EngineBinary((sys.executable, "embedded.py"), "b1", "embedded")
    monkeypatch.setattr(locate, "find_engine", lambda settings: found)
    monkeypatch.setattr("sys.platform", "linux")
    return monkeypatch


@pytest.mark.usefixtures("embedded")
def test_good_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.gguf"
    write_chat(model)
    (tmp_path / "cookbook.yaml").write_text(COOKBOOK.format(model=model))
    assert run(["check"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("ok")
    assert "config    none, all defaults" in out
    assert "vram 9000 MiB" in out
    assert "hf:org/repo/a.gguf" in out
    assert "(missing)" not in out
    assert "warning" not in out
    model.unlink()
    assert run(["check"]) == 0
    assert f"{model} (missing)" in capsys.readouterr().out


@pytest.mark.usefixtures("embedded")
def test_good_files_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.yaml").write_text(COOKBOOK.format(model="nowhere.gguf"))
    assert run(["check", "--json", "--cookbook", "book.yaml"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is True
    assert [(p["key"], p["aliases"], p["model_file_missing"]) for p in result["profiles"]] == [
        ("qwen3:default", ["qwen"], True),
        ("qwen3:hub", [], False),
    ]
    assert result["engine"]["found"] is True


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


@pytest.mark.parametrize("missing", ["/nowhere/llama-server", "notes.txt"])
def test_an_engine_that_cannot_run_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    (tmp_path / "notes.txt").write_text("not executable")
    (tmp_path / "config.yaml").write_text(f"llama_cpp: {{binary_path: {missing}}}\n")
    assert run(["check"]) == 1
    out = capsys.readouterr().out
    assert missing in out
    assert not out.rstrip().endswith("ok")
    assert run(["check", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["engine"]["found"]) == (False, False)
    assert missing in result["errors"][0]["message"]


def test_no_engine_at_all_is_a_failure(embedded: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none(settings: object) -> EngineBinary:
        raise EngineMissingError("no llama-server found. Either ...")

    embedded.setattr(locate, "find_engine", none)
    assert run(["check"]) == 1
    assert "no llama-server found. Either" in capsys.readouterr().out


def test_what_the_embedded_engine_cannot_do_is_warned_of(
    embedded: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chat(tmp_path / "m.gguf")
    args = {"gpu": "-ngl 99", "all": "--gpu-layers=all", "cpu": "-ngl 0"}
    profiles = [{"id": id, "llama_server_args": f"-m m.gguf {words}"} for id, words in args.items()]
    profiles += [{"id": "hub", "hf_repo": "a/b"}, {"id": "flag", "llama_server_args": "-hf a/b"}]
    (tmp_path / "cookbook.yaml").write_text(json.dumps({"models": [{"name": "m", "profiles": profiles}]}))
    embedded.setattr("platform.machine", lambda: "aarch64")
    assert run(["check"]) == 0
    out = capsys.readouterr().out
    assert "engine    embedded (CPU only) llama-server, b1" in out
    warned = [line.split(": ")[2:4] for line in out.splitlines() if line.startswith("warning: ")]
    assert [profile for profile, _ in warned] == ["m:gpu", "m:all", "m:hub", "m:flag"]
    assert "99 GPU layers have no effect" in warned[0][1]
    assert "cannot download" in warned[2][1]
    embedded.setattr("platform.machine", lambda: "x86_64")
    assert run(["check"]) == 0
    assert "cannot download" not in capsys.readouterr().out


@pytest.mark.usefixtures("embedded")
def test_the_file_is_the_one_that_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """-m in the arguments goes before model_path."""
    profile = {"model_path": "other.gguf", "llama_server_args": "-m gone.gguf"}
    (tmp_path / "cookbook.yaml").write_text(json.dumps({"models": [{"name": "m", "profiles": [profile]}]}))
    assert run(["check", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["profiles"]
    assert (shown["model"], shown["model_file_missing"]) == ("gone.gguf", True)


def test_warnings_are_shown_beside_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMESH_AUTH_ENABLED", "true")
    (tmp_path / "config.yaml").write_text("max_hops: many\n")
    warning = "LLAMESH_AUTH_ENABLED: is not a setting and is ignored; did you mean 'LLAMESH_AUTH__ENABLED'?"
    assert run(["check"]) == 1
    assert capsys.readouterr().out.startswith(f"warning: {warning}\nconfig.yaml:1")
    assert run(["check", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["warnings"][0]["file"] == "LLAMESH_AUTH_ENABLED"
    assert run(["serve"]) == 1
    assert f"warning: {warning}" in capsys.readouterr().err


@pytest.mark.usefixtures("embedded")
def test_files_that_would_not_load_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """trap 48: a download that stopped has the right first bytes. Once each, and it may still be downloading."""
    write_chat(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.gguf").write_bytes(b"<html>")
    files = {"whole": "-c 512", "half": "", "page": "", "lost": "", "draft": "-m whole.gguf -md gone.gguf"}
    profiles = [{"id": id, "model_path": f"{id}.gguf", "llama_server_args": args} for id, args in files.items()]
    profiles[-1].pop("model_path")
    profiles += [{"id": "hub", "hf_repo": "a/b"}]
    (tmp_path / "cookbook.yaml").write_text(json.dumps({"models": [{"name": "m", "profiles": profiles}]}))
    assert run(["check", "--json"]) == 0
    warnings = {w["path"]: w["message"] for w in json.loads(capsys.readouterr().out)["warnings"]}
    assert sorted(warnings) == ["m:draft", "m:half", "models[0].profiles[2].model_path",
                                "models[0].profiles[3].model_path"]  # fmt: skip
    assert "half.gguf: is truncated: " in warnings["m:half"]
    assert "is the download complete?" in warnings["m:half"]
    assert "gone.gguf: there is no such file; it will not start" in warnings["m:draft"]


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{max_sysmem_mb: auto, max_vram_mb: auto}", [
            "estimated_sysmem_mb 9000 is more than the 8500 MiB",
            "estimated_vram_mb 23000 is more than the 22800 MiB",
        ]),
        ("{max_vram_mb_per_gpu: {0: 20000}}", ["estimated_vram_mb 23000 is more than the 20000 MiB"]),
        ("{}", []),  # 24,000 MiB, and main memory is not limited
    ],
)  # fmt: skip
def test_figures_above_the_budget_are_warned_of(
    config: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    devices = Devices("nvml", (Gpu("gpu0", "GPU-a", "A", 24000, 0),), 10000, 9000)
    monkeypatch.setattr(DeviceReader, "read", lambda self: devices)
    write_chat(tmp_path / "m.gguf")
    (tmp_path / "config.yaml").write_text(config)
    big = {"model_path": "m.gguf", "estimated_vram_mb": 23000, "estimated_sysmem_mb": 9000}
    small = {"id": "small", "model_path": "m.gguf", "estimated_vram_mb": 100, "estimated_sysmem_mb": 100}
    (tmp_path / "cookbook.yaml").write_text(json.dumps({"models": [{"name": "m", "profiles": [big, small]}]}))
    assert run(["check", "--json"]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert [w["message"].partition(" that this")[0] for w in warnings] == said
    assert all(w["message"].endswith("it is refused here until it was measured to need less") for w in warnings)


@pytest.mark.usefixtures("embedded")
def test_a_figure_above_a_number_in_the_configuration_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chat(tmp_path / "m.gguf")
    (tmp_path / "config.yaml").write_text("max_sysmem_mb: 50")
    profile = {"model_path": "m.gguf", "estimated_sysmem_mb": 60}
    (tmp_path / "cookbook.yaml").write_text(json.dumps({"models": [{"name": "m", "profiles": [profile]}]}))
    assert run(["check", "--json"]) == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert "more than all of max_sysmem_mb" in warning["message"]


FAKE_ENGINE = f'#!/bin/sh\nexec {sys.executable} -I -S {ROOT}/tests/fake_llama_server.py "$@"\n'


def fake_engine(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FAKE_ENGINE)
    path.chmod(0o755)
    return path


def test_a_cookbook_of_speech_needs_whisper_server_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("LLAMA_MESH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "config.yaml").write_text("llama_cpp: {binary_path: /nowhere/llama-server}")
    write_whisper(tmp_path / "m.bin")
    speech = {"engine": "whisper", "model_path": "m.bin", "llama_server_args": "-t 1"}
    (tmp_path / "cookbook.yaml").write_text(json.dumps({"models": [{"name": "m", "profiles": [speech]}]}))
    assert run(["check", "--json"]) == 1
    (error,) = json.loads(capsys.readouterr().out)["errors"]
    assert error["message"].startswith("no whisper-server found. Either set whisper_cpp.binary_path")
    fake_engine(tmp_path / "bin/whisper-server")
    assert run(["check", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["engine"]["found"], result["engines"]["whisper"]["source"], result["warnings"]) == (
        False,
        "path",
        [],
    )
    assert run(["check"]) == 0
    assert "engine    whisper: path whisper-server, unknown version" in capsys.readouterr().out


def test_what_another_engine_lacks_is_no_failure_if_there_is_something_to_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], embedded: pytest.MonkeyPatch
) -> None:
    embedded.setenv("PATH", "")
    embedded.setenv("LLAMA_MESH_CACHE", str(tmp_path / "cache"))
    write_whisper(tmp_path / "w.bin")
    write_chat(tmp_path / "m.gguf")
    models = [
        {"name": "m", "profiles": [{"model_path": "m.gguf"}]},
        {"name": "w", "profiles": [{"engine": "whisper", "model_path": "w.bin"}]},
    ]
    (tmp_path / "cookbook.yaml").write_text(json.dumps({"models": models}))
    assert run(["check"]) == 0
    out = capsys.readouterr().out
    assert "w will not start: no whisper-server found." in out
    assert out.rstrip().endswith("ok")
    (tmp_path / "cookbook.yaml").write_text(json.dumps({"models": models[1:]}))
    assert run(["check"]) == 1
    *_, reason, last = capsys.readouterr().out.splitlines()
    assert (reason.startswith("engine: no whisper-server found."), last) == (True, "1 mistake")


def test_flags_that_an_engine_does_not_know_are_told_for_each_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a profile whose file is missing, too: both keep it from starting."""
    fake_engine(tmp_path / "bin/old/llama-server")
    (tmp_path / "config.yaml").write_text(
        json.dumps({"builds": {"old": {"binary_path": "bin/old/llama-server"}, "new": {"repo_url": "https://x/y"}}})
    )
    write_chat(tmp_path / "m.gguf")
    words = {"args": "-c 512 --no-mmap", "old": "-c 512 --paralel 2", "ok": "-c 512 --parallel 2"}
    profiles = [{"id": id, "model_path": "m.gguf", "llama_server_args": args} for id, args in words.items()]
    profiles += [{"id": "lost", "model_path": "gone.gguf", "llama_server_args": "--bogus"}]
    for entry in profiles[1:3]:
        entry["engine_build"] = "old"
    (tmp_path / "cookbook.yaml").write_text(json.dumps({"models": [{"name": "m", "profiles": profiles}]}))
    assert run(["check", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    told = {w["path"]: w["message"] for w in result["warnings"] if w["path"].startswith("m:")}
    unknown = {
        "m:args": "llama-server b11549 (build default) does not know --no-mmap (use --load-mode none)",
        "m:old": "llama-server (build old) does not know --paralel (did you mean '--parallel'?)",
        "m:lost": "llama-server b11549 (build default) does not know --bogus",
    }
    assert told == {path: f"{what}; it will not start" for path, what in unknown.items()}
    assert (result["builds"]["old"]["found"], result["builds"]["new"]["found"]) == (True, False)
    assert [profile["engine_build"] for profile in result["profiles"]] == [None, "old", "old", None]
    assert run(["check"]) == 0
    out = capsys.readouterr().out
    assert "build     old: configured llama-server, unknown version" in out
    assert "build     new: none: the llama-server of build 'new' is not built yet" in out


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize(("more", "status"), [({}, 1), ({"repo_url": "https://x/y"}, 0)])
def test_a_build_that_is_missing_is_a_failure_unless_the_node_makes_it(
    more: dict[str, str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"builds": {"cuda": more, "unused": {}}}))
    write_chat(tmp_path / "m.gguf")
    profile = {"model_path": "m.gguf", "engine_build": "cuda"}
    (tmp_path / "cookbook.yaml").write_text(json.dumps({"models": [{"name": "m", "profiles": [profile]}]}))
    assert run(["check", "--json"]) == status
    result = json.loads(capsys.readouterr().out)
    (problem,) = result["errors"] or result["warnings"]
    assert problem["message"].endswith("llama-mesh rebuild cuda")
    assert ("is not built yet" in problem["message"]) == bool(more)


def test_the_default_engine_need_not_be_there_if_nobody_runs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_engine(tmp_path / "own")
    config = {"llama_cpp": {"binary_path": "/nowhere/llama-server"}, "builds": {"own": {"binary_path": "own"}}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert run(["check"]) == 1
    profile = {"llama_server_args": "-hf a/b", "engine_build": "own"}
    (tmp_path / "cookbook.yaml").write_text(json.dumps({"models": [{"name": "m", "profiles": [profile]}]}))
    capsys.readouterr()
    assert run(["check"]) == 0
    assert "engine    none: llama_cpp.binary_path /nowhere/llama-server does not exist" in capsys.readouterr().out
