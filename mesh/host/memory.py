"""How much main memory there is, and what a process tree uses of it.

A container's memory limit counts like the machine's size. Reading /proc of a large tree takes milliseconds, so the
functions that the event loop may call are the ``async`` ones; they read in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 1024 * 1024
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class TreeUsage:
    """One sample of a process and its descendants, added up."""

    processes: int
    rss_mib: int  #: resident, pages shared between them counted in each
    pss_mib: int | None  #: resident, shared pages divided by their sharers; None where the system does not say
    cpu_s: float
    io_bytes: int  #: read and written, through files or pipes, page cache or disk


def ram_total_mib() -> int:
    """Return the memory this process may use: the machine's, or its container's limit if that is smaller."""
    total = psutil.virtual_memory().total
    return min([total, *(limit for limit, _ in _cgroup_limits())]) // MIB


def ram_available_mib() -> int:
    """Return what can be allocated now without swapping, within the container's limit."""
    available = psutil.virtual_memory().available
    return max(0, min([available, *(limit - used for limit, used in _cgroup_limits())])) // MIB


def sample_tree(pid: int, *, with_pss: bool = False) -> TreeUsage | None:
    """Return what *pid* and its descendants use; None if it is gone. Blocks; see ``sample_tree_async``."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.Error:
        return None
    count, rss, pss, cpu_s, io_bytes = 0, 0, 0, 0.0, 0
    for process in tree:
        with contextlib.suppress(psutil.Error, OSError), process.oneshot():
            rss += process.memory_info().rss
            times = process.cpu_times()
            cpu_s += times.user + times.system
            count += 1
            io_bytes += _io_bytes(process)
            pss += _pss(process.pid) if with_pss else 0
    if not count:
        return None
    return TreeUsage(count, rss // MIB, pss // MIB if pss else None, cpu_s, io_bytes)


async def sample_tree_async(pid: int, *, with_pss: bool = False) -> TreeUsage | None:
    """Return ``sample_tree`` of *pid*, read in a thread."""
    return await asyncio.to_thread(sample_tree, pid, with_pss=with_pss)


def _io_bytes(process: psutil.Process) -> int:
    if not hasattr(process, "io_counters"):  # macOS
        return 0
    io = process.io_counters()
    # the *_chars count read() and write() calls, page cache included; the *_bytes count the disk, page faults included
    return int(getattr(io, "read_chars", 0) + getattr(io, "write_chars", 0) + io.read_bytes + io.write_bytes)


def _pss(pid: int) -> int:
    """Proportional set size in bytes; 0 where there is none to read."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, used) in bytes of each memory cgroup around this process that has a limit; v2 and v1."""
    for directory, limit_file, used_file, cache_key in _memory_cgroups():
        with contextlib.suppress(OSError, ValueError):
            limit = int((directory / limit_file).read_text())  # "max" is a ValueError: no limit
            used = int((directory / used_file).read_text())
            stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
            # the page cache (mmapped weights!) counts as used, but gives way
            yield limit, max(0, used - int(stat.get(cache_key, 0)))


def _memory_cgroups() -> Iterator[tuple[Path, str, str, str]]:
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUP_ROOT, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _CGROUP_ROOT / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = root / path.lstrip("/")
        for directory in (inner, *inner.parents):
            if directory.is_relative_to(root):
                yield (directory, *names)
