"""Where the tensors of a model go: which layers are on GPUs, and what of the weights stays on the host.

The rules are llama.cpp's (``llama_model_base::load_tensors``): the output head counts as the layer after the last one
and is the first to go to a GPU; the embedding of the input never goes; an override by name beats the layer's place.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mesh.core.architecture import ENCODERS, Shape
from mesh.core.ggml_types import NUMBERS, tensor_bytes
from mesh.core.launch_options import LaunchOptions
from mesh.core.model_facts import ModelFacts, Tensor

_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
_EXPERTS = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")
#: Types that are stored in another order for a processor to compute with (ggml-cpu's repack.cpp on x86-64; Arm's have
#: more). Rows are looked up in the usual order, so that both are kept.
_REPACKED = frozenset({NUMBERS[name] for name in ("q4_0", "q4_K", "iq4_nl", "mxfp4")})
#: Read row by row on the host.
_INPUTS = ("token_embd", "position_embd", "token_types", "per_layer_token_embd")


@dataclass(frozen=True, slots=True)
class Placement:
    """Which layers of a model are on GPUs; layer ``layers`` is the output head."""

    layers: int
    first_on_gpu: int  #: this layer and all after it; ``layers + 1`` = none is
    gpus: bool  #: whether there are any, for layers or for single large steps

    def on_gpu(self, layer: int) -> bool:
        return layer >= self.first_on_gpu

    @property
    def any_on_gpu(self) -> bool:
        return self.first_on_gpu <= self.layers


@dataclass(slots=True)
class Weights:
    gpu: int = 0  #: bytes
    cpu: int = 0
    gpu_layers: dict[int, int] = field(default_factory=lambda: defaultdict(int))  #: bytes on GPUs per layer
    cpu_blocks: bool = False  #: whether the host computes a layer, or a part of one
    largest_expert: int = 0  #: bytes of the largest tensor of experts that stays on the host beside a layer on a GPU
    guessed_bytes: int = 0  #: in tensors of a type that is not known here


def placement(layers: int, options: LaunchOptions, *, gpus: bool) -> Placement:
    """Return which of *layers* layers *options* put on GPUs."""
    wanted = layers + 1 if options.gpu_layers is None else options.gpu_layers
    gpus = gpus and options.devices != ("none",)
    return Placement(layers, max(0, layers + 1 - (wanted if gpus else 0)), gpus)


def weigh(model: ModelFacts, shape: Shape, options: LaunchOptions, where: Placement) -> Weights:
    """Return the bytes of *model*'s tensors on either side."""
    sizes = {tensor.name: tensor_bytes(tensor.ggml_type, tensor.shape) for tensor in model.tensors}
    known = sum(size for size in sizes.values() if size is not None)
    unknown = sum(size is None for size in sizes.values())
    guess = max(0, model.file_bytes - known) // unknown if unknown else 0
    result = Weights(guessed_bytes=guess * unknown)
    override = _overrides(options)
    for tensor in model.tensors:
        size = sizes[tensor.name]
        _put(result, tensor, guess if size is None else size, where, override(tensor.name))
    if _is_tied(sizes, shape):
        _put_head_again(result, next(t for t in model.tensors if t.name == "token_embd.weight"), guess, where)
    return result


def _put_head_again(result: Weights, embedding: Tensor, guess: int, where: Placement) -> None:
    """Add the output head of a model that uses the embedding there: once more, unless both can share it."""
    size = tensor_bytes(embedding.ggml_type, embedding.shape) or guess
    if where.on_gpu(where.layers):
        result.gpu += size
        result.gpu_layers[where.layers] += size
    elif not where.gpus and embedding.ggml_type in _REPACKED:
        result.cpu += size


def _put(result: Weights, tensor: Tensor, size: int, where: Placement, override: bool | None) -> None:
    layer = _layer(tensor.name, where.layers)
    by_place = layer is not None and where.on_gpu(layer)
    if where.gpus and (by_place if override is None else override):
        result.gpu += size
        result.gpu_layers[where.layers if layer is None else layer] += size
        return
    result.cpu += size
    if layer is not None and layer < where.layers:
        result.cpu_blocks = True
        if by_place and _EXPERTS.search(tensor.name):
            result.largest_expert = max(result.largest_expert, size)


def _layer(name: str, layers: int) -> int | None:
    """Return the layer of a tensor; None for the input's, which stay on the host."""
    block = _BLOCK.search(name)
    if block is not None:
        return int(block[1])
    return None if name.startswith(_INPUTS) else layers


def _is_tied(sizes: Mapping[str, int | None], shape: Shape) -> bool:
    return "token_embd.weight" in sizes and "output.weight" not in sizes and shape.name not in ENCODERS


def _overrides(options: LaunchOptions) -> Callable[[str], bool | None]:
    """Return what says whether a tensor was put on a GPU (True) or the host by name; None = by its layer."""
    patterns = []
    for pattern, buffer in options.overrides:
        try:
            patterns.append((re.compile(pattern), not buffer.upper().startswith("CPU")))
        except (re.error, OverflowError, RecursionError):
            continue  # C++'s expressions are not quite Python's; llama-server refuses what is none at all

    def override(name: str) -> bool | None:
        for pattern, on_gpu in patterns:
            if pattern.search(name):
                return on_gpu
        block = _BLOCK.search(name)
        if block and int(block[1]) < options.cpu_moe_layers and _EXPERTS.search(name):
            return False
        return None

    return override
