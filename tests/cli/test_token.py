"""`token show` and `token new`."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest

from mesh.cli.main import run
from tests.cli.cluster import TOKEN


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CLUSTER_TOKEN", raising=False)
    return tmp_path / ".llama-mesh"


def test_new_makes_it_and_show_prints_nothing_else(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["token", "new"]) == 0
    made = capsys.readouterr()
    token = made.out.strip()
    assert len(token) == 48
    assert "llama-mesh join THIS-HOST --token - " in made.err
    path = home / "cluster.token"
    assert path.read_text() == f"{token}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert run(["token", "show"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{token}\n"
    assert str(path) in shown.err.replace("\n", "")
    assert "secret" not in shown.err


def test_new_replaces_nothing_unless_forced(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["token", "new"])
    first = capsys.readouterr().out
    assert run(["token", "new"]) == 1
    refused = capsys.readouterr()
    assert refused.out == ""
    assert "Use --force to replace it" in refused.err
    assert (home / "cluster.token").read_text() == first
    assert run(["token", "new", "--force"]) == 0
    second = capsys.readouterr().out
    assert second != first
    assert (home / "cluster.token").read_text() == second


def test_json(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["token", "new", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["path"] == str(home / "cluster.token")
    assert made["hidden_by_environment"] is False
    assert run(["token", "show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "token": made["token"], "source": made["path"], "warning": None,
    }  # fmt: skip
    monkeypatch.setenv("CLUSTER_TOKEN", TOKEN)
    assert run(["token", "show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "token": TOKEN, "source": "CLUSTER_TOKEN", "warning": None,
    }  # fmt: skip


def test_the_variable_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CLUSTER_TOKEN", TOKEN)
    assert run(["token", "new"]) == 0
    assert "CLUSTER_TOKEN is set and wins over the file" in capsys.readouterr().err
    assert run(["token", "show"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{TOKEN}\n"
    assert "from CLUSTER_TOKEN in the environment" in shown.err


def test_a_terminal_is_warned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(["token", "new"])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(["token", "show"]) == 0
    assert "this is a secret" in capsys.readouterr().err


def test_none_yet(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["token", "show"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "Make one with 'llama-mesh token new'" in error
    assert "'llama-mesh join HOST --token -'" in error


def test_one_that_can_be_guessed_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CLUSTER_TOKEN", "homelab-cluster-1")
    assert run(["token", "show"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "homelab-cluster-1\n"
    assert "does not look random" in shown.err
    assert "'llama-mesh token new' makes a good one" in " ".join(shown.err.split())
    assert run(["token", "show", "--json"]) == 0
    assert "does not look random" in json.loads(capsys.readouterr().out)["warning"]


def test_the_directory_of_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(f"cluster: {{noise: {{config_dir: {tmp_path}/state}}}}\n")
    assert run(["token", "new", "--config", str(config)]) == 0
    assert (tmp_path / "state/cluster.token").exists()


def test_a_file_that_cannot_be_written(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.touch()
    assert run(["token", "new"]) == 1
    assert f"cannot write {home}/cluster.token: Not a directory" in capsys.readouterr().err


def test_a_file_that_others_may_read(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["token", "new"])
    (home / "cluster.token").chmod(0o644)
    assert run(["token", "show"]) == 1
    assert f"chmod 600 {home}/cluster.token" in capsys.readouterr().err
