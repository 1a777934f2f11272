"""Telemetry and footprints that a test sets by hand, for a supervisor on its own clock."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mesh.config.profile import Profile
from mesh.core.devices import Devices, Gpu
from mesh.core.footprint import Footprint
from mesh.engine.ledger import CookbookFigures
from mesh.engine.telemetry import Sample, Usage
from tests.engine.supervised import World


@dataclass
class Figures(CookbookFigures):
    """Footprints that the test sets; what is not set is what the cookbook says."""

    known: dict[str, Footprint | None] = field(default_factory=dict)
    learned: list[tuple[str, int, dict[str, int] | None, bool]] = field(default_factory=list)

    def of(self, profile: Profile) -> Footprint | None:
        return self.known[profile.key] if profile.key in self.known else super().of(profile)

    peek = of
    stale: set[str] = field(default_factory=set)

    def fresh(self, profile: Profile) -> bool:
        return profile.key not in self.stale

    async def look(self, profiles: Iterable[Profile]) -> None:
        return None

    def learn(
        self,
        profile: Profile,
        usage_ram_mib: int,
        gpu_mib: Mapping[str, int] | None,
        *,
        first: bool,
        identity: str | None = None,
    ) -> None:
        self.learned.append((profile.key, usage_ram_mib, None if gpu_mib is None else dict(gpu_mib), first))


class Hurried:
    """Telemetry that only notes what it is asked."""

    def __init__(self) -> None:
        self.hurried = 0
        self.busy = False

    def hurry(self) -> None:
        self.hurried += 1

    def set_busy(self, busy: bool, /) -> None:
        self.busy = busy


def gpu(number: int, total_mib: int, used_mib: int = 0, *listed_mib: int) -> Gpu:
    """*listed_mib*: what the driver says of single processes; the rest is used by nobody that it lists."""
    processes = dict(enumerate(listed_mib, start=100))
    return Gpu(f"gpu{number}", f"GPU-{number}", "Test", total_mib, used_mib, processes, index=number)


def machine(*gpus: Gpu) -> Devices:
    return Devices("nvml", gpus, 64_000, 64_000)


def sample(w: World, devices: Devices, **usage: Usage) -> None:
    w.sup.sampled(Sample(asyncio.get_running_loop().time(), devices, usage))


def old_figures(w: World, devices: Devices) -> None:
    """A sample in which no GPU could be read: the last good figures stand for them."""
    stale = frozenset(g.kind for g in devices.gpus)
    w.sup.sampled(Sample(asyncio.get_running_loop().time(), devices, {}, stale))


def on_one_gpu(*profiles: Profile, gpu_mib: int = 10, figures: Figures | None = None) -> World:
    w = World(*profiles, vram=None, devices=machine(gpu(0, gpu_mib)), footprints=figures)
    w.sup.telemetry = Hurried()
    sample(w, machine(gpu(0, gpu_mib)))
    return w


def used(w: World) -> Mapping[str, int]:
    return w.sup.budget().used.mib
