"""Looks at ggml whisper models: what the header of one says, and whether all of its weights are there.

Owns the layout of these files: hyperparameters, mel filters, vocabulary, then the tensors, which are not read. Any
bytes give ``WhisperFacts`` or a ``WhisperModelError`` that names the file. Everything here blocks: call it in a thread.

whisper-server itself accepts a file whose last tensor is cut short, and then hears nonsense. That is found here, but
for the last few KB: the tensors' names are not counted. A file that ends behind its vocabulary is a model of zeros,
which whisper.cpp's own tests use, and is accepted here too.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final

from mesh.core.metadata import EstimateError
from mesh.core.whisper_estimate import weight_bytes
from mesh.core.whisper_facts import WhisperFacts
from mesh.errors import ConfigError

__all__ = ["WhisperModelError", "read"]

#: 0x67676d6c, little endian
_MAGIC: Final = b"lmgg"
_HYPERPARAMETERS: Final = struct.Struct("<11i")
_NAMES: Final = (
    "n_vocab", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer", "n_text_ctx", "n_text_state",
    "n_text_head", "n_text_layer", "n_mels", "ftype",
)  # fmt: skip
#: far more than any model has; what is larger makes no sense, and would cost time to add up
_LIMITS: Final = dict.fromkeys(_NAMES, 1 << 16) | {"n_vocab": 1 << 20}
_FILTERS: Final = struct.Struct("<2i")
_NUMBER: Final = struct.Struct("<I")
#: the filters and vocabularies of the real models have 0.6 MiB
_MAX_HEADER_BYTES: Final = 4 << 20
#: where each tensor begins: its number of dimensions, the length of its name, its type
_TENSOR_BYTES: Final = 12
_LIKELY: Final = {
    b"GGUF": "GGUF, for llama-server; whisper-server reads ggml models, such as ggml-base.bin",
    b"PK\x03\x04": "a zip or PyTorch file; convert it with whisper.cpp's models/convert-pt-to-ggml.py",
    b"vers": "a pointer of git-lfs, not the file itself",
}


class WhisperModelError(ConfigError):
    """A file cannot be read as a ggml whisper model. The message names the file and what is wrong with it."""


def read(path: str | Path) -> WhisperFacts:
    """Return the facts of the model in *path*."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
            raise WhisperModelError(f"{path}: is not a file")
        with open(path, "rb") as file:
            return _read_model(file, str(path))
    except FileNotFoundError as error:
        raise WhisperModelError(f"{path}: there is no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise WhisperModelError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _read_model(file: BinaryIO, name: str) -> WhisperFacts:
    file_bytes = os.fstat(file.fileno()).st_size
    header = file.read(_MAX_HEADER_BYTES)
    if not header:
        raise WhisperModelError(f"{name}: is empty; is the download complete?")
    if header[:4] != _MAGIC[: len(header)]:
        likely = _LIKELY.get(header[:4], f"it begins with {header[:4]!r}")
        raise WhisperModelError(f"{name}: is no ggml whisper model: {likely}")
    facts = _hyperparameters(header, name, file_bytes)
    end = _header_end(header, facts, name, file_bytes)
    _check_weights(facts, end, name)
    return facts


def _hyperparameters(header: bytes, name: str, file_bytes: int) -> WhisperFacts:
    _need(header, len(_MAGIC) + _HYPERPARAMETERS.size, "its hyperparameters", name)
    numbers = _HYPERPARAMETERS.unpack_from(header, len(_MAGIC))
    for what, number in zip(_NAMES, numbers, strict=True):
        if not (0 if what == "ftype" else 1) <= number <= _LIMITS[what]:
            raise _corrupt(name, f"{what} is {number}; is it another kind of ggml file?")
    facts = replace(WhisperFacts(*numbers), file_bytes=file_bytes)
    if facts.weight_type is None:
        raise WhisperModelError(f"{name}: has the unknown ftype {facts.ftype}; is it newer than this version?")
    if facts.audio_state != facts.text_state:
        raise _corrupt(name, f"n_audio_state is {facts.audio_state}, n_text_state {facts.text_state}")
    if facts.audio_state % facts.audio_heads or facts.text_state % facts.text_heads:
        raise _corrupt(name, f"{facts.audio_state} is not divided by {facts.audio_heads} and {facts.text_heads} heads")
    return facts


def _header_end(header: bytes, facts: WhisperFacts, name: str, file_bytes: int) -> int:
    """Return where the tensors begin: behind the mel filters and the vocabulary."""
    at = len(_MAGIC) + _HYPERPARAMETERS.size
    _need(header, at + _FILTERS.size, "its mel filters", name)
    mels, bins = _FILTERS.unpack_from(header, at)
    if mels != facts.mels or bins < 1:
        raise _corrupt(name, f"its mel filters are {mels} x {bins}, for {facts.mels} mels")
    at += _FILTERS.size + 4 * mels * bins
    _need(header, at + _NUMBER.size, "its mel filters", name)
    words = int(_NUMBER.unpack_from(header, at)[0])
    at += _NUMBER.size
    if words > facts.vocabulary:
        raise _corrupt(name, f"its vocabulary has {words} words, n_vocab is {facts.vocabulary}")
    return _skip_words(header, at, words, name)


def _skip_words(header: bytes, at: int, count: int, name: str) -> int:
    """Return where *count* words from *at* on end."""
    for _ in range(count):
        _need(header, at + _NUMBER.size, "its vocabulary", name)
        at += _NUMBER.size + _NUMBER.unpack_from(header, at)[0]
    _need(header, at, "its vocabulary", name)
    return at


def _check_weights(facts: WhisperFacts, start: int, name: str) -> None:
    """Raise if the file has some tensors but cannot have all."""
    try:
        weights = weight_bytes(facts)
    except EstimateError as error:
        raise _corrupt(name, str(error)) from error
    tensors = 11 + 15 * facts.audio_layers + 24 * facts.text_layers
    end = start + weights + tensors * _TENSOR_BYTES
    if start < facts.file_bytes < end:
        raise _truncated(name, "the last tensor", end, facts.file_bytes)


def _need(header: bytes, end: int, what: str, name: str) -> None:
    if end <= len(header):
        return
    if len(header) == _MAX_HEADER_BYTES:
        raise _corrupt(name, f"{what} would reach byte {end}, far more than any model has")
    raise _truncated(name, what, end, len(header))


def _truncated(name: str, what: str, end: int, size: int) -> WhisperModelError:
    known = f"{what} should reach byte {end} at least, the file has {size}"
    return WhisperModelError(f"{name}: is truncated: {known}; is the download complete?")


def _corrupt(name: str, problem: str) -> WhisperModelError:
    return WhisperModelError(f"{name}: is corrupt: {problem}")
