"""The memory of the machine as a sample of it saw it. Values only; ``mesh.host.devices`` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one MIG instance of one."""

    kind: str  #: its name in budgets: "gpu0", "gpu1", ...; stable while the machine runs
    uuid: str  #: what CUDA_VISIBLE_DEVICES (or the vendor's variable) takes
    name: str
    total_mib: int
    used_mib: int  #: by anybody
    processes: Mapping[int, int | None] | None = None  #: pid -> MiB, None = the driver does not say; None = no list
    vendor: Literal["nvidia", "amd"] = "nvidia"
    index: int = 0  #: the number that nvidia-smi or rocm-smi shows
    combinable: bool = True  #: False: one process can use this one only (MIG)
    unified: bool = False  #: it has no memory of its own, it uses the machine's


@dataclass(frozen=True, slots=True)
class Devices:
    kind: Literal["nvml", "amd", "none"] = "none"
    gpus: tuple[Gpu, ...] = ()
    ram_total_mib: int = 0  #: the machine's, or its container's limit
    ram_available_mib: int = 0  #: what could be allocated now without swapping
    problems: tuple[str, ...] = field(default=())  #: what could not be read, for the log

    @property
    def budgeted(self) -> tuple[Gpu, ...]:
        """The GPUs that have memory of their own."""
        return tuple(gpu for gpu in self.gpus if not gpu.unified)
