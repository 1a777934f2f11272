"""A disk that is soon full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, mib: int) -> Iterator[Path]:
    """Mount a disk of *mib* MiB at *path*, which is made; skip the test where that is not allowed (it takes root)."""
    path.mkdir(parents=True, exist_ok=True)
    options = ("-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(path))
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)  # lazy: what a test left running may be in there
