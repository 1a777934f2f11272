"""GPUs for tests: builds the fake ``libnvidia-ml.so.1`` and writes the script that it plays.

    driver = FakeDriver(tmp_path, GpuSpec(24576), GpuSpec(12288, name="NVIDIA RTX 3060"))
    subprocess.Popen([...], env={**os.environ, **driver.env})   # real nvidia-ml-py calls in there see two GPUs
    driver.add("process 0 4711 8000")                           # ... and from now on, a process on the first

``env`` must be there when the process starts: the library is found through ``LD_LIBRARY_PATH``, and the script through
``FAKE_NVML_SCRIPT``. The library reads the script again with each call. Its lines, with DEVICE a UUID or an index:

- ``gpu UUID TOTAL_MIB RESERVED_MIB USED_MIB FLAGS NAME``  used by others than the processes below; FLAGS is ``-`` or
  some of ``mig`` (in MIG mode), ``consumer`` (has no MIG), ``unified`` (no memory of its own), ``ats`` (coherent)
- ``mig PARENT SLOT GPU_INSTANCE UUID TOTAL_MIB USED_MIB FLAGS NAME``
- ``process DEVICE PID MIB|na [compute|graphics|mps]``
- ``consumers LINGER_MS``  every running session leader with ``FAKE_GPU_MIB=n`` in its environment (a profile's ``env``)
  uses n MiB on the GPUs of its ``CUDA_VISIBLE_DEVICES`` (unset: the first), split like its ``--tensor-split``; the
  memory comes back that long after its end
- ``error FUNCTION|* DEVICE-UUID|* CODE|hang``  the call answers so; ``hang`` lasts until the line is gone
- ``init CODE``  nvmlInit fails
- ``shortfall N``  with each new N, one list of processes outgrows its buffer
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_name("nvml.c")
_FLAGS = ("-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden")


def library_dir(tmp: Path) -> Path:
    """Compile the library into a directory of *tmp* and return that; skip the test where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("NO C COMPILER: the NVML tests need cc, gcc or clang")
    directory = tmp / "fake-nvml"
    directory.mkdir(exist_ok=True)
    library = directory / "libnvidia-ml.so.1"
    if not library.exists():
        command = [compiler, *_FLAGS, f"-Wl,-soname,{library.name}", "-o", str(library), str(_SOURCE)]
        subprocess.run(command, check=True, timeout=60)
    return directory


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One GPU of the script."""

    total_mib: int
    used_mib: int = 0
    reserved_mib: int = 0
    name: str = "NVIDIA Fake 24GB"
    uuid: str = ""  #: made of its place if empty
    flags: str = "-"

    def line(self, place: int) -> str:
        """Return its line of the script."""
        uuid = self.uuid or fake_uuid(place)
        return f"gpu {uuid} {self.total_mib} {self.reserved_mib} {self.used_mib} {self.flags} {self.name}"


def fake_uuid(place: int) -> str:
    """Return the UUID of the GPU in that place, if the test gave none."""
    return f"GPU-{place:08x}-0000-0000-0000-000000000000"


class FakeDriver:
    """A script and the library that plays it."""

    def __init__(self, tmp: Path, *gpus: GpuSpec, library: Path | None = None) -> None:
        self.library = library or library_dir(tmp)
        self.script = tmp / "nvml-script"
        self.lines: list[str] = []
        self.write(*(gpu.line(place) for place, gpu in enumerate(gpus)))

    @property
    def env(self) -> Mapping[str, str]:
        """What a process needs in its environment to see these GPUs."""
        path = os.pathsep.join(filter(None, (str(self.library), os.environ.get("LD_LIBRARY_PATH", ""))))
        return {"LD_LIBRARY_PATH": path, "FAKE_NVML_SCRIPT": str(self.script)}

    def write(self, *lines: str) -> None:
        """Replace the script at once, as seen by a reader."""
        self.lines = list(lines)
        new = self.script.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in lines))
        new.replace(self.script)

    def add(self, *lines: str) -> None:
        """Add *lines* to the script."""
        self.write(*self.lines, *lines)

    def remove(self, *lines: str) -> None:
        """Take *lines* out of the script."""
        self.write(*(line for line in self.lines if line not in lines))
