"""The building blocks that most synthetic models share: vocabulary and output, attention, feed-forward, experts."""

from __future__ import annotations

from collections.abc import Sequence

from tests.synthetic_file import Model


def head(model: Model) -> None:
    """What every model has: sizes, vocabulary, embedding, output."""
    shape = model.shape
    model.keys(context_length=shape.context, embedding_length=shape.width, block_count=shape.layers)
    model.keys(vocab_size=shape.vocab, attention__layer_norm_rms_epsilon=1e-6)
    model.vocabulary()
    model.matrix("token_embd", shape.width, shape.vocab)
    if not shape.tied:
        model.matrix("output", shape.width, shape.vocab)


def heads(model: Model, heads_kv: int | Sequence[int] | None = None) -> None:
    shape = model.shape
    model.keys(attention__head_count=shape.heads, attention__head_count_kv=heads_kv or shape.heads_kv)
    model.keys(attention__key_length=shape.head_dim, attention__value_length=shape.head_dim)
    model.keys(rope__dimension_count=shape.head_dim, rope__freq_base=10000.0)


def attention(model: Model, prefix: str, *, qk_norm: bool = False, bias: bool = False, gated: bool = False) -> None:
    shape = model.shape
    q, kv = shape.heads * shape.head_dim, shape.heads_kv * shape.head_dim
    for name, size in {"attn_q": 2 * q if gated else q, "attn_k": kv, "attn_v": kv}.items():
        model.matrix(prefix + name, shape.width, size)
        if bias:
            model.plain(f"{prefix}{name}.bias", size)
    model.matrix(f"{prefix}attn_output", q, shape.width)
    if qk_norm:
        model.norms(prefix, ["attn_q_norm", "attn_k_norm"], shape.head_dim)


def ffn(model: Model, prefix: str) -> None:
    shape = model.shape
    for name in ("ffn_gate", "ffn_up"):
        model.matrix(prefix + name, shape.width, shape.ff)
    model.matrix(f"{prefix}ffn_down", shape.ff, shape.width)


def experts(model: Model, prefix: str, width: int) -> None:
    """A router and its experts, each *width* wide inside."""
    shape = model.shape
    model.plain(f"{prefix}ffn_gate_inp.weight", shape.width, shape.experts)
    for name in ("ffn_gate_exps", "ffn_up_exps"):
        model.matrix(prefix + name, shape.width, width, shape.experts)
    model.matrix(f"{prefix}ffn_down_exps", width, shape.width, shape.experts)


def shared_expert(model: Model, prefix: str) -> None:
    """The expert that every token uses."""
    shape = model.shape
    for name in ("ffn_gate_shexp", "ffn_up_shexp"):
        model.matrix(prefix + name, shape.width, shape.ff_expert)
    model.matrix(f"{prefix}ffn_down_shexp", shape.ff_expert, shape.width)


def blocks(model: Model) -> list[str]:
    return [f"blk.{index}." for index in range(model.shape.layers)]
