"""Reading memory of the machine, of containers and of process trees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mesh.host import memory
from mesh.host.memory import MIB


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    return tmp_path


def write(directory: Path, **files: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(f"{content}\n")


def test_without_a_container_the_machine_counts(cgroups: Path) -> None:
    write(cgroups, own="0::/user.slice", memory__max="max")
    assert memory.ram_total_mib() == psutil.virtual_memory().total // MIB
    assert 0 < memory.ram_available_mib() <= memory.ram_total_mib()


def test_the_tightest_limit_of_nested_v2_containers_counts_and_page_cache_is_available(cgroups: Path) -> None:
    write(cgroups, own="0::/pod/box")
    cache = f"anon 1\ninactive_file {10 * MIB}"
    write(cgroups / "pod", memory__max=64 * MIB, memory__current=40 * MIB, memory__stat=cache)
    write(cgroups / "pod/box", memory__max="max", memory__current=40 * MIB, memory__stat=cache)
    assert memory.ram_total_mib() == 64
    assert memory.ram_available_mib() == 64 - 30


def test_v1_containers(cgroups: Path) -> None:
    write(cgroups, own="5:cpu,memory:/docker/1\n3:cpuset:/")
    stat = f"total_inactive_file {MIB}"
    files = {"memory__limit_in_bytes": 32 * MIB, "memory__usage_in_bytes": 33 * MIB, "memory__stat": stat}
    write(cgroups / "memory/docker/1", **files)
    assert memory.ram_total_mib() == 32
    assert memory.ram_available_mib() == 0


def test_a_tree_is_added_up() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-I', '-S', '-c', 'import sys; sys.stdin.read()'])"
    with subprocess.Popen([sys.executable, "-I", "-c", code], stdin=subprocess.PIPE) as child:
        usage = None
        while usage is None or usage.processes < 2:
            usage = memory.sample_tree(child.pid, with_pss=True)
        assert usage.rss_mib > 5
        assert usage.pss_mib is None or usage.pss_mib <= usage.rss_mib
        assert usage.io_bytes > 0
        assert child.stdin is not None
        child.stdin.close()
    assert memory.sample_tree(child.pid) is None


def test_a_process_that_is_gone_has_no_usage() -> None:
    with subprocess.Popen(["true"]) as child:
        pass
    assert memory.sample_tree(child.pid) is None
    own = memory.sample_tree(os.getpid())
    assert own is not None
    assert own.pss_mib is None


async def test_the_loop_is_free_while_a_tree_is_read() -> None:
    """trap 108"""
    usage = await memory.sample_tree_async(os.getpid())
    assert usage is not None
    assert usage.processes >= 1
