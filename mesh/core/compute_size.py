"""How much the buffers of a computation take: the largest step of the graph for one micro-batch, and the answers.

A formula, not a simulation: it was fitted to what llama-server logs (``sched_reserve: compute buffer size``), and
``tests/e2e/test_estimate_accuracy.py`` keeps it there. All values in the graph are f32; masks are f16 with flash
attention.
"""

from __future__ import annotations

from mesh.core.architecture import RWKV, Shape
from mesh.core.batching import Batching
from mesh.core.launch_options import LaunchOptions

_F32 = 4
#: Attention and feed-forward network take the same input, which is kept for both.
_PARALLEL = frozenset({"cohere2", "cohere2moe", "command-r"})
#: Their recurrent layers are gated delta nets.
_GATED_DELTA = frozenset({"qwen35", "qwen35moe"})
#: Encoders whose feed-forward network has no gate.
_UNGATED = frozenset({"bert", "jina-bert-v3", "nomic-bert-moe"})


def compute_bytes(shape: Shape, options: LaunchOptions, batch: Batching) -> int:
    """Return the bytes of the compute buffer where the layers are."""
    rows = _F32 * batch.ubatch
    mask = mask_bytes(shape, options, batch)
    if not shape.causal:
        return mask + _encoder_bytes(shape, options, batch)
    scores = 0 if options.flash_attn is not False else rows * batch.cells * max(shape.heads)
    logits = _F32 * shape.vocabulary * batch.outputs
    if (options.embedding or options.rerank) and not any(shape.state_bytes):
        logits += rows * shape.embedding  # of an embedding server: what it answers, besides
    steps = (
        rows * _feed_forward(shape, options),
        rows * _attention(shape) + scores,
        _scan_bytes(shape, batch),
        logits,
    )
    kept = 6 if shape.name in _PARALLEL else 5
    return mask + rows * kept * shape.embedding + max(steps)


def input_bytes(shape: Shape, options: LaunchOptions, batch: Batching) -> int:
    """Return the bytes of the host's buffer when every layer is on GPUs: what is handed to them."""
    return mask_bytes(shape, options, batch) + _F32 * batch.ubatch * shape.embedding


def mask_bytes(shape: Shape, options: LaunchOptions, batch: Batching) -> int:
    """Return the bytes of the attention masks that this model uses."""
    size = _F32 if options.flash_attn is False else 2
    if not shape.causal:
        return batch.ubatch * batch.ubatch * size
    layers = [in_window for in_window, cached in zip(shape.windowed, shape.cached, strict=True) if cached]
    cells = (batch.window_cells if True in layers else 0) + (batch.cells if False in layers else 0)
    return batch.ubatch * cells * size


def output_bytes(shape: Shape, options: LaunchOptions, batch: Batching) -> int:
    """Return the bytes of the host's buffer for the answers: logits, and embeddings if those are asked for."""
    width = shape.vocabulary + (shape.embedding if options.embedding or options.rerank else 0)
    return _F32 * width * batch.slots


def _encoder_bytes(shape: Shape, options: LaunchOptions, batch: Batching) -> int:
    """An encoder compares all tokens of a batch with each other and has no cache to read."""
    rows, wide = _F32 * batch.ubatch, max(shape.feed_forward)
    scores = 0 if options.flash_attn is not False else rows * batch.ubatch * max(shape.heads)
    if shape.name in _UNGATED:
        steps = (shape.embedding + 2 * wide, 5 * shape.embedding + wide)
        return max(rows * max(steps), rows * 7 * shape.embedding + scores)
    return max(rows * (5 * shape.embedding + 3 * wide), rows * 9 * shape.embedding + scores)


def _feed_forward(shape: Shape, options: LaunchOptions) -> int:
    """Return how many values per token the widest feed-forward network holds at once."""
    dense = max(shape.feed_forward)
    if not shape.experts_used:
        # a narrow one finds room for its first step in what the layer's other steps have left
        narrow = dense <= 2 * shape.embedding and options.type_k in ("f32", "f16", "bf16")
        return dense * (2 if narrow else 3)
    experts = shape.experts_used * shape.expert_feed_forward
    mixed = shape.experts_used * shape.embedding if shape.embedding > 2 * shape.expert_feed_forward else 0
    return 3 * max(dense, experts) + mixed


def _attention(shape: Shape) -> int:
    """Return how many values per token attention holds at once, in its widest layer."""
    return max(_attention_of(shape, layer) for layer in range(shape.layers))


def _attention_of(shape: Shape, layer: int) -> int:
    heads, key, value = shape.heads[layer], shape.key_width[layer], shape.value_width[layer]
    if shape.mla_key_width:
        return heads * (2 * key + shape.mla_key_width)
    queries = heads * key
    return queries * (2 if queries > shape.embedding else 1) + shape.kv_heads[layer] * (key + value)


def _scan_bytes(shape: Shape, batch: Batching) -> int:
    """Return what a recurrent layer holds at once: the scan's inputs and results, and the states of all slots.

    Small states find room where the inputs of the layer before were; large ones are there twice or more.
    """
    rows, states = _F32 * batch.ubatch, max(shape.state_bytes) * batch.slots
    inner, groups = shape.scan_inner, 2 * shape.scan_groups * shape.scan_state
    if shape.name in RWKV:
        return rows * 15 * shape.embedding + states * (1 if states <= rows * shape.embedding else 2)
    if shape.name in _GATED_DELTA:
        return rows * 9 * (inner + groups) // 4 + (0 if 4 * states <= 3 * rows * inner else states * 5 // 2)
    if states <= rows * (inner + 3 * groups):
        return rows * (5 * inner + 3 * groups) + states
    return rows * (5 * inner + 2 * groups) + 2 * states
