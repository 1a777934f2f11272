"""A machine with GPUs for tests: a scripted NVIDIA driver and a real llama-server that seems to use it.

The embedded engine, which a node knows to use no GPU, runs behind a script that is configured as ``binary_path``. The
script writes down how it was started, and fails to start where a profile's ``env`` says so. What a server "uses" of a
GPU is told by the driver, from its profile's ``env`` (see ``tests.fake_nvml.build``).
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh.engine import embedded
from tests.e2e.harness import TINY_ARGS, Node, profile
from tests.fake_nvml.build import FakeDriver, GpuSpec

#: What llama.cpp says when a GPU is full, b11549's sources.
OUT_OF_MEMORY = (
    "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 7000.00 MiB on device 0: cudaMalloc failed: out of memory",
    "alloc_tensor_range: failed to allocate CUDA0 buffer of size 7340032000",
    "llama_model_load: error loading model: unable to allocate CUDA0 buffer",
)

_SCRIPT = """#!/bin/sh
case "$*" in
*--version* | *--help*) ;;
*)
    env > '{directory}'/$$.env
    printf '%s\\n' "$@" > '{directory}'/$$.args
    # FAKE_OOM: how often this profile finds its GPU full
    if [ -n "$FAKE_OOM" ] && [ "$(ls -d '{directory}/'"$FAKE_NAME".oom.* 2>/dev/null | wc -l)" -lt "$FAKE_OOM" ]; then
        mkdir '{directory}/'"$FAKE_NAME".oom.$$
        printf '%s\\n' {out_of_memory} >&2
        exit 1
    fi ;;
esac
exec '{python}' -I -S '{engine}' "$@"
"""


class Machine:
    """GPUs, and a llama-server for them. ``node`` starts nodes on it."""

    def __init__(self, directory: Path, *gpus_mib: int, library: Path | None = None) -> None:
        mark = secrets.token_hex(4)  # servers of another test's node must not appear here
        self.uuids = [f"GPU-{mark}-0000-0000-0000-{place:012d}" for place in range(len(gpus_mib))]
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        specs = [GpuSpec(mib, uuid=uuid) for mib, uuid in zip(gpus_mib, self.uuids, strict=True)]
        self.driver = FakeDriver(directory, *specs, library=library)
        self.engine = directory / "llama-server"
        self._starts = directory / "starts"
        self._starts.mkdir(exist_ok=True)
        said = " ".join(f"'{line}'" for line in OUT_OF_MEMORY)
        words = {"directory": self._starts, "out_of_memory": said, "python": sys.executable}
        self.engine.write_text(_SCRIPT.format(**words, engine=embedded.__file__))
        self.engine.chmod(0o755)

    def node(self, cookbook_text: str, config: Mapping[str, Any] | None = None) -> Node:
        """Return a node that is not started yet; a second one on the same machine has the first one's state."""
        engine = {"llama_cpp": {"binary_path": str(self.engine)}}
        return Node(self.directory / "node", cookbook_text, {**engine, **(config or {})}, env=self.driver.env)

    def was_told(self, pid: int, variable: str) -> str | None:
        """Return a variable of the environment in which the server *pid* was started."""
        lines = (self._starts / f"{pid}.env").read_text().splitlines()
        return next((line.partition("=")[2] for line in lines if line.startswith(f"{variable}=")), None)

    def argument(self, pid: int, flag: str) -> str | None:
        """Return what follows *flag* in the arguments of the server *pid*."""
        words = (self._starts / f"{pid}.args").read_text().splitlines()
        return words[words.index(flag) + 1] if flag in words else None

    def starts(self) -> int:
        """Return how many servers were started, failed ones included."""
        return len(list(self._starts.glob("*.args")))


def gpu_profile(
    model: Path, mib: int, *, args: str = TINY_ARGS, uses_mib: int | None = None, out_of_memory: int = 0, **keys: Any
) -> dict[str, Any]:
    """Return a profile whose cookbook says that it needs *mib* of GPU memory, and that uses so much, or *uses_mib*.

    The first *out_of_memory* of its starts fail.
    """
    told = {"FAKE_GPU_MIB": str(mib if uses_mib is None else uses_mib), "FAKE_NAME": secrets.token_hex(4)}
    told |= {"FAKE_OOM": str(out_of_memory)} if out_of_memory else {}
    return profile(model, args, env=told, estimated_vram_mb=mib, **keys)
