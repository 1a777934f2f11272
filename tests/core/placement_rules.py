"""What must hold of every placement. Each rule takes the functions under test, to be tried on broken ones too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random

from hypothesis import strategies as st

from mesh.core import placement
from mesh.core.placement import Need, gpu_kinds
from mesh.core.resources import RAM, VRAM, Resources
from tests.core.worlds import Pick, make_capacity, make_need


@dataclass(frozen=True)
class Placer:
    """The functions under test."""

    place: Callable[..., Resources | None] = placement.place
    again: Callable[[Need, Resources], Resources] = placement.again
    shares: Callable[..., list[int]] = placement.shares


@dataclass(frozen=True)
class Case:
    need: Need
    capacity: Resources
    views: tuple[Resources, ...]  #: of what is used; there must be room in each

    def room(self, kind: str) -> int:
        return self.capacity.mib[kind] - max((v.mib.get(kind, 0) for v in self.views), default=0)


Rule = Callable[[Placer, Case], None]


def make_case(pick: Pick) -> Case:
    capacity = make_capacity(pick)
    need = make_need(pick, gpu_kinds(capacity))
    if pick(0, 1):  # larger than the scheduler's: it must be divided
        need = replace(need, split_mib=pick(0, 30), each_mib=pick(0, 4), grain_mib=pick(0, 3))
    kinds = gpu_kinds(capacity)
    if len(kinds) > 1 and pick(0, 2 if need.gpus else 9) == 0:
        capacity = Resources({k: mib for k, mib in capacity.mib.items() if k != kinds[-1]})  # it was lost
    views = tuple(
        Resources({kind: pick(0, limit // 2) for kind, limit in capacity.mib.items() if pick(0, 1)})
        for _ in range(pick(0, 3))
    )
    return Case(need, capacity, views)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return make_case(lambda low, high: draw(st.integers(low, high)))


def seeded_cases(number: int) -> Iterator[Case]:
    rng = Random(3)
    return (make_case(rng.randint) for _ in range(number))


def divisible(total: int, rooms: list[int]) -> bool:
    """Whether *total* MiB can be cut into a piece for each of *rooms*, none of them empty if there is anything to cut.

    By trying every cut: slow, and as simple as can be.
    """
    if not total:
        return min(rooms) >= 0
    first, rest = rooms[0], rooms[1:]
    if not rest:
        return total <= first
    return any(divisible(total - piece, rest) for piece in range(1, min(total - 1, first) + 1))


def possible(case: Case) -> list[tuple[str, ...]]:
    """Return every set of GPUs on which the need has room, the smallest first. The oracle: it tries them all."""
    need, kinds = case.need, gpu_kinds(case.capacity)
    allowed = [kind for kind in kinds if need.gpus is None or kind in need.gpus]
    result: list[tuple[str, ...]] = []
    for size in range(1, (1 if need.single else len(allowed)) + 1):
        extra = need.each_mib + (need.grain_mib if size > 1 else 0)
        if VRAM in case.capacity.mib and need.split_mib + size * extra > case.room(VRAM):
            continue
        sets = combinations(allowed, size)
        result += [s for s in sets if divisible(need.split_mib, [case.room(kind) - extra for kind in s])]
    return result


def fixed_has_room(case: Case) -> bool:
    mib = case.need.fixed.mib
    return all(not mib.get(k, 0) or mib[k] <= case.room(k) for k in (RAM, "instances") if k in case.capacity.mib)


def free_choice(case: Case) -> bool:
    """Whether the GPUs are chosen, not prescribed or pooled."""
    return bool(gpu_kinds(case.capacity)) and case.need.gpu_mib > 0 and not case.need.all_gpus


def it_fits_beside_every_view(placer: Placer, case: Case) -> None:
    placed = placer.place(case.need, case.capacity, *case.views)
    for kind, limit in case.capacity.mib.items():
        for view in (*case.views, Resources()):
            mib = placed.mib.get(kind, 0) if placed else 0
            assert not mib or view.mib.get(kind, 0) + mib <= limit


def it_is_placed_on_the_fewest_gpus_if_at_all(placer: Placer, case: Case) -> None:
    if free_choice(case):
        sets = possible(case) if fixed_has_room(case) else []
        placed = placer.place(case.need, case.capacity, *case.views)
        assert (placed is not None) == bool(sets)
        assert placed is None or len(gpu_kinds(placed)) == len(sets[0])


def it_leaves_the_least_room_over(placer: Placer, case: Case) -> None:
    placed = placer.place(case.need, case.capacity, *case.views)
    if placed is not None and free_choice(case):
        chosen = gpu_kinds(placed)
        others = [s for s in possible(case) if len(s) == len(chosen)]
        assert tuple(chosen) in others
        assert sum(map(case.room, chosen)) == min(sum(map(case.room, s)) for s in others)


def more_room_never_loses_a_placement(placer: Placer, case: Case) -> None:
    """The scheduler relies on it: else a victim could make things worse."""
    before = placer.place(case.need, case.capacity, *case.views)
    larger = Resources({kind: limit + 3 for kind, limit in case.capacity.mib.items()})
    fewer = tuple(Resources({kind: mib * 2 // 3 for kind, mib in view.mib.items()}) for view in case.views)
    one_larger = [Resources({**case.capacity.mib, kind: mib + 2}) for kind, mib in case.capacity.mib.items()]
    for capacity in (larger, *one_larger):
        for views in (case.views, fewer, case.views[1:]):
            after = placer.place(case.need, capacity, *views)
            assert before is None or after is not None
            assert not (before and after) or len(gpu_kinds(after)) <= len(gpu_kinds(before))


def the_shares_add_up(placer: Placer, case: Case) -> None:
    need, placed = case.need, placer.place(case.need, case.capacity, *case.views)
    if placed is None:
        return
    chosen = gpu_kinds(placed)
    extra = need.each_mib + (need.grain_mib if len(chosen) > 1 else 0)
    assert placed.mib.get(VRAM, 0) == ((need.split_mib + extra * max(1, len(chosen))) if need.gpu_mib else 0)
    assert not chosen or sum(placed.mib[kind] for kind in chosen) == placed.mib[VRAM]
    assert all(placed.mib[kind] >= extra for kind in chosen)
    assert all(placed.mib.get(kind, 0) == mib for kind, mib in need.fixed.mib.items())
    if chosen and not need.proportions:  # by the room on each, to the MiB
        room = {kind: max(0, case.room(kind) - extra) for kind in chosen}
        for kind in chosen if (whole := sum(room.values())) else []:
            assert abs(placed.mib[kind] - extra - need.split_mib * room[kind] / whole) <= 1.0


def again_is_the_same_in_the_same_place(placer: Placer, case: Case) -> None:
    placed = placer.place(case.need, case.capacity, *case.views)
    if placed is not None:
        assert placer.again(case.need, placed) == placed
        grown = placer.again(replace(case.need, split_mib=2 * case.need.split_mib), placed)
        assert gpu_kinds(grown) == gpu_kinds(placed)
        assert grown.mib.get(VRAM, 0) == placed.mib.get(VRAM, 0) + case.need.split_mib


def the_devices_are_honoured(placer: Placer, case: Case) -> None:
    need, placed = case.need, placer.place(case.need, case.capacity, *case.views)
    if placed is None or not gpu_kinds(placed):
        return
    chosen = gpu_kinds(placed)
    assert need.gpus is None or set(chosen) <= set(need.gpus)
    assert not need.all_gpus or set(chosen) == set(need.gpus or gpu_kinds(case.capacity))
    assert not need.single or len(chosen) == 1
    if need.proportions:
        extra = need.each_mib + (need.grain_mib if len(chosen) > 1 else 0)
        for kind, part in zip(need.gpus or (), need.proportions, strict=True):
            assert abs(placed.mib[kind] - extra - need.split_mib * part / sum(need.proportions)) <= 1.0


def without_gpu_kinds_it_is_one_pool(placer: Placer, case: Case) -> None:
    need = case.need
    pool = Resources({k: mib for k, mib in case.capacity.mib.items() if not k.startswith("gpu")})
    placed = placer.place(need, pool, *case.views)
    expected = need.fixed + Resources({VRAM: need.gpu_mib} if need.gpu_mib else {})
    room = not need.gpu_mib or VRAM not in pool.mib or need.gpu_mib <= case.room(VRAM)
    assert placed == (expected if room and fixed_has_room(case) else None)


def a_share_is_a_whole_number_within_its_weight(placer: Placer, case: Case) -> None:
    weights = [max(0, case.room(kind)) for kind in gpu_kinds(case.capacity)] or [0]
    for total in (case.need.split_mib, sum(weights), sum(weights) // 2, 7):
        shares = placer.shares(total, weights)
        assert sum(shares) == total
        assert all(share >= 0 for share in shares)
        assert sum(weights) < total or all(s <= w for s, w in zip(shares, weights, strict=True))


RULES: tuple[Rule, ...] = (
    it_fits_beside_every_view,
    it_is_placed_on_the_fewest_gpus_if_at_all,
    it_leaves_the_least_room_over,
    more_room_never_loses_a_placement,
    the_shares_add_up,
    again_is_the_same_in_the_same_place,
    the_devices_are_honoured,
    without_gpu_kinds_it_is_one_pool,
    a_share_is_a_whole_number_within_its_weight,
)
