"""What an instance is charged, by who said so and on what machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.core.devices import Gpu
from mesh.core.estimate import Estimate, Part
from mesh.core.footprint import (
    GPU_CONTEXT_MIB,
    GPU_PROCESS_RAM_MIB,
    PROCESS_RAM_MIB,
    Footprint,
    Known,
    Learned,
    Machine,
    Source,
    build,
    needed_ram_mib,
    prompt_cache_mib,
    sees_gpu,
)
from mesh.core.gpu_choice import Choice
from mesh.core.launch_options import LaunchOptions
from mesh.core.placement import Need
from mesh.core.resources import Resources

MIB = 1024 * 1024
GPUS = tuple(Gpu(f"gpu{i}", f"GPU-{i}", "A100", 80_000, 0, index=i) for i in range(2))
ANY_GPU, ANYHOW = Choice(), LaunchOptions()
NONE, TWO, UNIFIED = Machine(), Machine(GPUS), Machine(unified=True)


def estimate(*, weights: Part, kv: Part, compute: Part, layer_mib: int = 0, notes: tuple[str, ...] = ()) -> Estimate:
    nothing = Part()
    return Estimate(weights, kv, nothing, compute, nothing, nothing, nothing, layer_mib * MIB, 4096, 1, notes)


#: as they are where there are GPUs, and where there are none
ON_GPU = estimate(
    weights=Part(8000 * MIB, 400 * MIB), kv=Part(gpu=2000 * MIB), compute=Part(300 * MIB, 100 * MIB), layer_mib=200
)
ON_CPU = estimate(weights=Part(cpu=8000 * MIB), kv=Part(cpu=2000 * MIB), compute=Part(cpu=300 * MIB))


def footprint(
    machine: Machine = NONE,
    *,
    choice: Choice = ANY_GPU,
    options: LaunchOptions = ANYHOW,
    ram: int = 0,
    vram: int = 0,
    learned: Learned | None = None,
    known: bool = True,
    file_bytes: int = 0,
    vocabulary: int = 0,
) -> Footprint:
    it = (ON_GPU if sees_gpu(machine, choice) else ON_CPU) if known else None
    cookbook = Resources.of(ram_mib=ram, vram_mib=vram)
    return build(Known(options, cookbook, learned, it, file_bytes, vocabulary), machine, choice)


# -- estimated


def test_without_gpus_all_is_main_memory() -> None:
    it = footprint()
    assert it.need == Need(Resources.of(ram_mib=10_609 + PROCESS_RAM_MIB))
    assert (it.source, it.problem) == (Source.ESTIMATED, None)


def test_with_gpus_shares_and_what_each_gpu_holds() -> None:
    need = footprint(TWO).need
    assert need.split_mib == 10_300
    assert need.each_mib == 309 + GPU_CONTEXT_MIB
    assert need.grain_mib == 200
    assert need.fixed == Resources.of(ram_mib=515 + PROCESS_RAM_MIB + GPU_PROCESS_RAM_MIB)
    assert need.gpus is None


def test_a_choice_is_passed_on() -> None:
    need = footprint(TWO, choice=Choice(("gpu1",), True, (1.0,), True)).need
    assert (need.gpus, need.all_gpus, need.proportions, need.single) == (("gpu1",), True, (1.0,), True)


def test_a_profile_that_may_use_no_gpu_needs_main_memory() -> None:
    assert footprint(TWO, choice=Choice(())).need == footprint(NONE).need
    assert footprint(TWO, choice=Choice(()), vram=5000).need.gpu_mib == 0


def test_unified_memory_is_main_memory() -> None:
    """trap 48"""
    need = footprint(UNIFIED).need
    assert need.gpu_mib == 0
    gpu = footprint(TWO).need
    assert need.fixed == gpu.fixed + Resources.of(ram_mib=gpu.gpu_mib)


def test_a_large_vocabulary_counts() -> None:
    more = footprint(vocabulary=150_000).need.fixed.mib["ram"] - footprint(vocabulary=50_000).need.fixed.mib["ram"]
    assert 40 <= more <= 45


def test_what_cannot_be_estimated_is_charged_its_file() -> None:
    it = footprint(known=False, file_bytes=1000 * MIB)
    assert it.source is Source.UNKNOWN
    assert it.need.fixed.mib["ram"] == 1030 + PROCESS_RAM_MIB
    assert "cannot be estimated" in it.notes[-1]
    on_gpu = footprint(TWO, known=False, file_bytes=1000 * MIB).need
    assert (on_gpu.split_mib, on_gpu.each_mib) == (1030, GPU_CONTEXT_MIB)


def test_of_nothing_nothing_is_known() -> None:
    for machine in (NONE, TWO, UNIFIED):
        it = footprint(machine, known=False)
        assert (it.need, it.source) == (Need(), Source.UNKNOWN)


def test_the_estimates_doubts_are_passed_on() -> None:
    guess = replace(ON_CPU, notes=("a guess",))
    assert build(Known(LaunchOptions(), estimate=guess), NONE, Choice()).notes == ("a guess",)


# -- the cookbook


def test_the_cookbooks_figures_outrank_the_estimate() -> None:
    it = footprint(TWO, ram=111, vram=5000)
    assert it.source is Source.COOKBOOK
    assert it.need.fixed == Resources.of(ram_mib=111)
    assert it.need.gpu_mib == 5000


def test_a_kind_that_the_cookbook_leaves_out_is_estimated_where_gpus_are_known() -> None:
    assert footprint(TWO, vram=5000).need.fixed == footprint(TWO).need.fixed
    assert footprint(TWO, ram=111).need.gpu_mib == footprint(TWO).need.gpu_mib


def test_where_no_gpu_is_known_a_lone_figure_is_all_there_is() -> None:
    """As ever: GPUs without telemetry have a pool, and who gives its figure only wants that counted."""
    assert footprint(NONE, vram=5000).need == Need(split_mib=5000)
    assert footprint(NONE, ram=111).need == Need(Resources.of(ram_mib=111))


def test_a_figure_smaller_than_a_driver_context_stays_what_it_is() -> None:
    need = footprint(TWO, vram=100).need
    assert (need.split_mib, need.each_mib) == (0, 100)


def test_figures_on_unified_memory_are_the_whole() -> None:
    assert footprint(UNIFIED, vram=5000).need == Need(Resources.of(ram_mib=5000))
    assert footprint(UNIFIED, vram=5000, ram=300).need == Need(Resources.of(ram_mib=5300))


# -- learned


def test_what_was_learned_outranks_all() -> None:
    """trap 47"""
    it = footprint(TWO, ram=9, vram=9, learned=Learned(700, 900, 9000, 1, 3))
    assert it.source is Source.LEARNED
    assert it.need.fixed == Resources.of(ram_mib=900)
    assert it.need.gpu_mib == 9000


def test_a_sample_on_two_gpus_holds_two_contexts() -> None:
    need = footprint(TWO, learned=Learned(700, 900, 9000, 2, 1)).need
    assert need.each_mib == 809
    assert need.split_mib + 2 * need.each_mib == 9000


def test_a_driver_that_says_nothing_leaves_gpu_memory_to_the_others() -> None:
    learned = Learned(700, 900)
    assert footprint(TWO, learned=learned, vram=5000).need.gpu_mib == 5000
    assert footprint(TWO, learned=learned).need.gpu_mib == footprint(TWO).need.gpu_mib
    assert footprint(NONE, learned=learned, vram=5000).need == Need(Resources.of(ram_mib=1009), split_mib=5000)


def test_learned_main_memory_has_room_for_what_was_not_touched_yet() -> None:
    """The prompt cache fills up later, and compute buffers are touched by the first large batch."""
    options = LaunchOptions(prompt_cache_mib=500)
    assert footprint(TWO, options=options, learned=Learned(700, 900)).need.fixed == Resources.of(
        ram_mib=700 + 500 + 103
    )
    assert footprint(TWO, options=options, learned=Learned(700, 2000)).need.fixed == Resources.of(ram_mib=2000)


def test_unified_memory_without_the_drivers_word_is_not_learned_downwards() -> None:
    """trap 48: what the GPU holds of main memory is in no process's share of it."""
    whole = footprint(UNIFIED).need
    assert footprint(UNIFIED, learned=Learned(700, 900)).need == whole
    assert footprint(UNIFIED, learned=Learned(700, 900, 6000, 1)).need.fixed == Resources.of(ram_mib=6900)


# -- the prompt cache


@pytest.mark.parametrize(("limit", "bound"), [(16_000, 1000), (1_000_000, 8192), (10, 0)])
def test_a_prompt_cache_is_a_small_part_of_a_limited_memory(limit: int, bound: int) -> None:
    assert prompt_cache_mib(limit, None) == bound


def test_a_limited_memory_bounds_the_prompt_cache_and_charges_it() -> None:
    limited = Machine(ram_limit_mib=16_000)
    it = footprint(limited)
    assert it.prompt_cache_mib == 1000
    assert it.need.fixed.mib["ram"] == footprint().need.fixed.mib["ram"] + 1000
    figure = footprint(limited, ram=700)
    assert (figure.prompt_cache_mib, figure.need.fixed) == (1000, Resources.of(ram_mib=700))


def test_an_unlimited_memory_leaves_the_prompt_cache_alone() -> None:
    assert footprint().prompt_cache_mib is None


def test_the_users_own_bound_is_charged_and_not_passed_again() -> None:
    for machine in (NONE, Machine(ram_limit_mib=16_000)):
        it = footprint(machine, options=LaunchOptions(prompt_cache_mib=300))
        assert it.prompt_cache_mib is None
        assert it.need.fixed.mib["ram"] == footprint().need.fixed.mib["ram"] + 300
    off = footprint(Machine(ram_limit_mib=16_000), options=LaunchOptions(prompt_cache_mib=0))
    assert (off.prompt_cache_mib, off.need, off.notes) == (None, footprint().need, ())


def test_an_unbounded_prompt_cache_is_noted() -> None:
    it = footprint(options=LaunchOptions(prompt_cache_mib=-1))
    assert it.need == footprint().need
    assert "no bound" in it.notes[0]


@pytest.mark.parametrize("options", [LaunchOptions(embedding=True), LaunchOptions(rerank=True)])
def test_embeddings_have_no_prompt_cache(options: LaunchOptions) -> None:
    it = footprint(Machine(ram_limit_mib=16_000), options=options)
    assert (it.prompt_cache_mib, it.need) == (None, footprint().need)


# -- what of its resident memory is needed


def test_mapped_weights_that_were_copied_are_not_needed_twice() -> None:
    """Trap 45: 4000 of weights; on a GPU none of the mapping is needed, half repacked the other half, plain all."""
    weights, kv = 4000, 500
    on_cpu = estimate(weights=Part(0, weights * MIB), kv=Part(0, kv * MIB), compute=Part())
    on_gpu = replace(on_cpu, weights=Part(weights * MIB, 0), kv=Part(kv * MIB, 0))
    base = PROCESS_RAM_MIB
    assert needed_ram_mib(weights + kv + base, kv + base, on_cpu) == weights + kv + base
    assert needed_ram_mib(weights + 2000 + kv + base, 2000 + kv + base, on_cpu) == weights + kv + base
    assert needed_ram_mib(weights + base, base, on_gpu) == base
    assert needed_ram_mib(weights + base, base, None) == weights + base


def test_an_engine_that_can_use_no_gpu_takes_main_memory_whatever_is_said_of_gpus() -> None:
    """And what is said of them still counts in their pool, as it ever did."""
    said = footprint(Machine(cpu_only=True), vram=500)
    assert (said.need.fixed, said.need.split_mib) == (footprint().need.fixed, 500)
    assert footprint(vram=500).need.fixed == Resources()


def test_a_peak_above_the_whole_budget_was_no_need() -> None:
    """A leak, or -cram -1: the model ran here, so it is not refused for ever for what it once grew to."""
    grown = Learned(ready_ram_mib=30_000, peak_ram_mib=50_000)
    limited = footprint(Machine(ram_limit_mib=20_000), learned=grown)
    assert limited.need == replace(footprint(Machine(ram_limit_mib=20_000)), source=Source.LEARNED).need
    assert footprint(Machine(ram_limit_mib=90_000), learned=grown).need.fixed.mib["ram"] >= 50_000
    assert footprint(Machine(ram_limit_mib=20_000), learned=grown, known=False).need.fixed.mib["ram"] == 20_000
