"""How much main memory there is, and what a process tree uses of it.

A container's memory limit counts like the machine's size. Reading /proc of a large tree takes milliseconds, so the
functions that the event loop may call are the ``async`` ones; they read in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 1024 * 1024
_PROC = Path("/proc")
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


@dataclass(frozen=True, slots=True)
class Resident:
    """Main memory that processes have."""

    total_mib: int
    held_mib: int  #: of it, what the kernel cannot drop: without the pages of files, as mapped weights are


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
            pss += (_pss(process.pid) or (0,))[0] if with_pss else 0
    if not count:
        return None
    return TreeUsage(count, rss // MIB, pss // MIB if pss else None, cpu_s, io_bytes)


async def sample_tree_async(pid: int, *, with_pss: bool = False) -> TreeUsage | None:
    """Return ``sample_tree`` of *pid*, read in a thread."""
    return await asyncio.to_thread(sample_tree, pid, with_pss=with_pss)


def tree_pids(roots: Collection[int]) -> Mapping[int, tuple[int, ...]]:
    """Return each of *roots* that runs, with the pids of it and its descendants; one look at the process table for all.

    A zombie has no memory and is left out (trap 27). Blocks: some 10 ms for each 1000 processes of the machine.
    """
    children: dict[int, list[int]] = {}
    alive: set[int] = set()
    for pid, parent, is_zombie in _process_table() if roots else ():
        children.setdefault(parent, []).append(pid)
        if not is_zombie:
            alive.add(pid)
    return {root: tuple(pid for pid in _descend(root, children) if pid in alive) for root in roots if root in alive}


def resident(pids: Iterable[int]) -> Resident | None:
    """Return the main memory that *pids* hold together; None if none of them is there any more. Blocks.

    Proportional (PSS), so that the pages of a model file that two processes map are not counted twice (trap 45); a
    process that does not let us read that (not ours, or not Linux) counts with its whole resident set. For PSS the
    kernel walks the process's page tables: 3 to 5 ms for each resident GiB, measured.
    """
    sizes = [size for pid in pids if (size := _pss(pid) or _rss(pid)) is not None]
    return Resident(sum(size for size, _ in sizes) // MIB, sum(held for _, held in sizes) // MIB) if sizes else None


def _process_table() -> Iterator[tuple[int, int, bool]]:
    """Yield pid, parent's pid and whether it is a zombie. On Linux without psutil, which takes five times as long."""
    if not (_PROC / "self/stat").exists():
        for process in psutil.process_iter(["ppid", "status"]):
            yield process.pid, process.info["ppid"] or 0, process.info["status"] == psutil.STATUS_ZOMBIE
        return
    for name in filter(str.isdigit, os.listdir(_PROC)):
        with contextlib.suppress(OSError, ValueError), (_PROC / name / "stat").open("rb", buffering=0) as file:
            stat = file.read(1024)  # "PID (NAME) STATE PARENT ..."; the name may hold anything
            state, parent = stat[stat.rindex(b")") + 2 :].split(b" ", 2)[:2]
            yield int(name), int(parent), state in (b"Z", b"X")


def _descend(root: int, children: Mapping[int, list[int]]) -> Iterator[int]:
    """Yield *root* and its descendants; ends also on a table that was read while pids were reused."""
    seen, waiting = {root}, [root]
    while waiting:
        yield (pid := waiting.pop())
        new = [child for child in children.get(pid, ()) if child not in seen]
        seen.update(new)
        waiting += new


def _io_bytes(process: psutil.Process) -> int:
    if not hasattr(process, "io_counters"):  # macOS
        return 0
    io = process.io_counters()
    # the *_chars count read() and write() calls, page cache included; the *_bytes count the disk, page faults included
    return int(getattr(io, "read_chars", 0) + getattr(io, "write_chars", 0) + io.read_bytes + io.write_bytes)


def _pss(pid: int) -> tuple[int, int] | None:
    """Return the proportional set size and what of it cannot be dropped, in bytes; None where there is none to read."""
    with contextlib.suppress(OSError, ValueError):
        lines = (line.split() for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:])
        sizes = {words[0]: int(words[1]) * 1024 for words in lines}
        if (total := sizes.get("Pss:")) is not None:
            # locked pages (--mlock) are the file's and stay; or they are counted twice here, and the total is the bound
            held = sum(sizes.get(name, 0) for name in ("Pss_Anon:", "Pss_Shmem:", "Locked:"))
            return total, min(total, held if "Pss_Anon:" in sizes else total)
    return None


def _rss(pid: int) -> tuple[int, int] | None:
    with contextlib.suppress(psutil.Error, OSError):
        info = psutil.Process(pid).memory_info()
        return info.rss, max(0, info.rss - getattr(info, "shared", 0))
    return None


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, used) in bytes of each memory cgroup around this process that has a limit; v2 and v1."""
    for directory, limit_file, used_file, prefix in _memory_cgroups():
        with contextlib.suppress(OSError, ValueError):
            limit = int((directory / limit_file).read_text())  # "max" is a ValueError: no limit
            used = int((directory / used_file).read_text())
            stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
            # the page cache (mmapped weights!) counts as used, but gives way; as MemAvailable of the machine has it
            cache = sum(int(stat.get(f"{prefix}{age}_file", 0)) for age in ("inactive", "active"))
            yield limit, max(0, used - cache)


def _memory_cgroups() -> Iterator[tuple[Path, str, str, str]]:
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUP_ROOT, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root = _CGROUP_ROOT / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        inner = root / path.lstrip("/")
        for directory in (inner, *inner.parents):
            if directory.is_relative_to(root):
                yield (directory, *names)
