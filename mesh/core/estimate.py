"""How much memory a llama-server will take, from what its model file says and how it is started.

Weights, KV cache and recurrent state are computed as llama.cpp does; compute buffers are a fitted formula. What a
process takes besides (code, vocabulary, driver context) is not in here: see ``mesh.core.footprint``. Pure; whatever the
metadata holds, the outcome is an ``Estimate`` or an ``EstimateError``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mesh.core.architecture import Shape, shape_of
from mesh.core.batching import Batching, batching
from mesh.core.cache_size import kv_bytes, state_bytes
from mesh.core.compute_size import compute_bytes, input_bytes, output_bytes
from mesh.core.launch_options import DraftOptions, LaunchOptions
from mesh.core.metadata import EstimateError
from mesh.core.model_facts import ModelFacts
from mesh.core.projector import projector_bytes
from mesh.core.weights import Placement, Weights, placement, weigh

__all__ = ["Estimate", "EstimateError", "Part", "estimate"]


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes on GPUs (all together) and on the host."""

    gpu: int = 0
    cpu: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(self.gpu + other.gpu, self.cpu + other.cpu)

    @property
    def total(self) -> int:
        return self.gpu + self.cpu


@dataclass(frozen=True, slots=True)
class Estimate:
    """The memory of one llama-server by what it is for."""

    weights: Part
    kv: Part
    recurrent: Part
    compute: Part
    output: Part  #: logits
    draft: Part  #: all of the draft model
    projector: Part  #: all of the multimodal projector
    largest_layer_bytes: int  #: on a GPU, cache included: the smallest amount that can be moved between GPUs
    context: int  #: tokens of all slots together
    slots: int
    notes: tuple[str, ...] = ()  #: what of it is a guess

    @property
    def total(self) -> Part:
        return self.weights + self.kv + self.recurrent + self.compute + self.output + self.draft + self.projector


def estimate(
    model: ModelFacts,
    options: LaunchOptions,
    *,
    gpus: bool,
    draft: ModelFacts | None = None,
    mmproj: ModelFacts | None = None,
    lora_bytes: int = 0,
) -> Estimate:
    """Return the memory that *options* take with *model*; without *gpus* all of it on the host.

    Raises ``EstimateError`` for a file that is no model whose memory can be known.
    """
    shape = shape_of(model)
    batch = batching(shape, options)
    where = placement(shape.layers, options, gpus=gpus)
    weights = weigh(model, shape, options, where)
    kv, states = kv_bytes(shape, options, batch), state_bytes(shape, batch)
    cached_on_gpu = where if options.kv_offload else replace(where, first_on_gpu=where.layers + 1)
    notes = list(shape.guesses)
    if weights.guessed_bytes:
        notes.append("the file has tensors of a type that is not known here; their size is a guess")
    return Estimate(
        weights=Part(weights.gpu, weights.cpu) + _beside(lora_bytes, where.any_on_gpu),
        kv=_split(kv, cached_on_gpu),
        recurrent=_split(states, cached_on_gpu),
        compute=_compute(shape, options, batch, where, weights),
        output=Part(cpu=output_bytes(shape, options, batch)),
        draft=_draft(options, draft, notes, gpus=gpus),
        projector=_projector(options, mmproj, notes, gpus=where.gpus),
        largest_layer_bytes=max(_layers(weights, kv, states, cached_on_gpu), default=0),
        context=batch.context,
        slots=batch.slots,
        notes=tuple(notes),
    )


def _beside(size: int, on_gpu: bool) -> Part:
    return Part(gpu=size) if on_gpu else Part(cpu=size)


def _split(sizes: tuple[int, ...], where: Placement) -> Part:
    on_gpu = sum(size for layer, size in enumerate(sizes) if where.on_gpu(layer))
    return Part(on_gpu, sum(sizes) - on_gpu)


def _layers(weights: Weights, kv: tuple[int, ...], states: tuple[int, ...], cached: Placement) -> Iterator[int]:
    """Yield what each layer has on a GPU."""
    for layer, size in weights.gpu_layers.items():
        in_cache = layer < cached.layers and cached.on_gpu(layer)
        yield size + (kv[layer] + states[layer] if in_cache else 0)


def _compute(shape: Shape, options: LaunchOptions, batch: Batching, where: Placement, weights: Weights) -> Part:
    whole = compute_bytes(shape, options, batch)
    if not where.gpus:
        return Part(cpu=whole)
    # without a layer on it, a GPU still computes large batches, with the weights handed over for each step
    on_gpu = whole + weights.largest_expert if where.any_on_gpu or options.op_offload else 0
    on_host = whole if weights.cpu_blocks or not on_gpu else input_bytes(shape, options, batch)
    return Part(on_gpu, on_host)


def _draft(options: LaunchOptions, draft: ModelFacts | None, notes: list[str], *, gpus: bool) -> Part:
    if draft is None or options.draft is None:
        return Part()
    notes.append("the draft model is estimated as a server of its own")
    return estimate(draft, _draft_options(options, options.draft), gpus=gpus).total


def _draft_options(options: LaunchOptions, draft: DraftOptions) -> LaunchOptions:
    """Return the draft model's settings: its own, and of the main model those that it shares."""
    return replace(
        options,
        model=draft.path,
        context=draft.context or options.context,
        gpu_layers=draft.gpu_layers,
        type_k=draft.type_k,
        type_v=draft.type_v,
        cpu_moe_layers=0,
        overrides=(),
        draft=None,
        mmproj=None,
        loras=(),
        embedding=False,
        rerank=False,
    )


def _projector(options: LaunchOptions, mmproj: ModelFacts | None, notes: list[str], *, gpus: bool) -> Part:
    if mmproj is None:
        return Part()
    notes.append("what the multimodal projector computes with is a guess")
    return _beside(projector_bytes(mmproj), gpus and options.mmproj_offload)
