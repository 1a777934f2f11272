"""The program that ties a child to its parent; what it is for is tested in test_warden.py and test_process.py."""

from __future__ import annotations

import os
import subprocess
import sys

from mesh.host import leash


def start(parent_pid: int, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", "-E", leash.__file__, str(parent_pid), *argv]
    return subprocess.run(command, capture_output=True, text=True)


def test_it_becomes_the_program() -> None:
    done = start(os.getpid(), "sh", "-c", "echo $PPID; exit 5")
    assert (done.stdout, done.returncode) == (f"{os.getpid()}\n", 5)


def test_a_parent_that_died_meanwhile_starts_nothing() -> None:
    """trap 13: the parent-death signal only tells of deaths after it was asked for."""
    done = start(os.getpid() + 1, "echo", "started")
    assert (done.stdout, done.returncode) == ("", leash.CANNOT_EXECUTE)
