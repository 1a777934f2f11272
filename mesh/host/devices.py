"""The memory of this machine: GPUs of whichever vendor, and main memory. One blocking read gives one ``Devices``.

Owns the names of the GPUs ("gpu0", ...): a name belongs to a UUID from the first sight of it on, so that a GPU that
falls off the bus does not lend its name to the next one. Never logs and never remembers a figure; the last good value
is kept by ``mesh.engine.telemetry``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from mesh.core.devices import Devices, Gpu
from mesh.host import amd, memory
from mesh.host.nvml import NoNvmlError, Nvml, NvmlError


class TelemetryError(Exception):
    """Nothing could be read, not even main memory; what was read before still holds."""


class DeviceReader:
    """Reads the machine's memory. One thread at a time reads; ``close`` may be called from another."""

    def __init__(
        self, *, sys_root: Path = Path("/sys"), nvml: Nvml | None = None, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._sys_root = sys_root
        self._nvml = nvml or Nvml()
        self._environ = environ
        self._has_nvidia = False  #: NVML has shown a GPU: from then on its silence is a failure
        self._numbers: dict[str, int] = {}  #: UUID -> the number in its name
        self._reading = threading.Lock()

    def read(self) -> Devices:
        """Return the machine as it is now; a GPU that could not be read is left out and named in ``problems``.

        Blocks. Raise ``TelemetryError`` if nothing could be read.
        """
        with self._reading:
            kind, gpus, problems = self._read_gpus()
            try:
                total_mib, available_mib = memory.ram_total_mib(), memory.ram_available_mib()
            except (OSError, ValueError) as error:
                raise TelemetryError(f"the machine's memory cannot be read: {error}") from error
            visible = tuple(_visible(self._named(gpus), self._environ))
            return Devices(kind, visible, total_mib, min(total_mib, available_mib), problems)

    def close(self) -> None:
        """Let go of the driver, unless a read hangs in it; then the end of this process does."""
        if self._reading.acquire(timeout=0.1):
            try:
                self._nvml.close()
            finally:
                self._reading.release()

    def _read_gpus(self) -> tuple[Literal["nvml", "amd", "none"], tuple[Gpu | None, ...], tuple[str, ...]]:
        gpus, problems = self._read_nvidia()
        if gpus or self._has_nvidia:
            return "nvml", gpus, problems
        found = amd.read(self._sys_root)  # beside NVIDIA cards an AMD one is the CPU's: not looked at
        if found.gpus:
            return "amd", found.gpus, (*problems, *found.problems)
        return "none", (), problems

    def _read_nvidia(self) -> tuple[tuple[Gpu | None, ...], tuple[str, ...]]:
        try:
            found = self._nvml.read()
        except NvmlError as error:
            quiet = isinstance(error, NoNvmlError) and not self._has_nvidia
            return (), () if quiet else (str(error),)
        if not found.gpus and self._has_nvidia:
            return (), found.problems or ("the NVIDIA driver shows no GPU any more",)
        self._has_nvidia = self._has_nvidia or any(found.gpus)
        return found.gpus, found.problems

    def _named(self, gpus: tuple[Gpu | None, ...]) -> tuple[Gpu, ...]:
        """Give each GPU its name; a new one gets its place in the driver's list, or a free number above."""
        for place, gpu in enumerate(gpus):
            if gpu is not None and gpu.uuid not in self._numbers:
                taken = set(self._numbers.values())
                self._numbers[gpu.uuid] = place if place not in taken else max(taken) + 1
        named = (replace(gpu, kind=f"gpu{self._numbers[gpu.uuid]}") for gpu in gpus if gpu is not None)
        return tuple(sorted(named, key=lambda gpu: self._numbers[gpu.uuid]))


def _visible(gpus: tuple[Gpu, ...], environ: Mapping[str, str]) -> Iterator[Gpu]:
    """Yield the GPUs that the operator left to this node: its own CUDA_VISIBLE_DEVICES holds for its children too.

    A number in it is taken as nvidia-smi's. CUDA counts so with CUDA_DEVICE_ORDER=PCI_BUS_ID, or if all GPUs are alike.
    """
    for gpu in gpus:
        names = ("CUDA_VISIBLE_DEVICES",) if gpu.vendor == "nvidia" else ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
        if all(_allows(environ[name], gpu) for name in names if name in environ):
            yield gpu


def _allows(value: str, gpu: Gpu) -> bool:
    """Whether such a variable lists *gpu*, by number or by the beginning of its UUID. An empty one hides all."""
    entries = [entry.strip() for entry in value.split(",")]
    return any(
        gpu.index == int(entry) if entry.isdecimal() else bool(entry) and gpu.uuid.startswith(entry)
        for entry in entries
    )
