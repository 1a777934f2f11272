"""What Linux says about a process and about this machine. Reads only."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def children(pid: int) -> list[int]:
    """Direct children of *pid*."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def reserve_core() -> int | None:
    """Keep this process, and what it starts from now on, off one core, and return that; ``None`` if it is the only."""
    *others, reserved = sorted(os.sched_getaffinity(0))
    if not others:
        return None
    os.sched_setaffinity(0, others)
    return reserved


def pin(pid: int, core: int) -> None:
    """Let every thread of *pid* run on *core* only. Threads and children that it starts later inherit this."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {core})


def pss_kib(pids: Iterable[int]) -> int:
    """Proportional set size: private pages, plus each shared page divided by the processes that share it."""
    total = 0
    for pid in pids:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        total += int(found[1]) if found else 0
    return total


def environment(nginx_version: str | None) -> dict[str, Any]:
    """The machine and the versions that the figures belong to."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        "uvloop": _package_version("uvloop"),
        "httptools": _package_version("httptools"),
        "nginx": nginx_version,
        "commit": _commit(),
        "load_average_at_start": os.getloadavg()[0],
    }


def _package_version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False)
    return result.stdout.strip() or None
