"""What the node decides about one start, in llama-server's words."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from mesh.core.devices import Devices, Gpu
from mesh.core.estimate import Estimate, Part
from mesh.core.footprint import Footprint, Source
from mesh.core.placement import Need, place
from mesh.core.resources import Resources
from mesh.engine.assignment import Assignment, assign, counts_gpus

GPUS = tuple(Gpu(f"gpu{i}", f"GPU-{i}", "A100", 80_000, 0, index=i) for i in range(3))
AMD = tuple(Gpu(f"gpu{i}", f"{i:x}", "MI300", 192_000, 0, vendor="amd", index=i + 1) for i in range(2))
CAPACITY = Resources({"ram": 64_000, "gpu0": 10_000, "gpu1": 20_000, "gpu2": 5_000})
NO_GPU = Estimate(Part(), Part(), Part(), Part(), Part(), Part(), Part(), 0, 512, 1)


def test_nothing_is_said_where_nothing_was_decided() -> None:
    assert Assignment().environment((), {}) == {}
    assert Assignment().arguments((), {}) == ()


def test_one_gpu_by_its_uuid() -> None:
    assignment = Assignment(GPUS[1:2], (500,))
    assert assignment.environment((), {}) == {"CUDA_VISIBLE_DEVICES": "GPU-1"}
    assert assignment.arguments((), {}) == ()


def test_several_gpus_with_their_shares() -> None:
    assignment = Assignment(GPUS[:2], (3000, 1000), 256)
    assert assignment.environment((), {}) == {"CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1", "LLAMA_ARG_CACHE_RAM": "256"}
    assert assignment.arguments((), {}) == ("--tensor-split", "3000,1000")


def test_amd_gpus_by_their_numbers() -> None:
    assert Assignment(AMD).environment((), {}) == {"HIP_VISIBLE_DEVICES": "1,2"}


def test_no_gpu_is_hidden_from_every_vendor() -> None:
    assert set(Assignment(()).environment((), {}).values()) == {"-1"}


@pytest.mark.parametrize(
    ("args", "env"),
    [
        (("-ts", "1,1"), {}),
        (("--tensor-split=1,1",), {}),
        (("-dev", "CUDA1"), {}),
        (("-mg", "1"), {}),
        ((), {"LLAMA_ARG_DEVICE": "CUDA1"}),
        ((), {"LLAMA_ARG_MAIN_GPU": "2"}),
    ],
)
def test_who_counts_gpus_sees_those_that_he_counted(args: tuple[str, ...], env: Mapping[str, str]) -> None:
    assert counts_gpus(args, env)
    assignment = Assignment(GPUS[:2], (1, 1))
    assert assignment.environment(args, env) == {}
    assert assignment.arguments(args, env) == ()
    assert not counts_gpus(("-mg", "0", "-m", "-ts.gguf"), {})


@pytest.mark.parametrize(
    ("args", "env"), [(("-cram", "0"), {}), (("--cache-ram=-1",), {}), ((), {"LLAMA_ARG_CACHE_RAM": "9"})]
)
def test_the_users_prompt_cache_stays(args: tuple[str, ...], env: Mapping[str, str]) -> None:
    assert Assignment(None, (), 512).environment((), {}) == {"LLAMA_ARG_CACHE_RAM": "512"}
    assert Assignment(None, (), 512).environment(args, env) == {}


def test_the_order_that_the_user_counts_on() -> None:
    assignment = Assignment(GPUS, (1, 2, 3)).in_order_of(("gpu2", "GPU-0"))
    assert [gpu.kind for gpu in assignment.gpus or ()] == ["gpu2", "gpu0", "gpu1"]
    assert assignment.shares_mib == (3, 1, 2)


def assigned(need: Need, **fields: object) -> Assignment:
    placed = place(need, CAPACITY, Resources())
    assert placed is not None
    return assign(Footprint(need, Source.ESTIMATED, **fields), placed, Devices("nvml", GPUS))  # type: ignore[arg-type]


def test_what_was_placed_is_what_the_child_is_told() -> None:
    assert assigned(Need(split_mib=4000, each_mib=500)) == Assignment(GPUS[2:], (4000,))
    spread = assigned(Need(split_mib=25_000, each_mib=500, grain_mib=200))
    assert spread.gpus == GPUS[:2]
    assert sum(spread.shares_mib) == 25_000
    room = [10_000 - 700, 20_000 - 700]
    assert spread.shares_mib[0] == pytest.approx(25_000 * room[0] / sum(room), abs=1)


def test_gpus_are_hidden_only_from_a_model_that_is_known_to_need_none() -> None:
    assert assigned(Need(), estimate=NO_GPU, prompt_cache_mib=7) == Assignment((), (), 7)
    assert assigned(Need()).gpus is None, "of a model that nobody knows we do not know that"
    here = assign(Footprint(Need(), Source.ESTIMATED, NO_GPU), Resources(), Devices())
    assert here.gpus is None, "no GPU is known here; there may be one all the same"
