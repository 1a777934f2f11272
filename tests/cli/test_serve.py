"""`serve`: what it hands to the node. The node itself has tests of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.cli import parser
from mesh.cli.main import run
from mesh.cli.serve import load_with_flags
from mesh.config.loader import Loaded


def _loaded(*argv: str) -> Loaded:
    return load_with_flags(parser.parse(argv))


def test_without_files_and_flags_everything_has_a_default() -> None:
    loaded = _loaded()
    assert loaded.settings.listen == ("127.0.0.1", 8080)
    assert loaded.catalog.profiles == ()


@pytest.mark.parametrize(
    ("flags", "listen"),
    [
        (["--port", "9000"], ("10.0.0.1", 9000)),
        (["--host", "0.0.0.0"], ("0.0.0.0", 7000)),
        (["--host", "::1", "--port", "1"], ("::1", 1)),
    ],
)
def test_flags_win_over_files(tmp_path: Path, flags: list[str], listen: tuple[str, int]) -> None:
    """Trap 68: an IPv6 address gets its brackets."""
    (tmp_path / "config.yaml").write_text("listen_addr: '10.0.0.1:7000'\n")
    assert _loaded(*flags).settings.listen == listen


def test_log_level_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMESH_LOGGING__LEVEL", "error")
    assert _loaded().settings.logging.level == "error"
    assert _loaded("--log-level", "debug").settings.logging.level == "debug"


def test_the_variables_of_other_commands_are_no_unknown_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMESH_URL", "http://x:1")
    monkeypatch.setenv("LLAMESH_API_KEY", "secret")
    assert _loaded().warnings == ()


def test_a_broken_file_is_exit_1_with_every_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("max_hops: many\nlisten_adr: x\n")
    (tmp_path / "cookbook.yaml").write_text("models:\n  - nam: x\n")
    assert run(["serve"]) == 1
    error = capsys.readouterr().err
    assert "config.yaml:1: max_hops" in error
    assert "config.yaml:2: listen_adr" in error
    assert "cookbook.yaml:2: models[0].nam" in error


def test_a_missing_file_that_was_named_is_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--config", "nowhere.yaml"]) == 1
    assert "nowhere.yaml" in capsys.readouterr().err
