"""How much KV cache and recurrent state of a model take, layer by layer. Exact: llama-server allocates just that."""

from __future__ import annotations

from mesh.core.architecture import Shape
from mesh.core.batching import Batching
from mesh.core.ggml_types import NUMBERS, tensor_bytes
from mesh.core.launch_options import LaunchOptions
from mesh.core.metadata import EstimateError


def kv_bytes(shape: Shape, options: LaunchOptions, batch: Batching) -> tuple[int, ...]:
    """Return the bytes of each layer's KV cache."""
    values = [shape.kv_heads[layer] * shape.value_width[layer] for layer in range(shape.layers)]
    if options.flash_attn is False:
        values = [max(values)] * shape.layers  # llama.cpp stores V transposed then, as wide in every layer
    result = []
    for layer in range(shape.layers):
        cells = batch.window_cells if shape.windowed[layer] else batch.cells
        keys = _bytes(options.type_k, shape.kv_heads[layer] * shape.key_width[layer])
        row = keys + (0 if shape.mla_key_width else _bytes(options.type_v, values[layer]))
        result.append(row * cells * batch.streams if shape.cached[layer] else 0)
    return tuple(result)


def state_bytes(shape: Shape, batch: Batching) -> tuple[int, ...]:
    """Return the bytes of each layer's recurrent state."""
    return tuple(size * batch.slots for size in shape.state_bytes)


def _bytes(type_name: str, width: int) -> int:
    size = tensor_bytes(NUMBERS.get(type_name, -1), (width,))
    if size is None:
        raise EstimateError(f"a KV cache of type {type_name} cannot hold rows of {width} values")
    return size
