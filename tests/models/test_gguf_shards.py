"""``mesh.models.gguf``: models in several files, and which content a model file is."""

from __future__ import annotations

import os
from pathlib import Path

import gguf as format_library
import numpy as np
import pytest

from mesh.models import gguf


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refusal(path: Path) -> str:
    """What ``read`` has to say against *path*; it names the file."""
    with pytest.raises(gguf.GgufError) as caught:
        gguf.read(path)
    assert str(path) in caught.value.message
    return caught.value.message


def shard(path: Path, number: int, count: int, names: list[str], announced: int | None = 4) -> None:
    """One file of a model, written by the format's own library."""
    writer = format_library.GGUFWriter(str(path), "llama")
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", count)
    if announced is not None:
        writer.add_int32("split.tensors.count", announced)
    for name in names:
        writer.add_tensor(name, np.zeros((4, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def sharded(tmp_path: Path) -> list[Path]:
    """A model in three files; the first holds no tensor, as gguf-split may make it."""
    paths = [tmp_path / f"big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for number, names in enumerate([[], ["a", "b"], ["c", "d"]]):
        shard(paths[number], number, 3, names)
    return paths


class TestShards:
    """Trap 48: a sharded GGUF counts all shards."""

    def test_all_count(self, sharded: list[Path]) -> None:
        facts = gguf.read(sharded[0])
        assert [tensor.name for tensor in facts.tensors] == ["a", "b", "c", "d"]
        assert facts.file_bytes == sum(path.stat().st_size for path in sharded)
        assert facts.shards == 3

    def test_a_missing_one_is_named(self, sharded: list[Path]) -> None:
        sharded[2].unlink()
        with pytest.raises(gguf.GgufError) as caught:
            gguf.read(sharded[0])
        assert caught.value.message == f"{sharded[2]}, file 3 of 3 of the model: there is no such file"

    def test_a_truncated_one_is_named(self, sharded: list[Path]) -> None:
        os.truncate(sharded[1], sharded[1].stat().st_size - 100)
        with pytest.raises(gguf.GgufError, match=r"big-00002-of-00003\.gguf: is truncated"):
            gguf.read(sharded[0])

    def test_not_the_first(self, sharded: list[Path]) -> None:
        assert refusal(sharded[1]).endswith(f"is file 2 of 3 of a model; give the first one, {sharded[0]}")

    def test_renamed(self, sharded: list[Path]) -> None:
        other = sharded[0].rename(sharded[0].with_name("big.gguf"))
        assert "its name must end in -00001-of-00003.gguf" in refusal(other)

    def test_swapped(self, sharded: list[Path]) -> None:
        sharded[2].write_bytes(sharded[1].read_bytes())
        with pytest.raises(gguf.GgufError, match=r"00003-of-00003\.gguf: is not file 3 of the model"):
            gguf.read(sharded[0])

    def test_tensors_are_missing(self, sharded: list[Path]) -> None:
        shard(sharded[2], 2, 3, ["c"])
        assert refusal(sharded[0]).endswith("announces 4 tensors, its files hold 3")

    def test_tensors_are_there_twice(self, sharded: list[Path]) -> None:
        shard(sharded[2], 2, 3, ["c", "a"])
        assert "the tensor a is there twice" in refusal(sharded[0])

    def test_links_into_a_store(self, sharded: list[Path], tmp_path: Path) -> None:
        """Hugging Face's cache: the names are links to files named by their hash."""
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        for path in sharded:
            (snapshot / path.name).symlink_to(path.rename(tmp_path / f"hash{path.name[5]}{path.name[8]}"))
        assert gguf.read(snapshot / sharded[0].name).shards == 3
        assert (gguf.identity(snapshot / sharded[0].name) or "").count("\n") == 2


class TestIdentity:
    def test_follows_the_content(self, tmp_path: Path) -> None:
        path = written(tmp_path / "m.gguf", b"one")
        first = gguf.identity(path)
        assert first is not None
        assert gguf.identity(str(path)) == first
        os.utime(path, ns=(1, 1))
        assert gguf.identity(path) != first
        os.utime(path, ns=(5, 5))
        timed = gguf.identity(path)
        path.write_bytes(b"four")
        os.utime(path, ns=(5, 5))
        assert gguf.identity(path) != timed

    def test_a_link_that_moves_on(self, tmp_path: Path) -> None:
        for name in ("old", "new"):
            os.utime(written(tmp_path / name, b"same"), ns=(1, 1))
        link = tmp_path / "m.gguf"
        link.symlink_to("old")
        before = gguf.identity(link)
        link.unlink()
        link.symlink_to("new")
        assert gguf.identity(link) != before

    def test_every_shard(self, sharded: list[Path]) -> None:
        before = gguf.identity(sharded[0])
        os.utime(sharded[2], ns=(1, 1))
        assert gguf.identity(sharded[0]) != before
        sharded[2].unlink()
        assert gguf.identity(sharded[0]) not in (before, None)

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert gguf.identity(tmp_path / "none.gguf") is None
        assert gguf.identity("a\0b") is None
