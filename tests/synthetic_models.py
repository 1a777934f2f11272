"""Zero-weight GGUF models of every kind that memory is computed for, which the unmodified llama-server really loads.

They say nothing sensible; their layers, widths, caches and metadata are those of real models. The tensor data is one
hole in the file, so a model of any size is written in milliseconds and takes no disk.

``write(kind, path, **shape)`` writes one; ``KINDS`` names them. What each needs is what llama.cpp asks for, found by
asking it. Needs ``gguf`` (the ``dev`` extra).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tests.synthetic_file import Model, Quant, Shape
from tests.synthetic_parts import attention, blocks, experts, ffn, head, heads, shared_expert
from tests.synthetic_recurrent import falcon_h1, granitehybrid, jamba, lfm2, mamba, mamba2, qwen35, rwkv7

__all__ = ["KINDS", "Quant", "Shape", "write"]


def _dense(model: Model, norms: Sequence[str], *, qk_norm: bool = False, bias: bool = False) -> None:
    head(model)
    heads(model)
    model.key("feed_forward_length", model.shape.ff)
    model.norms("", ["output_norm"], model.shape.width)
    for prefix in blocks(model):
        model.norms(prefix, norms, model.shape.width)
        attention(model, prefix, qk_norm=qk_norm, bias=bias)
        ffn(model, prefix)


def _llama(model: Model) -> None:
    _dense(model, ["attn_norm", "ffn_norm"])


def _qwen2(model: Model) -> None:
    _dense(model, ["attn_norm", "ffn_norm"], bias=True)


def _qwen3(model: Model) -> None:
    _dense(model, ["attn_norm", "ffn_norm"], qk_norm=True)


def _gemma2(model: Model) -> None:
    _dense(model, ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"])
    model.keys(attention__sliding_window=model.shape.window)


def _gemma3(model: Model) -> None:
    _dense(model, ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"], qk_norm=True)
    model.keys(attention__sliding_window=model.shape.window)


def _phi3(model: Model) -> None:
    """Attention and feed-forward each in one fused matrix."""
    shape = model.shape
    fused = (shape.heads + 2 * shape.heads_kv) * shape.head_dim
    head(model)
    heads(model)
    model.keys(feed_forward_length=shape.ff, rope__scaling__original_context_length=shape.context)
    model.norms("", ["output_norm"], shape.width)
    for prefix in blocks(model):
        model.norms(prefix, ["attn_norm", "ffn_norm"], shape.width)
        model.matrix(f"{prefix}attn_qkv", shape.width, fused)
        model.matrix(f"{prefix}attn_output", shape.heads * shape.head_dim, shape.width)
        model.matrix(f"{prefix}ffn_up", shape.width, 2 * shape.ff)
        model.matrix(f"{prefix}ffn_down", shape.ff, shape.width)


def _cohere2(model: Model) -> None:
    """Attention and feed-forward side by side; three layers of four with a sliding window."""
    _dense(model, ["attn_norm"])
    model.keys(attention__layer_norm_epsilon=1e-5, attention__sliding_window=model.shape.window, logit_scale=0.25)


def _qwen3moe(model: Model) -> None:
    shape = model.shape
    head(model)
    heads(model)
    model.keys(feed_forward_length=shape.ff, expert_count=shape.experts, expert_used_count=shape.experts_used)
    model.keys(expert_feed_forward_length=shape.ff_expert)
    model.norms("", ["output_norm"], shape.width)
    for prefix in blocks(model):
        model.norms(prefix, ["attn_norm", "ffn_norm"], shape.width)
        attention(model, prefix, qk_norm=True)
        experts(model, prefix, shape.ff_expert)


def _llamamoe(model: Model) -> None:
    """Mixtral: llama with experts of the width of its FFN."""
    shape = model.shape
    head(model)
    heads(model)
    model.keys(feed_forward_length=shape.ff_expert, expert_count=shape.experts, expert_used_count=shape.experts_used)
    model.norms("", ["output_norm"], shape.width)
    for prefix in blocks(model):
        model.norms(prefix, ["attn_norm", "ffn_norm"], shape.width)
        attention(model, prefix)
        experts(model, prefix, shape.ff_expert)


def _gptoss(model: Model) -> None:
    """Sliding window in every other layer, experts with biases, attention sinks."""
    shape = model.shape
    head(model)
    heads(model)
    model.keys(feed_forward_length=shape.ff_expert, expert_count=shape.experts, expert_used_count=shape.experts_used)
    model.keys(expert_feed_forward_length=shape.ff_expert, attention__sliding_window=shape.window)
    model.norms("", ["output_norm"], shape.width)
    for prefix in blocks(model):
        model.norms(prefix, ["attn_norm", "post_attention_norm"], shape.width)
        attention(model, prefix, bias=True)
        model.plain(f"{prefix}attn_output.bias", shape.width)
        model.plain(f"{prefix}attn_sinks.weight", shape.heads)
        experts(model, prefix, shape.ff_expert)
        model.plain(f"{prefix}ffn_gate_inp.bias", shape.experts)
        for name, size in {"gate": shape.ff_expert, "up": shape.ff_expert, "down": shape.width}.items():
            model.plain(f"{prefix}ffn_{name}_exps.bias", size, shape.experts)


def _deepseek2(model: Model) -> None:
    """Multi-plain latent attention; the first layer dense, the others with experts and a shared one."""
    shape = model.shape
    plain = shape.head_dim  # of the parts without and with rotation; V has as much as the former
    head(model)
    model.keys(attention__head_count=shape.heads, attention__head_count_kv=1, feed_forward_length=shape.ff)
    model.keys(attention__key_length=shape.kv_rank + shape.rope_dim, attention__value_length=shape.kv_rank)
    model.keys(attention__key_length_mla=plain + shape.rope_dim, attention__value_length_mla=plain)
    model.keys(attention__kv_lora_rank=shape.kv_rank, attention__q_lora_rank=shape.kv_rank)
    model.keys(rope__dimension_count=shape.rope_dim, rope__freq_base=10000.0, leading_dense_block_count=1)
    model.keys(expert_count=shape.experts, expert_used_count=shape.experts_used, expert_shared_count=1)
    model.keys(expert_feed_forward_length=shape.ff_expert, expert_weights_scale=1.0, expert_gating_func=2)
    model.norms("", ["output_norm"], shape.width)
    for index, prefix in enumerate(blocks(model)):
        model.norms(prefix, ["attn_norm", "ffn_norm"], shape.width)
        model.norms(prefix, ["attn_q_a_norm", "attn_kv_a_norm"], shape.kv_rank)
        model.matrix(f"{prefix}attn_q_a", shape.width, shape.kv_rank)
        model.matrix(f"{prefix}attn_q_b", shape.kv_rank, shape.heads * (plain + shape.rope_dim))
        model.matrix(f"{prefix}attn_kv_a_mqa", shape.width, shape.kv_rank + shape.rope_dim)
        model.matrix(f"{prefix}attn_k_b", plain, shape.kv_rank, shape.heads)
        model.matrix(f"{prefix}attn_v_b", shape.kv_rank, plain, shape.heads)
        model.matrix(f"{prefix}attn_output", shape.heads * plain, shape.width)
        if index == 0:
            ffn(model, prefix)
            continue
        experts(model, prefix, shape.ff_expert)
        shared_expert(model, prefix)


def _bert(model: Model) -> None:
    """An encoder: no KV cache."""
    _encoder(model)
    shape = model.shape
    model.matrix("position_embd", shape.width, shape.context)
    for prefix in blocks(model):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            model.matrix(prefix + name, shape.width, shape.width)
            model.plain(f"{prefix}{name}.bias", shape.width)
        model.matrix(f"{prefix}ffn_up", shape.width, shape.ff)
        model.plain(f"{prefix}ffn_up.bias", shape.ff)
        model.matrix(f"{prefix}ffn_down", shape.ff, shape.width)
        model.plain(f"{prefix}ffn_down.bias", shape.width)


def _nomic(model: Model) -> None:
    """An encoder with rotary positions and a gated feed-forward network."""
    _encoder(model)
    shape = model.shape
    model.keys(rope__freq_base=10000.0)
    for prefix in blocks(model):
        model.matrix(f"{prefix}attn_qkv", shape.width, 3 * shape.width)
        model.matrix(f"{prefix}attn_output", shape.width, shape.width)
        ffn(model, prefix)


def _encoder(model: Model) -> None:
    """What the encoders share."""
    shape = model.shape
    head(model)
    model.keys(attention__head_count=shape.heads, feed_forward_length=shape.ff, attention__causal=False)
    model.keys(attention__layer_norm_epsilon=1e-6, pooling_type=1)
    model.writer.add_token_type_count(2)
    model.plain("token_types.weight", shape.width, 2)
    model.normed("token_embd_norm", shape.width)
    for prefix in blocks(model):
        for name in ("attn_output_norm", "layer_output_norm"):
            model.normed(prefix + name, shape.width)


@dataclass(frozen=True)
class Kind:
    """How one kind is written: its architecture, its tensors, its usual shape."""

    arch: str
    fill: Callable[[Model], None]
    shape: Shape


QWEN35: Final = Shape(attention_every=4, width=1024, head_dim=128, heads_kv=2, ff=3072, state=128, inner=2048, groups=8)
KINDS: Final[dict[str, Kind]] = {
    "dense": Kind("llama", _llama, Shape()),
    "tied": Kind("llama", _llama, Shape(tied=True, vocab=32000)),
    "qwen2": Kind("qwen2", _qwen2, Shape(heads=14, heads_kv=2, width=896, ff=2432)),
    "gqa": Kind("qwen3", _qwen3, Shape(heads=16, heads_kv=4, head_dim=128, width=1024, ff=3072, vocab=16384)),
    "gemma2": Kind(
        "gemma2", _gemma2, Shape(heads=4, heads_kv=2, head_dim=256, width=1152, ff=4608, window=1024, tied=True)
    ),
    "swa": Kind(
        "gemma3",
        _gemma3,
        Shape(layers=7, heads=4, heads_kv=1, head_dim=256, width=1152, ff=6912, window=512, tied=True),
    ),
    "cohere2": Kind("cohere2", _cohere2, Shape(layers=8, heads_kv=2, ff=2048, window=1024, tied=True)),
    "phi3": Kind("phi3", _phi3, Shape(heads=16, width=1024, ff=2816)),
    "gptoss": Kind("gpt-oss", _gptoss, Shape(heads=16, heads_kv=4, window=128, width=768, ff_expert=768)),
    "moe": Kind("qwen3moe", _qwen3moe, Shape(heads_kv=2, experts=16, experts_used=4)),
    "mixtral": Kind("llama", _llamamoe, Shape(heads_kv=2, ff_expert=1024)),
    "mla": Kind("deepseek2", _deepseek2, Shape(heads=8)),
    "hybrid": Kind("lfm2", lfm2, Shape(conv=3, heads=16, heads_kv=4, width=1024, ff=2560, tied=True)),
    "granite": Kind("granitehybrid", granitehybrid, Shape(heads_kv=2, state=128)),
    "mamba": Kind("mamba", mamba, Shape(tied=True)),
    "mamba2": Kind("mamba2", mamba2, Shape(state=128)),
    "falcon": Kind("falcon-h1", falcon_h1, Shape(heads_kv=2, state=128)),
    "jamba": Kind("jamba", jamba, Shape(heads_kv=2)),
    "qwen35": Kind("qwen35", qwen35, QWEN35),
    "qwen35moe": Kind("qwen35moe", qwen35, QWEN35),
    "qwen3next": Kind("qwen3next", qwen35, QWEN35),
    "rwkv7": Kind("rwkv7", rwkv7, Shape(state=64, ff=2048)),
    "encoder": Kind("bert", _bert, Shape(heads=6, width=384, context=512, tied=True)),
    "nomic": Kind("nomic-bert", _nomic, Shape(heads=12, width=768, ff=3072, context=2048, tied=True)),
}


def write(kind: str, path: Path | str, **sizes: Any) -> Path:
    """Write a model of *kind* with the given sizes of ``Shape``, else that kind's usual ones."""
    wanted = KINDS[kind]
    model = Model(wanted.arch, replace(wanted.shape, **sizes), Path(path))
    wanted.fill(model)
    model.close()
    return model.path
