"""Directories and their names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mesh.build import layout
from mesh.build.compile import _environment, _generator
from mesh.build.layout import Manifest
from mesh.build.spec import BuildSpec, specs_of
from mesh.errors import BuildError

COMMIT = "1234567".ljust(40, "0")


@pytest.fixture
def spec(tmp_path: Path) -> BuildSpec:
    return BuildSpec(
        name="default",
        enabled=True,
        repo_url="https://example.org",
        repo_path=tmp_path / "repo_path",
        build_path=tmp_path / "build_path",
        binary_path=tmp_path / "binary_path",
        ref="master",
    )


def _settings(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "enabled": True,
            "repo_url": "https://example.org",
            "repo_path": "./llama.cpp",
            "build_path": "~/b/../build",
            "binary_path": "/opt/llama-server",
            "branch": "b1",
            "build_args": ["-DX=1"],
            "build_command_args": ("-j", "2"),
            "auto_update_interval_seconds": 60.0,
            "keep_builds": 2,
            "max_slowdown": 0.5,
            "canary_profile": "m:p",
            **changes,
        }
    )


def test_from_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    first, second = specs_of({"default": _settings(), "off": _settings(enabled=False)})
    assert first == BuildSpec(
        name="default",
        enabled=True,
        repo_url="https://example.org",
        repo_path=tmp_path / "llama.cpp",
        build_path=Path("/home/me/build"),
        binary_path=Path("/opt/llama-server"),
        ref="b1",
        build_args=("-DX=1",),
        build_command_args=("-j", "2"),
        auto_update_interval_s=60.0,
        keep_builds=2,
        max_slowdown=0.5,
        canary_profile="m:p",
    )
    assert specs_of({"x": _settings(repo_url="../llama.cpp")})[0].repo_url == str(tmp_path.parent / "llama.cpp")
    assert specs_of({"x": _settings(repo_url="git@host:x")})[0].repo_url == "git@host:x"
    assert (first.made, second.made, specs_of({"x": _settings(repo_url=None)})[0].made) == (True, False, False)


def test_the_first_name_that_is_free(spec: BuildSpec) -> None:
    def choose(*taboo: Path) -> str:
        return layout.choose_directory(spec, layout.look(spec), "1234567", COMMIT, taboo).name

    assert choose() == "build_path-1234567"
    first = spec.build_path.with_name("build_path-1234567")
    layout.begin(first, Manifest("default", COMMIT))
    assert choose() == "build_path-1234567", "half-built"
    assert choose(first) == "build_path.2-1234567"
    layout.begin(first, Manifest("another build", COMMIT))
    assert choose() == "build_path.2-1234567"
    first.with_name("build_path.2-1234567").write_text("a file")
    assert choose() == "build_path.3-1234567"


def test_somebody_elses_directory_is_never_chosen(spec: BuildSpec) -> None:
    """A date reads like a hash."""
    theirs = spec.build_path.with_name("build_path-20240607")
    theirs.mkdir()
    (theirs / "precious").touch()
    source = spec.build_path.with_name("build_path.2-20240607.src")
    source.mkdir()
    (source / "precious").touch()
    shelf = layout.look(spec)
    assert (shelf.found, shelf.sources) == ((), ())
    assert layout.choose_directory(spec, shelf, "20240607", COMMIT, ()).name == "build_path.3-20240607"


@pytest.mark.parametrize("evidence", ["mesh-build.json", "mesh-building.json", "bin/llama-server", "CMakeCache.txt"])
def test_what_shows_that_a_directory_is_ours(spec: BuildSpec, evidence: str) -> None:
    path = spec.build_path.with_name("build_path-1234567")
    (path / evidence).parent.mkdir(parents=True)
    (path / evidence).touch()
    source = spec.build_path.with_name("build_path-1234567.src")
    (source / "left").mkdir(parents=True)
    worktree = spec.build_path.with_name("build_path-7654321.src")
    worktree.mkdir()
    (worktree / ".git").write_text("gitdir: x")
    shelf = layout.look(spec)
    assert [each.path for each in shelf.found] == [path]
    assert shelf.sources == (source, worktree)


def test_the_link_is_replaced_whole(spec: BuildSpec, tmp_path: Path) -> None:
    for target in (tmp_path / "one", tmp_path / "two"):
        layout.swap(spec, target)
        assert spec.binary_path.readlink() == target
    assert [path.name for path in tmp_path.iterdir()] == ["binary_path"]


def test_a_directory_in_the_place_of_the_link(spec: BuildSpec, tmp_path: Path) -> None:
    spec.binary_path.mkdir()
    with pytest.raises(BuildError, match="move that file away, or set enabled: false"):
        layout.swap(spec, tmp_path / "one")


def test_a_place_that_cannot_be_written(spec: BuildSpec, tmp_path: Path) -> None:
    (tmp_path / "binary_path").symlink_to(tmp_path / "x")
    (tmp_path / "file").touch()
    spec = BuildSpec("default", True, "u", tmp_path, tmp_path, tmp_path / "file" / "llama-server", "master")
    with pytest.raises(BuildError, match=r"cannot put .* in place: "):
        layout.swap(spec, tmp_path / "one")


def test_ninja_unless_something_else_is_chosen(tmp_path: Path) -> None:
    ninja = tmp_path / "ninja"
    ninja.write_text("")
    ninja.chmod(0o755)
    path = str(tmp_path)
    assert _generator((), {}, path) == ("-G", "Ninja")
    assert _generator((), {}, "/nowhere") == ()
    assert _generator(("-GUnix Makefiles",), {}, path) == ()
    assert _generator(("-DX=1", "-G", "Ninja"), {}, path) == ()
    assert _generator(("--preset=x",), {}, path) == ()
    assert _generator((), {"CMAKE_GENERATOR": "Unix Makefiles"}, path) == ()


def test_tools_beside_our_python_are_found_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/venv/bin/python")
    assert _environment({"PATH": "/usr/bin"}, 1)["PATH"] == "/usr/bin:/venv/bin"
