"""Synthetic models whose layers keep a state instead of, or beside, a KV cache. See ``tests.synthetic_models``."""

from __future__ import annotations

from tests.synthetic_file import Model, Shape
from tests.synthetic_parts import attention, blocks, experts, ffn, head, heads, shared_expert


def _heads_kv_per_layer(shape: Shape) -> list[int]:
    """Zero for the recurrent layers of a hybrid."""
    every = shape.attention_every
    return [shape.heads_kv if index % every == every - 1 else 0 for index in range(shape.layers)]


def lfm2(model: Model) -> None:
    """Short convolutions, attention in between."""
    shape = model.shape
    heads_kv = _heads_kv_per_layer(shape)
    head(model)
    heads(model, heads_kv)
    model.keys(feed_forward_length=shape.ff, shortconv__l_cache=shape.conv)
    model.norms("", ["token_embd_norm"], shape.width)
    for prefix, attends in zip(blocks(model), heads_kv, strict=True):
        model.norms(prefix, ["attn_norm", "ffn_norm"], shape.width)
        ffn(model, prefix)
        if attends:
            attention(model, prefix, qk_norm=True)
            continue
        model.plain(f"{prefix}shortconv.conv.weight", shape.conv, shape.width)
        model.matrix(f"{prefix}shortconv.in_proj", shape.width, 3 * shape.width)
        model.matrix(f"{prefix}shortconv.out_proj", shape.width, shape.width)


def _ssm_keys(model: Model, *, dt_rank: int, groups: int | None = None) -> None:
    shape = model.shape
    model.keys(ssm__conv_kernel=shape.conv, ssm__inner_size=shape.inner, ssm__state_size=shape.state)
    model.keys(ssm__time_step_rank=dt_rank)
    if groups is not None:
        model.key("ssm.group_count", groups)


def mamba(model: Model) -> None:
    shape = model.shape
    head(model)
    model.keys(attention__head_count=0, feed_forward_length=0)
    _ssm_keys(model, dt_rank=shape.width // 16)
    model.norms("", ["output_norm"], shape.width)
    for prefix in blocks(model):
        model.norms(prefix, ["attn_norm"], shape.width)
        _mamba_layer(model, prefix)


def _mamba_layer(model: Model, prefix: str, *, normed: bool = False) -> None:
    shape = model.shape
    dt_rank = shape.width // 16
    model.matrix(f"{prefix}ssm_in", shape.width, 2 * shape.inner)
    model.plain(f"{prefix}ssm_conv1d.weight", shape.conv, shape.inner)
    model.plain(f"{prefix}ssm_conv1d.bias", shape.inner)
    model.matrix(f"{prefix}ssm_x", shape.inner, dt_rank + 2 * shape.state)
    model.matrix(f"{prefix}ssm_dt", dt_rank, shape.inner)
    model.plain(f"{prefix}ssm_dt.bias", shape.inner)
    model.plain(f"{prefix}ssm_a", shape.state, shape.inner)
    model.plain(f"{prefix}ssm_d", shape.inner)
    model.matrix(f"{prefix}ssm_out", shape.inner, shape.width)
    if normed:
        model.norms(prefix, ["ssm_dt_norm"], dt_rank)
        model.norms(prefix, ["ssm_b_norm", "ssm_c_norm"], shape.state)


def _mamba2_layer(model: Model, prefix: str, scans: int) -> None:
    shape = model.shape
    convolved = shape.inner + 2 * shape.groups * shape.state
    model.matrix(f"{prefix}ssm_in", shape.width, shape.inner + convolved + scans)
    model.plain(f"{prefix}ssm_conv1d.weight", shape.conv, convolved)
    model.plain(f"{prefix}ssm_conv1d.bias", convolved)
    model.plain(f"{prefix}ssm_dt.bias", scans)
    model.plain(f"{prefix}ssm_a", 1, scans)
    model.plain(f"{prefix}ssm_d", 1, scans)
    model.plain(f"{prefix}ssm_norm.weight", shape.inner // shape.groups, shape.groups)
    model.matrix(f"{prefix}ssm_out", shape.inner, shape.width)


def mamba2(model: Model) -> None:
    shape = model.shape
    scans = shape.inner // 64
    head(model)
    model.keys(attention__head_count=0, feed_forward_length=0)
    _ssm_keys(model, dt_rank=scans, groups=shape.groups)
    model.norms("", ["output_norm"], shape.width)
    for prefix in blocks(model):
        model.norms(prefix, ["attn_norm"], shape.width)
        _mamba2_layer(model, prefix, scans)


def granitehybrid(model: Model) -> None:
    """Mamba-2 layers, attention in between, a dense FFN in each."""
    shape = model.shape
    heads_kv = _heads_kv_per_layer(shape)
    head(model)
    heads(model, heads_kv)
    model.keys(feed_forward_length=shape.ff, attention__scale=0.125, embedding_scale=1.0)
    model.keys(residual_scale=1.0, logit_scale=1.0)
    _ssm_keys(model, dt_rank=shape.inner // 64, groups=shape.groups)
    model.norms("", ["output_norm"], shape.width)
    for prefix, attends in zip(blocks(model), heads_kv, strict=True):
        model.norms(prefix, ["attn_norm", "ffn_norm"], shape.width)
        ffn(model, prefix)
        if attends:
            attention(model, prefix)
        else:
            _mamba2_layer(model, prefix, shape.inner // 64)


def falcon_h1(model: Model) -> None:
    """Attention and Mamba-2 side by side in every layer."""
    shape = model.shape
    scans = shape.inner // 64
    head(model)
    heads(model)
    model.keys(feed_forward_length=shape.ff)
    _ssm_keys(model, dt_rank=scans, groups=shape.groups)
    model.norms("", ["output_norm"], shape.width)
    for prefix in blocks(model):
        model.norms(prefix, ["attn_norm"], shape.width)
        model.plain(f"{prefix}ffn_norm", shape.width)  # llama.cpp asks for this one without ".weight"
        attention(model, prefix)
        _mamba2_layer(model, prefix, scans)
        ffn(model, prefix)


def jamba(model: Model) -> None:
    """Mamba layers, attention in between, experts in every other one."""
    shape = model.shape
    heads_kv = _heads_kv_per_layer(shape)
    head(model)
    heads(model, heads_kv)
    model.keys(feed_forward_length=shape.ff, expert_count=shape.experts, expert_used_count=shape.experts_used)
    _ssm_keys(model, dt_rank=shape.width // 16)
    model.norms("", ["output_norm"], shape.width)
    for index, (prefix, attends) in enumerate(zip(blocks(model), heads_kv, strict=True)):
        model.norms(prefix, ["attn_norm", "ffn_norm"], shape.width)
        if attends:
            attention(model, prefix)
        else:
            _mamba_layer(model, prefix, normed=True)
        if index % 2:
            experts(model, prefix, shape.ff)
        else:
            ffn(model, prefix)


def qwen35(model: Model) -> None:
    """Gated delta net in most layers, gated attention in the others; experts if the shape has any."""
    shape = model.shape
    every, state = shape.attention_every, shape.state
    scans = shape.inner // state  # heads of the values; those of the keys are the groups
    head(model)
    heads(model)
    model.keys(ssm__conv_kernel=shape.conv, ssm__inner_size=shape.inner, ssm__state_size=state)
    model.keys(ssm__time_step_rank=scans, ssm__group_count=shape.groups, full_attention_interval=every)
    model.keys(rope__dimension_sections=[11, 11, 10, 0], feed_forward_length=shape.ff)
    if model.arch != "qwen35":
        model.keys(expert_count=shape.experts, expert_used_count=shape.experts_used)
        model.keys(expert_feed_forward_length=shape.ff_expert, expert_shared_feed_forward_length=shape.ff_expert)
    model.norms("", ["output_norm"], shape.width)
    for index, prefix in enumerate(blocks(model)):
        model.norms(prefix, ["attn_norm", "post_attention_norm"], shape.width)
        if index % every == every - 1:
            attention(model, prefix, qk_norm=True, gated=True)
        else:
            _delta_net_layer(model, prefix, scans)
        if model.arch == "qwen35":
            ffn(model, prefix)
        else:
            experts(model, prefix, shape.ff_expert)
            shared_expert(model, prefix)
            model.plain(f"{prefix}ffn_gate_inp_shexp.weight", shape.width)


def _delta_net_layer(model: Model, prefix: str, scans: int) -> None:
    shape = model.shape
    mixed = shape.inner + 2 * shape.groups * shape.state
    model.matrix(f"{prefix}attn_qkv", shape.width, mixed)
    model.matrix(f"{prefix}attn_gate", shape.width, shape.inner)
    model.plain(f"{prefix}ssm_conv1d.weight", shape.conv, mixed)
    model.plain(f"{prefix}ssm_dt.bias", scans)
    model.plain(f"{prefix}ssm_a", scans)
    if model.arch == "qwen3next":
        model.matrix(f"{prefix}ssm_ba", shape.width, 2 * scans)
    else:
        model.matrix(f"{prefix}ssm_beta", shape.width, scans)
        model.matrix(f"{prefix}ssm_alpha", shape.width, scans)
    model.plain(f"{prefix}ssm_norm.weight", shape.state)
    model.matrix(f"{prefix}ssm_out", shape.inner, shape.width)


def rwkv7(model: Model) -> None:
    """RWKV-7: a matrix of state per head, no attention."""
    shape, width, rank = model.shape, model.shape.width, 64
    head(model)
    model.keys(attention__layer_norm_epsilon=1e-5, wkv__head_size=shape.state, feed_forward_length=shape.ff)
    model.keys(attention__head_count=0, token_shift_count=2)
    for name in ("decay", "iclr", "value_residual_mix", "gate"):
        model.key(f"attention.{name}_lora_rank", rank)
    model.normed("token_embd_norm", width)
    model.normed("output_norm", width)
    for prefix in blocks(model):
        for name in ("attn_norm", "attn_norm_2", "time_mix_ln"):
            model.normed(prefix + name, width)
        for name in ("w", "a", "v", "g"):
            if name != "g":
                model.plain(f"{prefix}time_mix_{name}0.weight", width)
            model.matrix(f"{prefix}time_mix_{name}1", width, rank)
            model.matrix(f"{prefix}time_mix_{name}2", rank, width)
        model.plain(f"{prefix}time_mix_lerp_fused.weight", width, 1, 1, 6)
        for name in ("k_k", "k_a", "r_k"):
            model.plain(f"{prefix}time_mix_{name}.weight", width)
        for name in ("key", "value", "receptance", "output"):
            model.matrix(f"{prefix}time_mix_{name}", width, width)
        model.plain(f"{prefix}channel_mix_lerp_k.weight", width, 1, 1)
        model.matrix(f"{prefix}channel_mix_key", width, shape.ff)
        model.matrix(f"{prefix}channel_mix_value", shape.ff, width)
