"""What a model file says of itself: metadata and tensor table, without the tensors. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: A metadata value; of arrays too long to matter (the vocabulary) only the length is kept, as ``<key>.length``.
Value = int | float | bool | str | tuple[int, ...] | tuple[float, ...] | tuple[bool, ...] | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    ggml_type: int  #: as in the file, see ``mesh.core.ggml_types``
    shape: tuple[int, ...]  #: ne0 first, as GGUF has it


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """All shards of one GGUF together."""

    metadata: Mapping[str, Value] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()
    file_bytes: int = 0
    shards: int = 1
