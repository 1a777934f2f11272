"""What a model's metadata says about the memory it will use: layers, heads, windows and states, as llama.cpp reads it.

Architectures differ in rules that stand in the code of llama.cpp and not in the file; they are the tables here, taken
from ``load_arch_hparams`` of b11549. An architecture in none of them is read as a plain transformer, and said to be a
guess if its metadata hints at more. Whatever the metadata holds, the outcome is a ``Shape`` or an ``EstimateError``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.core.metadata import MAX_NUMBER, EstimateError, Metadata
from mesh.core.model_facts import ModelFacts

#: llama.cpp refuses more (LLAMA_MAX_LAYERS).
MAX_LAYERS = 512

#: Architectures with a sliding window: (period, whether its first layer is the dense one, default window in tokens).
#: Period p: one layer in p sees everything. A default of 0 means: only with a window in the metadata.
WINDOWED: Mapping[str, tuple[int, bool, int]] = {
    "gemma2": (2, False, 4096),
    "gemma3": (6, False, 0),
    "gemma3n": (5, False, 0),
    "gemma4": (0, False, 0),
    "cohere2": (4, False, 0),
    "cohere2moe": (4, True, 0),
    "llama4": (4, False, 8192),
    "olmo2": (4, False, 0),
    "plamo3": (8, False, 0),
    "exaone4": (4, False, 4096),
    "exaone-moe": (4, False, 128),
    "gpt-oss": (2, False, 0),
    "smallthinker": (4, True, 0),
    "afmoe": (4, False, 0),
    "mellum": (4, False, 0),
    "laguna": (4, True, 0),
}
#: Their window is this, whatever the file says (as long as it does not say 0).
FIXED_WINDOW: Mapping[str, int] = {"llama4": 8192, "smallthinker": 4096}
#: Their files may hold a window that llama.cpp does not use.
IGNORES_WINDOW = frozenset({"llama", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "starcoder2", "deepseek2"})
#: Every layer keeps a state and none has a KV cache.
RWKV = frozenset({"rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
RECURRENT = RWKV | {"mamba", "mamba2"}
#: Every layer has both.
PARALLEL_HYBRID = frozenset({"falcon-h1"})
#: A layer without KV heads keeps a state.
HYBRID_BY_HEADS = frozenset(
    {"jamba", "lfm2", "lfm2moe", "plamo2", "granitehybrid", "nemotron_h", "nemotron_h_moe", "kimi-linear"}
)
#: One layer in full_attention_interval (default 4) has a KV cache, the others keep a state.
HYBRID_BY_INTERVAL = frozenset({"qwen3next", "qwen35", "qwen35moe"})
#: No cache at all: the whole text at once.
ENCODERS = frozenset(
    {
        "bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "eurobert",
        "gemma-embedding", "t5encoder", "wavtokenizer-dec",
    }
)  # fmt: skip
#: Their layers compute in ways that none of the measured architectures does.
_UNMEASURED = frozenset(
    {"rwkv6", "rwkv6qwen2", "arwkv7", "qwen3next", "kimi-linear", "gemma3n", "gemma4", "t5encoder", "wavtokenizer-dec"}
)
#: What a plain transformer needs to be one.
_HINTS_OF_MORE = (
    "attention.indexer.head_count", "attention.compress_ratios", "hyper_connection.count", "hrm.h_cycles",
    "decoder_block_count", "block_size", "attention.recurrent_layers", "kda.head_dim", "num_loops",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's dimensions. Lists have one entry per layer."""

    name: str  #: the architecture
    layers: int  #: that run; those for multi-token prediction come after
    embedding: int
    context: int  #: as trained, tokens
    vocabulary: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    key_width: tuple[int, ...]  #: of one head
    value_width: tuple[int, ...]
    feed_forward: tuple[int, ...]
    experts_used: int
    expert_feed_forward: int
    window: int  #: tokens that a windowed layer sees; 0 = there are none
    windowed: tuple[bool, ...]
    causal: bool  #: False: an encoder, which reads a text at once
    cached: tuple[bool, ...]  #: whether it has a KV cache
    state_bytes: tuple[int, ...]  #: per slot
    scan_inner: int  #: of a state space model; 0 = it is none
    scan_state: int
    scan_groups: int
    mla_key_width: int  #: 0 = no multi-head latent attention
    guesses: tuple[str, ...]


def shape_of(model: ModelFacts) -> Shape:
    """Return the dimensions of *model*."""
    data = Metadata(model.metadata)
    total = data.number("block_count")
    layers = total - data.number("nextn_predict_layers", 0)
    embedding = data.number("embedding_length")
    if not 0 < layers <= total <= MAX_LAYERS or not embedding:
        sizes = f"block_count {total} and embedding_length {embedding}"
        raise EstimateError(f"{data.architecture}: {sizes} make no model; is the file damaged?")
    heads = data.numbers("attention.head_count", layers, 0 if data.architecture in RECURRENT else None)
    if not any(heads) and data.architecture not in RECURRENT:
        raise EstimateError(f"{data.architecture}.attention.head_count is 0; is the file damaged?")
    kv_heads = data.numbers("attention.head_count_kv", layers) if data.has("attention.head_count_kv") else heads
    recurrent = _recurrent(data, kv_heads)
    window, windowed = _windows(data, layers)
    wide, experts = data.numbers("feed_forward_length", layers, 0), data.number("expert_used_count", 0)
    keys, values = _widths(data, embedding, heads, windowed)
    return Shape(
        name=data.architecture,
        layers=layers,
        embedding=embedding,
        context=data.number("context_length"),
        vocabulary=_vocabulary(model),
        heads=heads,
        kv_heads=kv_heads,
        key_width=keys,
        value_width=values,
        feed_forward=wide if not experts or _has_dense_network(model) else (0,) * layers,
        experts_used=experts,
        expert_feed_forward=data.number("expert_feed_forward_length", max(wide)),
        window=window,
        windowed=windowed,
        causal=data.architecture not in ENCODERS,
        cached=_cached(data, recurrent),
        state_bytes=tuple(_state_bytes(data, embedding, max(heads)) if there else 0 for there in recurrent),
        scan_inner=data.number("ssm.inner_size", 0),
        scan_state=data.number("ssm.state_size", 0),
        scan_groups=data.number("ssm.group_count", 0),
        mla_key_width=data.number("attention.value_length_mla", 0) and data.number("attention.key_length_mla", 0),
        guesses=_guesses(data),
    )


def _windows(data: Metadata, layers: int) -> tuple[int, tuple[bool, ...]]:
    """Return the window's size in tokens and which layers have it."""
    none = (0, (False,) * layers)
    pattern = data.flags("attention.sliding_window_pattern", layers)
    if data.architecture not in WINDOWED:
        window = 0 if data.architecture in IGNORES_WINDOW else data.number("attention.sliding_window", 0)
        return (window, pattern) if window and pattern else none
    period, dense_first, default = WINDOWED[data.architecture]
    window = data.number("attention.sliding_window", default)
    if not window or (data.architecture == "exaone4" and layers != 64):
        return none
    if data.architecture in FIXED_WINDOW:
        window = FIXED_WINDOW[data.architecture]
    if pattern is None:
        period = data.number("attention.sliding_window_pattern", period)
        dense = 0 if dense_first else period - 1
        pattern = tuple(not period or layer % period != dense for layer in range(layers))
    return window, pattern


def _widths(
    data: Metadata, embedding: int, heads: tuple[int, ...], windowed: tuple[bool, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the width of a head's key and of its value in each layer."""
    usual = embedding // max(heads) if any(heads) else 0
    key, value = data.number("attention.key_length", usual), data.number("attention.value_length", usual)
    window_key = data.number("attention.key_length_swa", key)
    window_value = data.number("attention.value_length_swa", value)
    return (
        tuple(window_key if in_window else key for in_window in windowed),
        tuple(window_value if in_window else value for in_window in windowed),
    )


def _recurrent(data: Metadata, kv_heads: tuple[int, ...]) -> tuple[bool, ...]:
    layers = len(kv_heads)
    stated = data.flags("attention.recurrent_layers", layers)
    if stated is not None:
        return stated
    if data.architecture in RECURRENT | PARALLEL_HYBRID:
        return (True,) * layers
    if data.architecture in HYBRID_BY_HEADS:
        # nemotron_h has layers that are only a feed-forward network
        wide = data.numbers("feed_forward_length", layers, 0) if "nemotron" in data.architecture else (0,) * layers
        return tuple(not count and not width for count, width in zip(kv_heads, wide, strict=True))
    if data.architecture in HYBRID_BY_INTERVAL:
        interval = data.number("full_attention_interval", 4) or 1
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    return (False,) * layers


def _cached(data: Metadata, recurrent: tuple[bool, ...]) -> tuple[bool, ...]:
    layers = len(recurrent)
    if data.architecture in RECURRENT | ENCODERS:
        return (False,) * layers
    if data.architecture in PARALLEL_HYBRID:
        return (True,) * layers
    own = 20 if data.architecture == "gemma3n" else layers - data.number("attention.shared_kv_layers", 0)
    return tuple(layer < own and not keeps_state for layer, keeps_state in enumerate(recurrent))


def _state_bytes(data: Metadata, embedding: int, heads: int) -> int:
    """Return what one slot's state takes in one recurrent layer (``n_embd_r`` and ``n_embd_s``, f32)."""
    if head := data.number("wkv.head_size", 0):
        shifts = data.number("token_shift_count", 1 if data.architecture in ("rwkv6qwen2", "arwkv7") else 2)
        return 4 * embedding * (shifts + head)
    if cache := data.number("shortconv.l_cache", 0):
        return 4 * embedding * (cache - 1)
    kernel, state = data.number("ssm.conv_kernel", 0), data.number("ssm.state_size", 0)
    if head := data.number("kda.head_dim", 0):
        return 4 * heads * head * (3 * (kernel - 1 if kernel else 3) + head)
    inner, groups = data.number("ssm.inner_size", 0), data.number("ssm.group_count", 0)
    return 4 * (max(0, kernel - 1) * (inner + 2 * groups * state) + state * inner)


def _has_dense_network(model: ModelFacts) -> bool:
    """Whether a layer of a model with experts has a feed-forward network too; its width is given in any case."""
    return any(tensor.name.endswith((".ffn_up.weight", ".ffn_gate.weight")) for tensor in model.tensors)


def _vocabulary(model: ModelFacts) -> int:
    """Return how many tokens there are: how wide the answer for one token is."""
    rows = {tensor.name: tensor.shape[1] for tensor in model.tensors if len(tensor.shape) == 2}
    listed = model.metadata.get("tokenizer.ggml.tokens.length", 0)
    default = listed if isinstance(listed, int) and 0 < listed <= MAX_NUMBER else 0
    return rows.get("output.weight", rows.get("token_embd.weight", default))


def _guesses(data: Metadata) -> tuple[str, ...]:
    """Return in plain words what is not known about this architecture."""
    name = data.architecture
    if hints := [key for key in _HINTS_OF_MORE if data.has(key)]:
        return (f"{name} has parts that are not known here ({', '.join(hints)}): the cache is a guess",)
    if name in _UNMEASURED:
        return (f"{name} was never measured: its compute buffer is a guess",)
    unknown = name not in WINDOWED and name not in IGNORES_WINDOW and name not in ENCODERS
    if unknown and data.number("attention.sliding_window", 0):
        return (f"{name} has a sliding window by rules that are not known here: the cache is a guess",)
    return ()
