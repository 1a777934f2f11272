"""Which llama-server is run."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mesh.config.settings import LlamaCpp
from mesh.engine import embedded, locate
from mesh.engine.locate import find_engine
from mesh.errors import EngineMissingError


@dataclass
class Settings:
    binary_path: str
    model_fields_set: set[str] = field(default_factory=set)


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The embedded wheel's version as a list of one; empty PATH."""
    version: list[str | None] = [None]
    monkeypatch.setattr(locate, "_embedded_wheel", lambda: version[0])
    monkeypatch.setenv("PATH", "")
    return version


def test_a_configured_binary_is_resolved_at_each_start(tmp_path: Path) -> None:
    first = executable(tmp_path / "builds/build-0123abcd/bin/llama-server")
    second = executable(tmp_path / "builds/build-beefbeef1/bin/llama-server")
    link = tmp_path / "llama-server"
    link.symlink_to(first)
    settings = Settings(str(link), {"binary_path"})
    assert find_engine(settings) == locate.EngineBinary((str(first),), "0123abcd", "configured")
    link.unlink()
    link.symlink_to(second)
    assert find_engine(settings).version == "beefbeef1"


def test_a_binary_that_was_asked_for_and_is_missing_is_an_error(tmp_path: Path, wheel: list[str | None]) -> None:
    wheel[0] = "b1"
    with pytest.raises(EngineMissingError, match="does not exist"):
        find_engine(Settings(str(tmp_path / "none"), {"binary_path"}))
    with pytest.raises(EngineMissingError, match="is a directory"):
        find_engine(Settings(str(tmp_path), {"binary_path"}))


def test_the_embedded_wheel_comes_before_path(
    tmp_path: Path, wheel: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(executable(tmp_path / "llama-server").parent))
    default = Settings(str(tmp_path / "none"))
    assert find_engine(default) == locate.EngineBinary((str(tmp_path / "llama-server"),), None, "path")
    wheel[0] = "b1"
    found = find_engine(default)
    assert found.argv == (sys.executable, "-I", "-S", embedded.__file__)
    assert (found.source, found.version) == ("embedded", "b1")


def test_without_any_the_three_ways_are_told(tmp_path: Path, wheel: list[str | None]) -> None:
    with pytest.raises(EngineMissingError) as caught:
        find_engine(Settings(str(tmp_path / "none")))
    for way in ("llama_cpp.binary_path", "llama-mesh[engine]", "PATH"):
        assert way in caught.value.message


def test_the_real_settings_fit() -> None:
    assert not LlamaCpp().model_fields_set
    assert LlamaCpp(binary_path="/x").model_fields_set == {"binary_path"}


def test_only_the_pinned_wheel_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    look = locate._embedded_wheel.__wrapped__
    (tmp_path / "xllamacpp-2020.1.1.dist-info").mkdir()
    assert look() is None
    (tmp_path / f"xllamacpp-{embedded.PIN}.dist-info").mkdir()
    assert look() == "b11549"
