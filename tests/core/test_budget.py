"""The node's budget: from limits and devices to what may be held, and what others take of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.core.budget import BudgetLimits, capacity, taken_by_others
from mesh.core.devices import Devices, Gpu
from mesh.core.resources import Resources


def gpu(number: int, total_mib: int, used_mib: int = 0, *, unified: bool = False) -> Gpu:
    return Gpu(f"gpu{number}", f"GPU-{number}", "Test", total_mib, used_mib, index=number, unified=unified)


def machine(*gpus: Gpu, ram_mib: int = 64_000, available_mib: int | None = None) -> Devices:
    return Devices("nvml" if gpus else "none", gpus, ram_mib, ram_mib if available_mib is None else available_mib)


def test_without_devices_the_limits_are_the_budget() -> None:
    assert capacity(BudgetLimits(1000, 500), None).mib == {"instances": 100, "ram": 1000, "vram": 500}


def test_without_limits_gpus_are_limited_by_what_they_have_and_ram_is_not() -> None:
    assert capacity(BudgetLimits(), machine(gpu(0, 24_000))).mib == {"instances": 100, "gpu0": 24_000}


def test_auto_is_a_share_of_each_device() -> None:
    budget = capacity(BudgetLimits("auto", "auto"), machine(gpu(0, 24_000), gpu(1, 8_000)))
    assert budget.mib == {"instances": 100, "ram": 54_400, "gpu0": 22_800, "gpu1": 7_600, "vram": 30_400}


def test_a_gpu_may_have_its_own_limit_by_index_name_or_uuid() -> None:
    devices = machine(gpu(0, 24_000), gpu(1, 8_000), gpu(2, 8_000), gpu(3, 8_000))
    limits = BudgetLimits(None, None, {"0": 20_000, "gpu1": 0, "GPU-2": "auto"})
    assert capacity(limits, devices).mib == {
        "instances": 100, "gpu0": 20_000, "gpu1": 0, "gpu2": 7_600, "gpu3": 8_000
    }  # fmt: skip


def test_a_limit_above_what_there_is_means_all_of_it() -> None:
    budget = capacity(BudgetLimits(100_000, 100_000), machine(gpu(0, 24_000)))
    assert (budget.mib["ram"], budget.mib["vram"]) == (64_000, 24_000)


def test_a_gpu_that_uses_the_machines_memory_has_no_budget_of_its_own() -> None:
    """Trap 48: GB10, Jetson, APUs."""
    assert capacity(BudgetLimits("auto", "auto"), machine(gpu(0, 0, unified=True))).mib == {
        "instances": 100, "ram": 54_400
    }  # fmt: skip


def test_what_others_use_is_taken_off_and_never_twice() -> None:
    """Trap 42: of 24 GiB with a limit of 20, 10 used by others and 3 by us, 14 may be used: 6 less than the limit."""
    devices = machine(gpu(0, 24_000, used_mib=13_000))
    budget = capacity(BudgetLimits(None, None, {"0": 20_000}), devices)
    assert taken_by_others(budget, devices, Resources({"gpu0": 3_000})).mib == {"gpu0": 6_000}
    assert taken_by_others(budget, devices, Resources({"gpu0": 13_000})).mib == {}


def test_main_memory_that_others_take_counts_too() -> None:
    devices = machine(ram_mib=64_000, available_mib=10_000)
    budget = capacity(BudgetLimits(ram_mib=40_000), devices)
    assert taken_by_others(budget, devices, Resources({"ram": 5_000})).mib == {"ram": 25_000}


@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)), max_size=4),
    st.one_of(st.none(), st.just("auto"), st.integers(0, 300)),
    st.one_of(st.none(), st.just("auto"), st.integers(0, 300)),
)
def test_what_is_left_is_within_the_limit_and_what_the_driver_shows_free(
    figures: list[tuple[int, int, int]], vram: int | str | None, own: int | str | None
) -> None:
    """Trap 44: free = min(own ledger, driver), for any limits and any use."""
    devices = machine(*(gpu(n, total, min(total, used)) for n, (total, used, _) in enumerate(figures)))
    ours = Resources({f"gpu{n}": mine for n, (_, _, mine) in enumerate(figures)})
    limits = BudgetLimits(None, vram, {} if own is None else {"0": own})  # type: ignore[arg-type, dict-item]
    budget = capacity(limits, devices)
    left = budget - taken_by_others(budget, devices, ours)
    for g in devices.gpus:
        others = max(0, g.used_mib - ours.mib[g.kind])
        assert left.mib[g.kind] == min(budget.mib[g.kind], g.total_mib - others)
    if "vram" in budget.mib:
        assert left.mib["vram"] <= budget.mib["vram"]
