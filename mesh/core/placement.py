"""On which GPUs an instance goes: the fewest that have room, and of those the ones that leave the least room over.

A ``Need`` says what an instance takes before that is known; ``place`` turns it into a vector of MiB per kind. Splitting
a model costs speed, so one GPU is preferred to several; best fit keeps the large gaps for large models. Among several
GPUs the divisible part is shared out in proportion to the room on each, which is also what the child is told
(``--tensor-split``), so that what is charged is what is used.

Room is monotone: whatever can be placed can also be placed when more is free. The scheduler relies on that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from types import MappingProxyType

from mesh.core.resources import RAM, VRAM, Resources

#: Up to this many GPUs every combination is weighed; beyond, the roomiest are taken.
_WEIGHED = 10
_GPU = re.compile(r"gpu(\d+)")


@dataclass(frozen=True, slots=True)
class Need:
    """What one instance takes."""

    fixed: Resources = field(default_factory=Resources)  #: wherever it runs: RAM
    split_mib: int = 0  #: of GPU memory: divided among its GPUs (weights, KV cache)
    each_mib: int = 0  #: of GPU memory: on every GPU that it uses (compute buffer, driver context)
    grain_mib: int = 0  #: how far a share may be off on each of several GPUs: whole layers are moved
    gpus: tuple[str, ...] | None = None  #: that it may use; None = any
    all_gpus: bool = False  #: it uses all of ``gpus``, however little it needs
    proportions: tuple[float, ...] = ()  #: with ``all_gpus``: how it is divided; empty = by room
    single: bool = False  #: it cannot be divided

    @property
    def gpu_mib(self) -> int:
        """MiB of GPU memory on one GPU; 0 = it needs no GPU."""
        return self.split_mib + self.each_mib

    def __add__(self, more: Resources) -> Need:
        return replace(self, fixed=self.fixed + more)


def gpu_kinds(amounts: Resources) -> list[str]:
    """Return the single GPUs among the kinds of *amounts*, by number."""
    return sorted((kind for kind in amounts.mib if _GPU.fullmatch(kind)), key=_number)


def place(need: Need, capacity: Resources, *used: Resources) -> Resources | None:
    """Return what *need* takes where, such that it fits beside each of *used* within *capacity*; None if it cannot.

    The GPUs are the ``gpuN`` kinds of *capacity*. Without any, GPU memory is one pool, ``vram``, limited or not.
    """
    taken = highest(used)
    placed = _on_gpus(need, capacity, taken) if need.gpu_mib else need.fixed
    return placed if placed is not None and placed.fits(capacity, taken) else None


def again(need: Need, placed: Resources) -> Resources:
    """Return what *need* takes on the GPUs on which *placed* is already, divided as it is there."""
    kinds = gpu_kinds(placed)
    if not need.gpu_mib or not kinds:
        return _pooled(need)
    return _charged(need, kinds, [max(0, placed.mib[kind] - _extra(need, len(kinds))) for kind in kinds])


def at_least(need: Need, placed: Resources) -> Need:
    """Return *need*, enlarged where *placed*, what an instance has, is more."""
    ram = max(need.fixed.mib.get(RAM, 0), placed.mib.get(RAM, 0))
    gpus = max(1, len([kind for kind in gpu_kinds(placed) if placed.mib[kind]]))
    split = placed.mib.get(VRAM, 0) - gpus * _extra(need, gpus)
    fixed = Resources(MappingProxyType({**need.fixed.mib, RAM: ram})) if ram else need.fixed
    return replace(need, fixed=fixed, split_mib=max(need.split_mib, split))


def highest(parts: Iterable[Resources]) -> Resources:
    """Return the largest amount of each kind among *parts*."""
    result: dict[str, int] = {}
    for part in parts:
        for kind, mib in part.mib.items():
            result[kind] = max(result.get(kind, mib), mib)
    return Resources(MappingProxyType(result))


def _on_gpus(need: Need, capacity: Resources, taken: Resources) -> Resources | None:
    kinds = gpu_kinds(capacity)
    if not kinds:
        return _pooled(need)
    allowed = kinds if need.gpus is None else [kind for kind in dict.fromkeys(need.gpus) if kind in capacity.mib]
    room = {kind: capacity.mib[kind] - taken.mib.get(kind, 0) for kind in allowed}
    if need.all_gpus:
        chosen: Sequence[str] | None = None if need.gpus is not None and len(allowed) < len(set(need.gpus)) else allowed
    else:
        chosen = _fewest(need, room)
    if not chosen:
        return None
    extra = _extra(need, len(chosen))
    by_room = [max(0, room[kind] - extra) for kind in chosen]
    return _charged(need, chosen, need.proportions if len(need.proportions) == len(chosen) else by_room)


def _fewest(need: Need, room: Mapping[str, int]) -> Sequence[str] | None:
    """Return the smallest set of GPUs that has room; of those of one size, the one with the least room."""
    for size in range(1, (1 if need.single else len(room)) + 1):
        spare = {kind: mib - _extra(need, size) for kind, mib in room.items()}
        usable = sorted((kind for kind in spare if spare[kind] > 0 or not need.split_mib), key=_number)
        roomiest = sorted(usable, key=lambda kind: (-spare[kind], _number(kind)))[:size]
        if len(roomiest) < size or min(spare[k] for k in roomiest) < 0 or _sum(spare, roomiest) < need.split_mib:
            continue
        if len(usable) > _WEIGHED:
            return sorted(roomiest, key=_number)
        fitting = (s for s in combinations(usable, size) if min(spare[k] for k in s) >= 0)
        return min((s for s in fitting if _sum(spare, s) >= need.split_mib), key=lambda s: (_sum(spare, s), s))
    return None


def _charged(need: Need, kinds: Sequence[str], weights: Sequence[float]) -> Resources:
    extra = _extra(need, len(kinds))
    amounts = {kind: share + extra for kind, share in zip(kinds, shares(need.split_mib, weights), strict=True)}
    return need.fixed + Resources({**amounts, VRAM: sum(amounts.values())})


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Return *total* divided in proportion to *weights*, in whole numbers that add up to it.

    If the weights are whole numbers that add up to at least *total*, no share exceeds its weight.
    """
    whole = sum(weights)
    if not 0 < whole < math.inf or min(weights) < 0:
        weights, whole = [1.0] * len(weights), float(len(weights))
    result = [int(total * (weight / whole)) for weight in weights]
    left = total - sum(result)
    for i in sorted(range(len(weights)), key=lambda i: (result[i] - weights[i], i))[:left]:
        result[i] += 1
    return result


def _extra(need: Need, gpus: int) -> int:
    return need.each_mib + (need.grain_mib if gpus > 1 else 0)


def _pooled(need: Need) -> Resources:
    return need.fixed + Resources({VRAM: need.gpu_mib}) if need.gpu_mib else need.fixed


def _sum(amounts: Mapping[str, int], kinds: Iterable[str]) -> int:
    return sum(amounts[kind] for kind in kinds)


def _number(kind: str) -> int:
    match = _GPU.fullmatch(kind)
    return int(match[1]) if match else -1
