"""Memory as a vector: MiB of RAM and MiB of each GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

#: The budget's name for main memory; GPUs are "vram" (the sum of all) or "gpu0", "gpu1", ... (one device).
RAM = "ram"
VRAM = "vram"


@dataclass(frozen=True, slots=True)
class Resources:
    """MiB per kind of memory. A kind that is absent is 0 in a demand; in a capacity it means "not limited"."""

    mib: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, *, ram_mib: int = 0, vram_mib: int = 0) -> Resources:
        """Return the vector for main memory and the sum of all GPU memory."""
        return cls(MappingProxyType({k: v for k, v in ((RAM, ram_mib), (VRAM, vram_mib)) if v}))

    def __add__(self, other: Resources) -> Resources:
        keys = {**self.mib, **other.mib}
        return Resources(MappingProxyType({k: self.mib.get(k, 0) + other.mib.get(k, 0) for k in keys}))

    def __sub__(self, other: Resources) -> Resources:
        keys = {**self.mib, **other.mib}
        return Resources(MappingProxyType({k: self.mib.get(k, 0) - other.mib.get(k, 0) for k in keys}))

    def fits(self, capacity: Resources, used: Resources) -> bool:
        """Whether *used* plus this demand stays within *capacity* in every kind that *capacity* limits."""
        return all(
            used.mib.get(kind, 0) + self.mib.get(kind, 0) <= limit or self.mib.get(kind, 0) == 0
            for kind, limit in capacity.mib.items()
        )

    def describe(self) -> str:
        """Return e.g. ``"ram 2048 MiB, vram 512 MiB"``, or ``"nothing"``."""
        return ", ".join(f"{kind} {mib} MiB" for kind, mib in sorted(self.mib.items()) if mib) or "nothing"


def total(parts: Iterable[Resources]) -> Resources:
    """Return the sum of *parts*."""
    result = Resources()
    for part in parts:
        result = result + part
    return result
