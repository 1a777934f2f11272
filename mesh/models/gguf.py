"""Looks at model files: what their metadata and tensor tables say, and which content they are.

Owns the layout of a GGUF file (versions 2 and 3, little endian) and of a model in several shards. Reads headers only,
never tensor data, and never changes a file. Any bytes give ``ModelFacts`` or a ``GgufError`` that names the file.
Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from mesh.core import ggml_types
from mesh.core.model_facts import ModelFacts, Tensor, Value
from mesh.models.gguf_reader import GgufError, GgufReader

__all__ = ["GgufError", "identity", "read"]

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MAX_DIMENSIONS: Final = 4
_DEFAULT_ALIGNMENT: Final = 32
#: the least that a metadata entry (key length, type, a byte) and a tensor (name length, dimensions, type, offset) take
_ENTRY_BYTES, _TENSOR_BYTES = 13, 24
#: llama.cpp's own pattern for the name of a shard
_SHARD_NAME: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Shard:
    """What one file says."""

    name: str
    metadata: dict[str, Value]
    tensors: list[Tensor]
    file_bytes: int


def read(path: str | Path) -> ModelFacts:
    """Return the facts of the model in *path*, which is its first file if it has several."""
    first = _read_file(Path(path))
    shards = [first, *_further_shards(Path(path), first)]
    tensors = tuple(tensor for shard in shards for tensor in shard.tensors)
    _check_all_there(first, tensors)
    return ModelFacts(first.metadata, tensors, sum(shard.file_bytes for shard in shards), len(shards))


def identity(path: str | Path) -> str | None:
    """Return a name for the content of the model in *path* and its shards, without opening a file; None if absent."""
    known = []
    for shard in _shard_paths(Path(path)):
        try:
            status = os.stat(shard)
            known.append(f"{os.path.realpath(shard)} {status.st_size} {status.st_mtime_ns}")
        except (OSError, ValueError):  # ValueError: a NUL in the name
            continue
    return "\n".join(known) or None


def _shard_paths(path: Path) -> Iterator[Path]:
    named = _SHARD_NAME.fullmatch(path.name)
    if not named:
        yield path
        return
    for number in range(1, int(named[3]) + 1):
        yield _shard_path(path, named[1], number, int(named[3]))


def _shard_path(path: Path, stem: str, number: int, count: int) -> Path:
    return path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf")


def _further_shards(path: Path, first: _Shard) -> Iterator[_Shard]:
    """Yield the second and later files of the model that begins with *first*."""
    count, number = _number(first, "split.count"), _number(first, "split.no")
    if count <= 1:
        return
    named = _SHARD_NAME.fullmatch(path.name)
    if not named or int(named[3]) != count:
        ending = f"-00001-of-{count:05d}.gguf"
        raise GgufError(f"{path}: is one of {count} files of a model, so its name must end in {ending}")
    if number != 0:
        wanted = _shard_path(path, named[1], 1, count)
        raise GgufError(f"{path}: is file {number + 1} of {count} of a model; give the first one, {wanted}")
    for index in range(1, count):
        shard = _read_file(_shard_path(path, named[1], index + 1, count), f", file {index + 1} of {count} of the model")
        if _number(shard, "split.no") != index:
            raise GgufError(f"{shard.name}: is not file {index + 1} of the model, as its name says")
        yield shard


def _check_all_there(first: _Shard, tensors: tuple[Tensor, ...]) -> None:
    """Raise if the files together do not hold what the first one announces, or hold it twice."""
    announced = _number(first, "split.tensors.count") or len(tensors)
    if announced != len(tensors):
        raise GgufError(f"{first.name}: announces {announced} tensors, its files hold {len(tensors)}")
    names = set()
    for tensor in tensors:
        if tensor.name in names:
            raise GgufError(f"{first.name}: is corrupt: the tensor {tensor.name} is there twice")
        names.add(tensor.name)


def _number(shard: _Shard, key: str) -> int:
    value = shard.metadata.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int):
        raise GgufError(f"{shard.name}: is corrupt: {key} is not a number")
    return value


def _read_file(path: Path, role: str = "") -> _Shard:
    """Read one file; *role* says in an error what it is for."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
            raise GgufError(f"{path}: is not a file")
        with open(path, "rb") as file:
            return _read_shard(file, str(path))
    except FileNotFoundError as error:
        raise GgufError(f"{path}{role}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise GgufError(f"{path}{role}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _read_shard(file: BinaryIO, name: str) -> _Shard:
    reader = GgufReader(file, name, os.fstat(file.fileno()).st_size)
    _check_magic(reader)
    tensor_count = reader.count("the number of tensors", _TENSOR_BYTES)
    metadata = _metadata(reader, reader.count("the number of metadata entries", _ENTRY_BYTES))
    tensors, offsets = _tensor_table(reader, tensor_count)
    _check_data(reader, metadata, tensors, offsets)
    return _Shard(name, metadata, tensors, reader.file_bytes)


def _check_magic(reader: GgufReader) -> None:
    if not reader.file_bytes:
        raise reader.error("is empty; is the download complete?")
    magic = reader.take(min(len(_MAGIC), reader.file_bytes), "the magic")
    if magic != _MAGIC:
        raise reader.error(f"is no GGUF file: it begins with {magic!r}")
    version = reader.u32("the version")
    if version and version & 0xFFFF == 0:
        raise reader.error("is a GGUF file for big-endian machines")
    if version not in _VERSIONS:
        raise reader.error(f"has GGUF version {version}; versions 2 and 3 are supported")


def _metadata(reader: GgufReader, count: int) -> dict[str, Value]:
    """Read the entries; an array that is not kept leaves its length behind."""
    kept: dict[str, Value] = {}
    lengths: dict[str, Value] = {}
    seen = set()
    for _ in range(count):
        key = reader.text("a metadata key")
        if key in seen:
            raise reader.error(f"is corrupt: the key {key} is there twice")
        seen.add(key)
        value, length = reader.value(key)
        if value is not None:
            kept[key] = value
        elif length is not None:
            lengths[f"{key}.length"] = length
    return kept | lengths


def _tensor_table(reader: GgufReader, count: int) -> tuple[list[Tensor], list[int]]:
    tensors, offsets = [], []
    for _ in range(count):
        name = reader.text("a tensor's name")
        dimensions = reader.u32(f"tensor {name}")
        if dimensions > _MAX_DIMENSIONS:
            raise reader.error(f"is corrupt: the tensor {name} has {dimensions} dimensions")
        shape = tuple(reader.u64(f"tensor {name}") for _ in range(dimensions))
        tensors.append(Tensor(name, reader.u32(f"tensor {name}"), shape))
        offsets.append(reader.u64(f"tensor {name}"))
    return tensors, offsets


def _check_data(reader: GgufReader, metadata: dict[str, Value], tensors: list[Tensor], offsets: list[int]) -> None:
    """Raise if a tensor's data does not lie within the file."""
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise reader.error(f"is corrupt: general.alignment is {alignment}, not a power of two")
    start = -(-reader.position // alignment) * alignment
    end, last = start, "the header"
    for tensor, offset in zip(tensors, offsets, strict=True):
        size = ggml_types.tensor_bytes(tensor.ggml_type, tensor.shape)
        if size is None and tensor.ggml_type in ggml_types.TYPES:
            raise reader.error(f"is corrupt: the rows of the tensor {tensor.name} are not whole blocks of its type")
        tensor_end = start + offset + (size or 0)  # of a type that is newer than we are, only the start is checked
        if tensor_end > end:
            end, last = tensor_end, f"the tensor {tensor.name}"
    if end > reader.file_bytes and tensors:  # a file without tensors needs no padding behind its header
        raise reader.truncated(last, end)
