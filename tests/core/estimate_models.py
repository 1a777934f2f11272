"""Models of each kind by their metadata and a few tensors, as ``mesh.models.gguf`` would have read them."""

from __future__ import annotations

from mesh.core.model_facts import ModelFacts, Tensor, Value

F32, F16 = 0, 1
Q4_0, Q8_0 = 2, 8


def model(arch: str, *tensors: Tensor, **keys: Value) -> ModelFacts:
    """Return facts with *keys* below *arch*; two underscores stand for a dot."""
    metadata: dict[str, Value] = {f"{arch}.{key.replace('__', '.')}": value for key, value in keys.items()}
    return ModelFacts({"general.architecture": arch, **metadata}, tensors)


def matrix(name: str, *shape: int, ggml_type: int = F16) -> Tensor:
    return Tensor(f"{name}.weight", ggml_type, shape)


def smollm2() -> ModelFacts:
    """SmolLM2-135M by its dimensions; tensors only as far as the estimate looks at them."""
    return model(
        "llama",
        matrix("token_embd", 576, 49152, ggml_type=Q8_0),
        *(matrix(f"blk.{layer}.ffn_up", 576, 1536, ggml_type=Q4_0) for layer in range(30)),
        matrix("output_norm", 576, ggml_type=F32),
        block_count=30,
        context_length=8192,
        embedding_length=576,
        feed_forward_length=1536,
        attention__head_count=9,
        attention__head_count_kv=3,
    )


def gemma3(**keys: Value) -> ModelFacts:
    usual: dict[str, Value] = {
        "block_count": 7,
        "context_length": 16384,
        "embedding_length": 1152,
        "feed_forward_length": 6912,
        "attention__head_count": 4,
        "attention__head_count_kv": 1,
        "attention__key_length": 256,
        "attention__value_length": 256,
        "attention__sliding_window": 512,
    }
    return model("gemma3", matrix("token_embd", 1152, 8192), **{**usual, **keys})


def deepseek2() -> ModelFacts:
    return model(
        "deepseek2",
        block_count=4,
        context_length=16384,
        embedding_length=512,
        feed_forward_length=1536,
        attention__head_count=8,
        attention__head_count_kv=1,
        attention__key_length=288,
        attention__value_length=256,
        attention__key_length_mla=96,
        attention__value_length_mla=64,
    )


def lfm2() -> ModelFacts:
    return model(
        "lfm2",
        block_count=4,
        context_length=16384,
        embedding_length=1024,
        feed_forward_length=2560,
        attention__head_count=16,
        attention__head_count_kv=(0, 4, 0, 4),
        shortconv__l_cache=3,
    )


def mamba2(**keys: Value) -> ModelFacts:
    usual: dict[str, Value] = {
        "block_count": 4,
        "context_length": 16384,
        "embedding_length": 512,
        "ssm__conv_kernel": 4,
        "ssm__inner_size": 1024,
        "ssm__state_size": 128,
        "ssm__group_count": 1,
    }
    return model("mamba2", matrix("token_embd", 512, 8192), **{**usual, **keys})


def bert() -> ModelFacts:
    return model(
        "bert",
        matrix("token_embd", 384, 8192),
        block_count=4,
        context_length=512,
        embedding_length=384,
        feed_forward_length=1536,
        attention__head_count=6,
    )


def moe() -> ModelFacts:
    """Two layers, one matrix and one stack of experts each, and a head."""
    layers = (
        tensor
        for layer in range(2)
        for tensor in (
            matrix(f"blk.{layer}.attn_q", 512, 512),
            matrix(f"blk.{layer}.ffn_up_exps", 512, 512, 8),
        )
    )
    return model(
        "qwen3moe",
        matrix("token_embd", 512, 8192),
        *layers,
        matrix("output", 512, 8192),
        block_count=2,
        context_length=4096,
        embedding_length=512,
        feed_forward_length=0,
        expert_count=8,
        expert_used_count=2,
        expert_feed_forward_length=512,
        attention__head_count=8,
        attention__head_count_kv=8,
    )
