"""The cache: where it is, one who fills it at a time, and nothing in it that is not what it should be."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import threading
from pathlib import Path

import pytest
from rich.console import Console

from mesh.cli import cache
from mesh.cli.failure import CliError
from mesh.cli.package_index import PinnedFile

CONTENT = b"x" * 1000
FILE = PinnedFile("thing", "thing.bin", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"LLAMA_MESH_CACHE": "/data/cache"}, "/data/cache"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/llama-mesh"),
        ({}, str(Path.home() / ".cache/llama-mesh")),
    ],
)
def test_where_it_is(environ: dict[str, str], expected: str) -> None:
    assert str(cache.cache_dir(environ)) == expected


def test_the_second_says_that_it_waits_and_waits(tmp_path: Path) -> None:
    said = _Said()
    order: list[str] = []

    def second() -> None:
        with cache.locked(tmp_path, Console(file=said)):
            order.append("second")

    thread = threading.Thread(target=second)
    with cache.locked(tmp_path, Console(file=io.StringIO())):
        thread.start()
        assert said.anything.wait(10)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert "waiting for it" in " ".join(said.getvalue().split())  # lines end where the terminal does


class _Said(io.StringIO):
    """Tells a thread that something was written."""

    def __init__(self) -> None:
        super().__init__()
        self.anything = threading.Event()

    def flush(self) -> None:
        if self.getvalue():
            self.anything.set()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(CliError, match="cannot write to the cache") as caught,
        cache.locked(tmp_path / "file" / "cache", Console(file=io.StringIO())),
    ):
        pass
    assert "LLAMA_MESH_CACHE" in (caught.value.fix or "")


@pytest.mark.parametrize("content", [b"", CONTENT[:-1], CONTENT + b"x", b"y" * 1000])
def test_only_the_expected_file_is_kept(tmp_path: Path, content: bytes) -> None:
    target = tmp_path / FILE.filename
    with pytest.raises(CliError, match=r"archive\.tgz does not hold the expected thing\.bin"):
        cache.keep(io.BytesIO(content), target, FILE, origin=tmp_path / "archive.tgz")
    assert list(tmp_path.iterdir()) == []
    cache.keep(io.BytesIO(CONTENT), target, FILE, origin=tmp_path / "archive.tgz")
    assert cache.is_intact(target, FILE)
    target.write_bytes(content)
    assert not cache.is_intact(target, FILE)


def test_a_full_disk_is_told_with_what_to_do(tmp_path: Path) -> None:
    class Full(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CliError, match=r"cannot write .*thing\.bin\.part: No space left") as caught:
        cache.keep(Full(), tmp_path / FILE.filename, FILE, origin=tmp_path)
    assert "LLAMA_MESH_CACHE" in (caught.value.fix or "")
    assert list(tmp_path.iterdir()) == []
