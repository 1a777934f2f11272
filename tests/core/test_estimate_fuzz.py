"""Whatever metadata, tensors and options there are: an estimate that adds up, or a refusal in words (trap 48)."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.estimate import EstimateError, Part, estimate
from mesh.core.launch_options import LaunchOptions
from mesh.core.model_facts import ModelFacts, Tensor, Value
from tests.core.estimate_models import deepseek2, gemma3, lfm2, mamba2, moe, smollm2

_NUMBERS = st.one_of(
    st.integers(-1, 4096), st.integers(), st.floats(), st.booleans(), st.text(max_size=4),
    st.lists(st.integers(-1, 600), max_size=8).map(tuple), st.lists(st.booleans(), max_size=8).map(tuple),
)  # fmt: skip
_KEYS = st.sampled_from(
    [key.partition(".")[2] for facts in (gemma3(), deepseek2(), lfm2(), mamba2(), moe()) for key in facts.metadata]
    + ["nextn_predict_layers", "wkv.head_size", "kda.head_dim", "full_attention_interval", "attention.shared_kv_layers"]
)
_ARCHITECTURES = st.one_of(
    st.sampled_from(["llama", "gemma2", "gemma3", "gemma3n", "gemma4", "llama4", "exaone4", "deepseek2", "bert"]),
    st.sampled_from(["mamba", "mamba2", "rwkv6", "jamba", "falcon-h1", "nemotron_h", "kimi-linear", "qwen3next"]),
    st.just("newarch"),
)
_OPTIONS = st.builds(
    LaunchOptions,
    context=st.integers(),
    slots=st.none() | st.integers(),
    batch=st.integers(),
    ubatch=st.integers(),
    flash_attn=st.none() | st.booleans(),
    gpu_layers=st.none() | st.integers(),
    kv_unified=st.none() | st.booleans(),
    embedding=st.booleans(),
    type_k=st.sampled_from(["f16", "q4_0"]),
    cpu_moe_layers=st.integers(),
)
_TENSORS = st.builds(
    Tensor,
    st.sampled_from(["token_embd.weight", "output.weight", "blk.1.ffn_up_exps.weight", "blk.9999.x", "", "rope"]),
    st.integers(0, 45),
    st.lists(st.integers(0, 2**63), max_size=4).map(tuple),
)


@settings(max_examples=400, deadline=None)
@given(
    _ARCHITECTURES,
    st.dictionaries(_KEYS, _NUMBERS, max_size=6),
    st.lists(_TENSORS, max_size=4),
    _OPTIONS,
    st.booleans(),
)
def test_any_metadata_is_estimated_or_refused(
    arch: str, keys: dict[str, Value], tensors: list[Tensor], options: LaunchOptions, gpus: bool
) -> None:
    """Trap 48: malformed metadata cannot crash sizing."""
    usual = {key.partition(".")[2]: value for key, value in gemma3().metadata.items()}
    metadata = {f"{arch}.{key}": value for key, value in {**usual, **keys}.items()}
    facts = ModelFacts({**metadata, "general.architecture": arch}, tuple(tensors), file_bytes=1000)
    try:
        found = estimate(facts, options, gpus=gpus, draft=facts, mmproj=facts)
    except EstimateError:
        return
    parts = (found.weights, found.kv, found.recurrent, found.compute, found.output, found.draft, found.projector)
    assert all(part.gpu >= 0 and part.cpu >= 0 for part in parts)
    assert gpus or found.total.gpu == 0
    assert found.total == Part(sum(p.gpu for p in parts), sum(p.cpu for p in parts))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([smollm2(), gemma3(), lfm2(), mamba2(), moe()]), _OPTIONS, st.integers(0, 2**17))
def test_more_context_never_takes_less(facts: ModelFacts, options: LaunchOptions, more: int) -> None:
    small = estimate(facts, replace(options, context=max(1, options.context % 2**17)), gpus=True)
    large = estimate(facts, replace(options, context=max(1, options.context % 2**17) + more), gpus=True)
    assert large.kv.total >= small.kv.total
    assert large.total.total >= small.total.total
