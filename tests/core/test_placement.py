"""Where instances go: the rules on random nodes against a slow oracle, and a few cases that one can follow."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.placement import Need, again, at_least, gpu_kinds, highest, place, shares
from mesh.core.resources import RAM, VRAM, Resources
from tests.core.placement_rules import RULES, Case, Placer, Rule, cases, seeded_cases

REAL = Placer()


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_rule_holds_on_random_nodes(rule: Rule) -> None:
    @given(cases())
    @settings(deadline=None, max_examples=100)
    def holds(case: Case) -> None:
        rule(REAL, case)

    holds()


def test_rules_hold_on_seeded_nodes() -> None:
    for case in seeded_cases(1500):
        for rule in RULES:
            rule(REAL, case)


def gpus(*mib: int, **more: int) -> Resources:
    return Resources({**{f"gpu{n}": size for n, size in enumerate(mib)}, **more})


def on(placed: Resources | None) -> dict[str, int]:
    assert placed is not None
    return {kind: placed.mib[kind] for kind in gpu_kinds(placed)}


def test_it_goes_on_the_smallest_gpu_that_has_room() -> None:
    assert on(place(Need(split_mib=10), gpus(80, 48, 24, 12))) == {"gpu3": 10}
    assert on(place(Need(split_mib=10), gpus(80, 48, 24, 12), gpus(72, 30, 0, 3))) == {"gpu1": 10}


def test_it_is_split_by_the_room_on_each_only_if_no_single_gpu_has_room() -> None:
    assert on(place(Need(split_mib=90), gpus(80, 48, 24, 12))) == {"gpu0": 79, "gpu3": 11}
    assert on(place(Need(split_mib=100), gpus(80, 48, 24, 12))) == {"gpu0": 77, "gpu2": 23}
    assert place(Need(split_mib=100, single=True), gpus(80, 48, 24, 12)) is None


def test_each_gpu_takes_its_context_and_several_a_layer_more() -> None:
    need = Need(split_mib=100, each_mib=2, grain_mib=1)
    # gpu0 and gpu2 hold 104 MiB, and 106 are needed on two; of the pairs with room, gpu0 and gpu1 is the only one.
    assert on(place(need, gpus(80, 48, 24, 12))) == {"gpu0": 67, "gpu1": 39}
    assert on(place(Need(split_mib=76, each_mib=4, grain_mib=9), gpus(80, 48))) == {"gpu0": 80}


def test_a_need_without_gpu_memory_uses_none() -> None:
    assert place(Need(Resources({RAM: 5})), gpus(8, ram=5)) == Resources({RAM: 5})
    assert place(Need(Resources({RAM: 5})), gpus(8, ram=4)) is None


def test_the_sum_of_all_gpus_may_be_limited_too() -> None:
    assert on(place(Need(split_mib=10), gpus(12, 12, vram=22), gpus(12, 0, vram=12))) == {"gpu1": 10}
    assert place(Need(split_mib=10), gpus(12, 12, vram=21), gpus(12, 0, vram=12)) is None


def test_a_gpu_that_is_not_there_is_not_used() -> None:
    assert on(place(Need(split_mib=4, gpus=("gpu1", "gpu7")), gpus(8, 8))) == {"gpu1": 4}
    assert place(Need(split_mib=4, gpus=("gpu7",)), gpus(8, 8)) is None
    assert place(Need(split_mib=4, gpus=("gpu1", "gpu7"), all_gpus=True), gpus(8, 8)) is None


def test_the_users_own_proportions_are_kept_even_if_they_do_not_fit() -> None:
    need = Need(split_mib=12, gpus=("gpu0", "gpu1"), all_gpus=True, proportions=(3.0, 1.0))
    assert on(place(need, gpus(10, 10))) == {"gpu0": 9, "gpu1": 3}
    assert place(need, gpus(8, 20)) is None


def test_a_wrong_number_of_proportions_is_no_crash() -> None:
    need = Need(split_mib=12, gpus=("gpu0", "gpu1"), all_gpus=True, proportions=(3.0, 1.0, 1.0))
    assert sum(on(place(need, gpus(10, 10))).values()) == 12


def test_a_gpu_named_twice_is_one_gpu() -> None:
    assert on(place(Need(split_mib=6, gpus=("gpu0", "gpu0"), all_gpus=True), gpus(8, 8))) == {"gpu0": 6}


def test_many_gpus_are_no_search_through_all_sets() -> None:
    """Sixteen have 12,870 sets of eight; the roomiest do as well."""
    many = gpus(*[20 + n for n in range(16)])
    assert set(on(place(Need(split_mib=240), many))) == {f"gpu{n}" for n in range(8, 16)}
    assert gpu_kinds(many)[-7:] == ["gpu9", "gpu10", "gpu11", "gpu12", "gpu13", "gpu14", "gpu15"]


def test_what_grew_is_charged_where_it_is() -> None:
    placed = place(Need(split_mib=12, each_mib=5), gpus(15, 7))
    assert placed is not None
    assert on(placed) == {"gpu0": 15, "gpu1": 7}
    assert on(again(Need(split_mib=24, each_mib=5), placed)) == {"gpu0": 25, "gpu1": 9}
    assert again(Need(Resources({RAM: 1}), split_mib=6), Resources({VRAM: 4})) == Resources({RAM: 1, VRAM: 6})


@given(st.integers(0, 10**7), st.lists(st.floats(0, 1000), min_size=1, max_size=6))
def test_any_proportions_add_up(total: int, weights: list[float]) -> None:
    result = shares(total, weights)
    assert sum(result) == total
    assert min(result) >= 0


def test_the_highest_of_several_views_is_what_counts() -> None:
    assert highest([gpus(1, 5), gpus(4, 2, ram=3)]) == gpus(4, 5, ram=3)
    assert highest([]) == Resources()


def test_shares_of_huge_proportions() -> None:
    assert shares(100, (1e308, 1.0)) == [100, 0]
    assert shares(100, (1e308, 1e308)) == [50, 50]
    assert sum(shares(100, (float("nan"), 1.0))) == 100


def test_at_least_what_another_has() -> None:
    """Of main memory, and of the divisible part of GPU memory; each GPU's own part is not counted twice."""
    need = Need(Resources({RAM: 3, "instances": 1}), split_mib=4, each_mib=2)
    assert at_least(need, Resources({RAM: 1, "gpu0": 5, "vram": 5})) == need
    assert at_least(need, Resources({RAM: 9, "gpu0": 8, "vram": 8})) == replace(
        need, fixed=Resources({RAM: 9, "instances": 1}), split_mib=6
    )
    assert at_least(need, Resources({"gpu0": 5, "gpu1": 5, "vram": 10})).split_mib == 6
    assert at_least(Need(), Resources({"vram": 8})).split_mib == 8
