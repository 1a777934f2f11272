"""Waiting for the end of processes that are not our children."""

from __future__ import annotations

import os
import select


def wait_for_death(pid: int, timeout_s: float = 5.0) -> None:
    """Return when *pid* is dead: gone, or a zombie that only its parent has to reap (trap 27)."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        readable, _, _ = select.select([pidfd], [], [], timeout_s)
        assert readable, f"process {pid} is still alive after {timeout_s} s"
    finally:
        os.close(pidfd)
