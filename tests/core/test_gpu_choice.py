"""Which GPUs are left to the node to pick."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.core.devices import Gpu
from mesh.core.gpu_choice import Choice, choose, named, visible
from mesh.core.launch_options import LaunchOptions
from mesh.core.placement import Need

GPUS = tuple(Gpu(f"gpu{i}", f"GPU-{i}{i}{i}", "A100", 80_000, 0, index=i) for i in range(3))
MIG = tuple(Gpu(f"gpu{i}", f"MIG-{i}", "slice", 10_000, 0, index=0, combinable=False) for i in range(2))
ANY = LaunchOptions()


@pytest.mark.parametrize("name", ["1", "gpu1", "GPU1", "CUDA1", "rocm1", "GPU-111", "gpu-1"])
def test_the_names_of_a_gpu(name: str) -> None:
    assert [gpu.kind for gpu in GPUS if named(gpu, name)] == ["gpu1"]


def test_names_that_mean_none() -> None:
    assert not any(named(gpu, name) for gpu in GPUS for name in ("7", "", "MIG-1", "x1"))


def test_a_list_ends_at_the_first_unknown_name() -> None:
    """As CUDA has it."""
    assert [gpu.kind for gpu in visible("2, 0", GPUS)] == ["gpu2", "gpu0"]
    assert [gpu.kind for gpu in visible("2,-1,0", GPUS)] == ["gpu2"]
    assert visible("", GPUS) == ()


def test_everything_is_left_unless_somebody_said_something() -> None:
    assert choose(ANY, GPUS) == Choice()


def test_devices_and_the_nodes_environment_limit_the_choice() -> None:
    assert choose(ANY, GPUS, allowed=("gpu2", "0")) == Choice(("gpu2", "gpu0"))
    assert choose(ANY, GPUS, inherited="1,2") == Choice(("gpu1", "gpu2"))
    assert choose(ANY, GPUS, allowed=("0",), inherited="1,2") == Choice(("gpu0",)), "the child is told devices"


def test_the_profiles_own_environment_is_the_choice() -> None:
    assert choose(ANY, GPUS, own="2,0", allowed=("1",)) == Choice(("gpu2", "gpu0"), all_gpus=True)
    assert choose(ANY, GPUS, own="") == Choice(())
    assert choose(ANY, GPUS, own="-1") == Choice(())


def test_a_tensor_split_is_of_all_that_the_child_sees() -> None:
    split = LaunchOptions(tensor_split=(3.0, 1.0))
    assert choose(split, GPUS) == Choice(("gpu0", "gpu1", "gpu2"), True, (3.0, 1.0, 0.0))
    assert choose(split, GPUS, own="1,0") == Choice(("gpu1", "gpu0"), True, (3.0, 1.0))
    assert choose(LaunchOptions(tensor_split=(0.0, 0.0)), GPUS) == Choice()


def test_llama_cpp_numbers_what_it_sees() -> None:
    assert choose(LaunchOptions(devices=("CUDA1",)), GPUS) == Choice(("gpu1",), all_gpus=True)
    assert choose(LaunchOptions(devices=("CUDA1",)), GPUS, allowed=("2", "0")) == Choice(("gpu0",), all_gpus=True)
    assert choose(LaunchOptions(devices=("none",)), GPUS) == Choice(())
    assert choose(LaunchOptions(devices=("RPC[10.0.0.1:50052]",)), GPUS) == Choice()
    assert choose(LaunchOptions(devices=("CUDA7",)), GPUS) == Choice()


def test_a_model_that_is_not_split() -> None:
    whole = LaunchOptions(split_mode="none")
    assert choose(whole, GPUS) == Choice(single=True)
    assert choose(whole, GPUS, allowed=("1", "2")) == Choice(("gpu1", "gpu2"), single=True)
    assert choose(replace(whole, main_gpu=2), GPUS) == Choice(("gpu2",), all_gpus=True, single=True)
    assert choose(whole, GPUS, own="2,0") == Choice(("gpu2",), all_gpus=True, single=True)
    assert choose(replace(whole, main_gpu=9), GPUS) == Choice((), single=True)


def test_a_main_gpu_counts_on_all_of_them() -> None:
    assert choose(LaunchOptions(split_mode="row", main_gpu=1), GPUS) == Choice(("gpu0", "gpu1", "gpu2"), all_gpus=True)


def test_slices_of_a_gpu_cannot_be_combined() -> None:
    assert choose(ANY, MIG) == Choice(single=True)
    assert choose(ANY, MIG, allowed=("MIG-1",)) == Choice(("gpu1",), single=True)


def test_without_gpus_there_is_nothing_to_choose() -> None:
    assert choose(LaunchOptions(tensor_split=(1.0,)), ()).gpus == ()


def test_a_choice_becomes_part_of_a_need() -> None:
    need = Choice(("gpu0",), True, (1.0,), True).apply(Need(split_mib=5))
    assert need == Need(split_mib=5, gpus=("gpu0",), all_gpus=True, proportions=(1.0,), single=True)
