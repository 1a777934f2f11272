"""The estimate against figures that llama-server b11549 itself logged, and its rules of placement.

``tests/e2e/test_estimate_accuracy.py`` asks the real server; here the same figures are written down.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gguf
import pytest

from mesh.core import ggml_types
from mesh.core.estimate import Estimate, EstimateError, Part, estimate
from mesh.core.launch_options import DraftOptions, LaunchOptions
from mesh.core.model_facts import ModelFacts
from tests.core.estimate_models import (
    F32,
    Q4_0,
    Q8_0,
    bert,
    deepseek2,
    gemma3,
    lfm2,
    mamba2,
    matrix,
    model,
    moe,
    smollm2,
)

MIB = 1024**2


def on_host(facts: ModelFacts, **options: Any) -> Estimate:
    return estimate(facts, LaunchOptions(**options), gpus=False)


def on_gpus(facts: ModelFacts, **options: Any) -> Estimate:
    return estimate(facts, LaunchOptions(**options), gpus=True)


def mib(part: Part) -> float:
    return round(part.total / MIB, 2)


@pytest.mark.parametrize(
    ("facts", "options", "kv", "recurrent", "compute", "output"),
    [
        (smollm2(), {"context": 4096}, 90.00, 0, 18.64, 0.75),
        (smollm2(), {"context": 4096, "slots": 2}, 90.00, 0, 16.64, 0.38),
        (smollm2(), {"context": 8192, "slots": 1, "flash_attn": False}, 180.00, 0, 167.51, 0.19),
        (smollm2(), {"context": 8192, "type_k": "q8_0", "type_v": "q8_0"}, 95.62, 0, 22.67, 0.75),
        (smollm2(), {"context": 2048, "ubatch": 2048, "slots": 1}, 45.00, 0, 66.57, 0.19),
        (smollm2(), {"context": 2048, "slots": 2, "kv_unified": True}, 45.00, 0, 16.64, 0.38),
        (smollm2(), {"context": 1000, "slots": 3}, 33.75, 0, 15.17, 0.56),
        (smollm2(), {"context": 100}, 5.62, 0, 2.91, 0.75),
        (smollm2(), {"context": 40000, "slots": 1}, 883.12, 0, 53.89, 0.19),
        (smollm2(), {"context": 4096, "ubatch": 0}, 90.00, 0, 74.57, 0.75),
        (smollm2(), {"context": 4096, "batch": 100}, 90.00, 0, 3.64, 0.75),
        (smollm2(), {"context": 2048, "embedding": True}, 45.00, 0, 104.77, 0.76),
        (gemma3(), {"context": 4096}, 19.00, 0, None, 0.12),
        (deepseek2(), {"context": 4096}, 9.00, 0, None, None),
        (lfm2(), {"context": 4096}, 8.00, 0.06, None, None),
        (mamba2(), {"context": 4096}, 0, 8.23, 18.60, 0.12),
        (mamba2(), {"context": 4096, "slots": 16}, 0, 32.93, 32.27, None),
        (mamba2(), {"context": 4096, "ubatch": 128}, 0, 8.23, 7.69, None),
        (bert(), {"context": 4096}, 0, 0, 7.26, 0.12),
        (bert(), {"context": 4096, "flash_attn": False}, 0, 0, 12.26, 0.12),
    ],
)
def test_it_agrees_with_what_llama_server_logged(
    facts: ModelFacts, options: dict[str, Any], kv: float, recurrent: float, compute: float | None, output: float | None
) -> None:
    """Trap 45: the arguments change the estimate. Caches are exact; compute buffers (where noted) within 6 %."""
    found = on_host(facts, **options)
    assert (mib(found.kv), mib(found.recurrent)) == pytest.approx((kv, recurrent), abs=0.011)
    assert output is None or mib(found.output) == pytest.approx(output, abs=0.011)
    assert compute is None or mib(found.compute) == pytest.approx(compute, rel=0.06)
    assert found.total.gpu == 0


def test_quantized_caches_are_smaller_in_the_ratio_of_their_types() -> None:
    """Trap 45."""
    full, half = on_host(smollm2(), context=8192), on_host(smollm2(), context=8192, type_k="q8_0")
    assert half.kv.total / full.kv.total == pytest.approx((17 / 32 + 1) / 2)


def test_a_window_bounds_the_cache_of_its_layers() -> None:
    plain = on_host(gemma3(attention__sliding_window=0), context=16384)
    windowed = on_host(gemma3(), context=16384)
    full = on_host(gemma3(), context=16384, swa_full=True)
    assert full.kv == plain.kv
    assert windowed.kv.total == plain.kv.total // 7 * (1 + 6 * 2560 / 16384)
    assert on_host(gemma3(), context=16384, slots=1).kv.total < windowed.kv.total


def test_the_file_overrides_which_layers_have_a_window() -> None:
    every_second = on_host(gemma3(attention__sliding_window_pattern=2), context=16384)
    listed = on_host(gemma3(attention__sliding_window_pattern=(True, False) * 4), context=16384)
    assert every_second.kv == listed.kv
    assert every_second.kv.total > on_host(gemma3(), context=16384).kv.total


def test_a_window_by_unknown_rules_is_counted_in_full_and_said_to_be_a_guess() -> None:
    facts = gemma3()
    renamed = {key.replace("gemma3", "newarch"): value for key, value in facts.metadata.items()}
    found = on_host(replace(facts, metadata={**renamed, "general.architecture": "newarch"}), context=16384)
    assert found.kv == on_host(gemma3(attention__sliding_window=0), context=16384).kv
    assert "guess" in found.notes[0]


def test_layers_go_to_the_gpu_from_the_head_down() -> None:
    """``-ngl 3`` is the output head and two blocks (measured); the input's embedding stays on the host."""
    block, embedding = 576 // 32 * 18 * 1536, 576 // 32 * 34 * 49152
    for layers, blocks in ((3, 2), (1, 0), (31, 30), (99, 30), (None, 30)):
        found = on_gpus(smollm2(), context=4096, gpu_layers=layers)
        assert found.weights.gpu == blocks * block + embedding + 576 * 4  # tied: the embedding is there once more
        assert found.weights.cpu == (30 - blocks) * block + embedding
        assert found.kv == Part(found.kv.total * blocks // 30, found.kv.total * (30 - blocks) // 30)
    assert on_gpus(smollm2(), context=4096, gpu_layers=0).weights == on_host(smollm2(), context=4096).weights


def test_what_stays_on_the_host_is_the_users_choice() -> None:
    everything = on_gpus(smollm2(), context=4096)
    assert everything.compute.gpu > 3 * everything.compute.cpu > 0
    held_back = on_gpus(smollm2(), context=4096, kv_offload=False)
    assert (held_back.kv.gpu, held_back.kv.cpu) == (0, everything.kv.gpu)
    assert on_gpus(smollm2(), context=4096, devices=("none",)).total == on_host(smollm2(), context=4096).total
    idle = on_gpus(smollm2(), context=4096, gpu_layers=0, op_offload=False)
    assert idle.total.gpu == 0
    assert on_gpus(smollm2(), context=4096, gpu_layers=0).compute.gpu > 0  # large batches are computed there


def test_experts_stay_on_the_host_by_layer_and_by_name() -> None:
    experts = 512 * 512 * 8 * 2
    whole = on_gpus(moe())
    for options in ({"cpu_moe_layers": 1}, {"overrides": ((r"blk\.0\.ffn_.*_exps", "CPU"),)}):
        part = on_gpus(moe(), **options)
        assert whole.weights.gpu - part.weights.gpu == experts
        assert part.weights.total == whole.weights.total
        assert part.compute.gpu - whole.compute.gpu == experts  # they are handed over for large batches
    assert on_gpus(moe(), cpu_moe_layers=99).weights.gpu == whole.weights.gpu - 2 * experts
    assert on_gpus(moe(), overrides=((r"\.0\.ffn_up_exps", "CUDA0"),), cpu_moe_layers=99).weights.gpu == (
        whole.weights.gpu - experts
    )
    assert on_gpus(moe(), overrides=(("(", "CPU"), ("a{99999999999}", "CPU"))).weights == whole.weights


def test_the_largest_layer_is_what_one_gpu_must_take_at_once() -> None:
    layer = 512 * 512 * 2 + 512 * 512 * 8 * 2
    found = on_gpus(moe(), context=4096)
    assert found.largest_layer_bytes == max(layer + found.kv.gpu // 2, 512 * 8192 * 2)
    assert on_gpus(moe(), context=4096, kv_offload=False).largest_layer_bytes == max(layer, 512 * 8192 * 2)
    assert on_host(moe()).largest_layer_bytes == 0


def test_a_tied_head_takes_no_more_unless_the_processor_stores_it_in_another_order() -> None:
    """Measured with ``--load-mode none``: a q4_0 embedding is there twice, a q8_0 one is not."""
    for ggml_type, times in ((Q8_0, 1), (Q4_0, 2)):
        facts = replace(smollm2(), tensors=(matrix("token_embd", 576, 49152, ggml_type=ggml_type),))
        once = ggml_types.tensor_bytes(ggml_type, (576, 49152))
        assert once is not None
        assert on_host(facts, context=512).weights == Part(cpu=times * once)


def test_a_draft_model_is_a_second_server_that_shares_the_slots() -> None:
    """Logged by ``-md`` with SmolLM2 as its own draft: KV, compute and output twice."""
    options = LaunchOptions(context=4096, slots=2, draft=DraftOptions("d.gguf"))
    found = estimate(smollm2(), options, gpus=False, draft=smollm2())
    assert found.draft == on_host(smollm2(), context=4096, slots=2).total
    assert estimate(smollm2(), options, gpus=False).draft == Part()
    quantized = replace(options, draft=DraftOptions("d.gguf", type_k="q8_0"))
    assert estimate(smollm2(), quantized, gpus=False, draft=smollm2()).draft.total < found.draft.total
    held_back = replace(options, draft=DraftOptions("d.gguf", gpu_layers=0))
    assert estimate(smollm2(), held_back, gpus=True, draft=smollm2()).draft.cpu > found.draft.cpu // 2


def test_projector_and_adapters_are_counted_where_they_go() -> None:
    projector = model(
        "clip", matrix("v.blk.0.ffn_up", 1024, 4096), vision__image_size=448, vision__patch_size=14,
        vision__embedding_length=1024, vision__feed_forward_length=4096, vision__attention__head_count=16,
    )  # fmt: skip
    found = estimate(smollm2(), LaunchOptions(mmproj="p"), gpus=True, mmproj=projector, lora_bytes=1000)
    assert found.projector.gpu > 1024 * 4096 * 2
    assert found.projector.cpu == 0
    assert any("projector" in note for note in found.notes)
    assert found.weights.gpu == on_gpus(smollm2()).weights.gpu + 1000
    kept = estimate(smollm2(), LaunchOptions(mmproj="p", mmproj_offload=False), gpus=True, mmproj=projector)
    assert (kept.projector.gpu, kept.projector.cpu) == (0, found.projector.gpu)


def test_tensors_of_an_unknown_type_are_guessed_from_the_file() -> None:
    facts = replace(moe(), tensors=(*moe().tensors, matrix("blk.0.new", 512, 512, ggml_type=999)))
    known = on_host(moe()).weights.cpu
    found = on_host(replace(facts, file_bytes=known + 12345))
    assert found.weights.cpu == known + 12345
    assert "guess" in found.notes[0]


def test_every_type_has_the_size_that_gguf_says() -> None:
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.value in ggml_types.TYPES and kind.name != "Q8_1":  # PyPI's table is wrong there; never in files
            assert ggml_types.TYPES[kind.value][1:] == (block, size), kind
    assert ggml_types.tensor_bytes(Q4_0, (33, 2)) is None
    assert ggml_types.tensor_bytes(F32, ()) == 4


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (ModelFacts(), "general.architecture"),
        (model("clip"), "no clip.block_count"),
        (model("llama", block_count=0, embedding_length=8), "make no model"),
        (model("llama", block_count=-1), "block_count is '-1'"),
        (model("llama", block_count=2.5), "block_count is '2.5'"),
        (model("llama", block_count=True), "block_count is 'True'"),
        (model("llama", block_count=10**9, embedding_length=8), "make no model"),
        (gemma3(attention__head_count=0), "head_count is 0"),
        (gemma3(attention__head_count_kv=(1, 2)), "has 2 entries for 7 layers"),
        (gemma3(nextn_predict_layers=7), "make no model"),
        (gemma3(attention__key_length=2**50), "not a number that makes sense"),
    ],
)
def test_what_is_no_model_is_refused_in_words(facts: ModelFacts, message: str) -> None:
    """Trap 48."""
    with pytest.raises(EstimateError, match=message):
        on_host(facts)


def test_a_cache_type_that_cannot_hold_the_rows_is_refused() -> None:
    with pytest.raises(EstimateError, match="q8_0"):
        on_host(gemma3(attention__key_length=20), type_k="q8_0")
