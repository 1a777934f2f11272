"""What a process tree uses, by /proc and by the driver's list."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from mesh.core.devices import Devices, Gpu
from mesh.engine import usage
from mesh.engine.usage import Usage
from mesh.host import nvml

GPU = Gpu(kind="gpu0", uuid="GPU-0", name="Fake", total_mib=1000, used_mib=0, processes={})
OTHER = replace(GPU, kind="gpu1", uuid="GPU-1", index=1)


@pytest.fixture
def family() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process and the pid of its child; both end with the process's stdin."""
    inner = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-I', '-S', '-c', {inner!r}])"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-I", "-c", outer], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.communicate()


def test_an_instance_uses_what_its_whole_tree_uses(family: tuple[subprocess.Popen[bytes], int]) -> None:
    process, grandchild = family
    gpu = replace(GPU, processes={process.pid: 100, grandchild: 20, os.getpid(): 7})
    devices = Devices("nvml", (gpu, OTHER), 1, 1)
    found = usage.read_usage({"m-1": process.pid, "gone": 2**22 + 1}, devices)
    assert found["m-1"].gpu_mib == {"gpu0": 120}
    assert 4 < found["m-1"].ram_mib < 100
    assert 0 < found["m-1"].anon_mib <= found["m-1"].ram_mib
    assert set(found) == {"m-1"}


def use(*gpus: Gpu) -> Usage:
    used = usage.of_tree((os.getpid(),), Devices("nvml", gpus, 1, 1))
    assert used is not None
    return used


def test_what_the_driver_does_not_say_is_unknown_not_zero() -> None:
    """trap 44"""
    pid = os.getpid()
    assert use(GPU).gpu_mib == {}
    assert use().gpu_mib == {}
    assert use(replace(GPU, processes={pid: 5}), replace(OTHER, processes={pid: None})).gpu_mib is None
    assert use(replace(GPU, processes={pid: 5}), replace(OTHER, processes=None)).gpu_mib is None
    assert use(replace(GPU, processes={pid: 5}), replace(OTHER, processes={1: None})).gpu_mib == {"gpu0": 5}


def test_a_tree_that_holds_a_gpu_and_is_not_listed_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the driver may list host pids, or none."""
    monkeypatch.setattr(nvml, "opened_by", lambda pids: True)
    assert use(GPU).gpu_mib is None
    assert use(replace(GPU, processes={os.getpid(): 5}), OTHER).gpu_mib == {"gpu0": 5}


def test_on_a_unified_machine_gpu_memory_is_main_memory() -> None:
    """trap 48"""
    shared = replace(GPU, unified=True, total_mib=0)
    alone = use(replace(shared, processes=None))
    more = use(replace(shared, processes={os.getpid(): 5000}))
    assert alone.gpu_mib == more.gpu_mib == {}
    assert abs(more.ram_mib - alone.ram_mib - 5000) <= 2
    assert abs(more.anon_mib - alone.anon_mib - 5000) <= 2


def test_a_tree_that_is_gone_uses_nothing() -> None:
    assert usage.of_tree((2**22 + 1,), Devices("none", (), 1, 1)) is None
