"""NVIDIA GPUs through NVML: how much memory each has, how much of it is taken, and by which process.

Owns the connection to the driver: opened with the first read, opened again after the driver or a GPU failed. Never
decides anything and never logs; what could not be read is returned as text. Every call blocks, and may block for
seconds or for ever when a GPU is ill, so only a thread that nobody waits for may call (``mesh.engine.telemetry``).

Memory that the driver reserves for itself is no part of a GPU's total here, so a total is a little less than
nvidia-smi's, and total - used is what a process can really allocate.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from mesh.core.devices import Gpu

MIB: Final = 1024 * 1024
#: opening NVML can take seconds, so an ill GPU does not make us do it with every read
REOPEN_EVERY_S: Final = 30.0
#: GPUs without memory of their own, by name: Grace-Blackwell desktops and the Jetson family
_INTEGRATED: Final = re.compile(r"\b(GB10|Orin|Thor|Xavier|Tegra|nvgpu)\b", re.IGNORECASE)
#: a coherent GPU whose memory is this much of the machine's is the machine's; GH200's own memory is a sixth of it
_WHOLE_RAM_SHARE: Final = 0.9
_GPU_FILES: Final = re.compile(r"/dev/(nvidia\d+|dxg)$")


class NvmlError(Exception):
    """The driver could not be asked at all."""


class NoNvmlError(NvmlError):
    """There is no NVIDIA driver on this machine."""


@dataclass(frozen=True, slots=True)
class Found:
    """What one read found. ``gpus`` keeps the driver's order; None is in the place of one that could not be read."""

    gpus: tuple[Gpu | None, ...] = ()
    problems: tuple[str, ...] = ()


class Nvml:
    """The connection. ``read`` and ``close`` must not run at the same time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._is_open = False
        self._opened_at = 0.0

    def read(self) -> Found:
        """Return all GPUs, MIG instances in place of GPUs in MIG mode; ``kind`` is left empty.

        Raise ``NvmlError`` if the driver does not answer.
        """
        nvml = _library()
        try:
            self._open(nvml)
            found = _read_all(nvml)
        except nvml.NVMLError as error:
            self.close()
            raise _failure(nvml, error) from error
        if found.problems and self._clock() - self._opened_at >= REOPEN_EVERY_S:
            self.close()  # a GPU that was reset comes back only to a new connection
        return found

    def close(self) -> None:
        """Let go of the driver. Idempotent; the next read opens it again."""
        if self._is_open:
            nvml = _library()
            self._is_open = False
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlShutdown()

    def _open(self, nvml: Any) -> None:
        if not self._is_open:
            nvml.nvmlInit()
            self._is_open, self._opened_at = True, self._clock()


def opened_by(pids: Iterable[int], proc_root: Path = Path("/proc")) -> bool:
    """Whether one of *pids* has an NVIDIA GPU open, as far as we may look."""
    return any(_GPU_FILES.match(target) for pid in pids for target in _open_files(proc_root / str(pid)))


def _open_files(process: Path) -> Iterator[str]:
    with contextlib.suppress(OSError), os.scandir(process / "fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                yield os.readlink(entry.path)


def _library() -> Any:
    import pynvml  # 13 ms, and most commands of the CLI do not need it

    return pynvml


def _failure(nvml: Any, error: Any) -> NvmlError:
    if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return NoNvmlError("no NVIDIA driver (libnvidia-ml.so.1 not found)")
    if error.value == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return NoNvmlError("the NVIDIA driver is not loaded")
    if error.value == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        # the library stays mapped for the life of the process
        return NvmlError("the NVIDIA driver was replaced while its old library is in use; restart the node")
    return NvmlError(f"the NVIDIA driver does not answer: {error}")


def _read_all(nvml: Any) -> Found:
    gpus: list[Gpu | None] = []
    problems: list[str] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            gpus += _read_gpu(nvml, index, problems)
        except nvml.NVMLError as error:
            if error.value == nvml.NVML_ERROR_UNINITIALIZED:
                raise  # that is about the connection, not about this GPU
            gpus.append(None)
            problems.append(f"NVIDIA GPU {index} cannot be read: {error}")
    return Found(tuple(gpus), tuple(problems))


def _read_gpu(nvml: Any, index: int, problems: list[str]) -> list[Gpu | None]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    if _mig_enabled(nvml, handle):
        return _read_mig(nvml, index, handle, problems)
    return [_gpu(nvml, index, handle)]


def _gpu(nvml: Any, index: int, handle: Any, *, part: int | None = None) -> Gpu:
    """Read one GPU, or the MIG instance of GPU instance *part*."""
    name = nvml.nvmlDeviceGetName(handle)
    memory = _memory_bytes(nvml, handle)
    unified = memory is None or (part is None and _is_integrated(nvml, handle, name, memory[0]))
    total, free = (0, 0) if memory is None or unified else memory
    return Gpu(
        kind="",
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=name,
        total_mib=total // MIB,
        used_mib=total // MIB - free // MIB,
        processes=_processes(nvml, handle, part),
        index=index,
        combinable=part is None,
        unified=unified,
    )


# -- MIG


def _mig_enabled(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    except nvml.NVMLError as error:
        if error.value in _unsupported(nvml):
            return False
        raise


def _read_mig(nvml: Any, index: int, parent: Any, problems: list[str]) -> list[Gpu | None]:
    """Return the MIG instances of a GPU, one for each slice of memory."""
    found: list[Gpu | None] = []
    parts: set[int] = set()
    for slot in range(nvml.nvmlDeviceGetMaxMigDeviceCount(parent)):
        try:
            handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, slot)
        except nvml.NVMLError as error:
            if error.value == nvml.NVML_ERROR_NOT_FOUND:  # an empty slot
                continue
            raise
        part = nvml.nvmlDeviceGetGpuInstanceId(handle)
        if part not in parts:  # a second compute instance of the same slice has no memory of its own
            found.append(_gpu(nvml, index, handle, part=part))
            parts.add(part)
    if not found:
        problems.append(f"NVIDIA GPU {index} is in MIG mode and has no MIG instance; it is not used")
    return found


# -- memory


def _memory_bytes(nvml: Any, handle: Any) -> tuple[int, int] | None:
    """Return what programs can have and what of it is free; None if it has no memory of its own."""
    try:
        try:
            info = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
            usable = info.total - info.reserved
        except nvml.NVMLError as error:
            if error.value not in _unsupported(nvml):
                raise
            info = nvml.nvmlDeviceGetMemoryInfo(handle)  # drivers before 510: "used" holds what is reserved
            usable = info.total
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_NOT_SUPPORTED:
            return None
        raise
    return (usable, min(info.free, usable)) if info.total else None


def _is_integrated(nvml: Any, handle: Any, name: str, total_bytes: int) -> bool:
    """Whether the memory it reports is the machine's."""
    if _INTEGRATED.search(name):
        return True
    if total_bytes < _WHOLE_RAM_SHARE * psutil.virtual_memory().total:
        return False
    try:  # a big GPU in a machine with little RAM is not coherent with it
        return bool(nvml.nvmlDeviceGetAddressingMode(handle) == nvml.NVML_DEVICE_ADDRESSING_MODE_ATS)
    except nvml.NVMLError:
        return False


# -- processes


def _processes(nvml: Any, handle: Any, part: int | None) -> Mapping[int, int | None] | None:
    """Return MiB by pid, None for a process whose use the driver does not say; None if it lists no processes."""
    compute = _running(nvml, "Compute", handle)
    if compute is None:
        return None
    others = [entry for kind in ("Graphics", "MPSCompute") for entry in _running(nvml, kind, handle) or ()]
    used: dict[int, int | None] = {}
    for entry in (*compute, *others):
        if part is not None and entry.gpuInstanceId not in (part, nvml.NVML_VALUE_NOT_AVAILABLE_uint.value):
            continue
        mib = None if entry.usedGpuMemory is None else -(-entry.usedGpuMemory // MIB)
        known = used.get(entry.pid)
        # a process that computes and draws is in two lists with the same figure: not a sum
        used[entry.pid] = mib if known is None else max(known, mib or 0)
    return used


def _running(nvml: Any, kind: str, handle: Any) -> list[Any] | None:
    """Return one of the driver's lists of processes, None if it has none."""
    for version in ("v3", "v2"):  # v2 for drivers before 510
        read = getattr(nvml, f"nvmlDeviceGet{kind}RunningProcesses_{version}")
        try:
            return list(_twice(nvml, read, handle))
        except nvml.NVMLError as error:
            if error.value == nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
                continue
            if error.value in _unsupported(nvml):
                return None
            raise
    return None


def _twice(nvml: Any, read: Callable[[Any], list[Any]], handle: Any) -> list[Any]:
    """Call *read*; once more if the list outgrew its buffer meanwhile."""
    try:
        return read(handle)
    except nvml.NVMLError as error:
        if error.value != nvml.NVML_ERROR_INSUFFICIENT_SIZE:
            raise
        return read(handle)


def _unsupported(nvml: Any) -> tuple[int, ...]:
    """Return the errors that mean "not on this GPU or driver, or not for you": asking again would not help."""
    return (
        nvml.NVML_ERROR_NOT_SUPPORTED,
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        nvml.NVML_ERROR_NO_PERMISSION,
    )
