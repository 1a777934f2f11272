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
    cache = f"anon 1\ninactive_file {7 * MIB}\nactive_file {3 * MIB}"
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


def test_trees_are_found_with_one_look_at_the_process_table() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-I', '-S', '-c', 'import sys; sys.stdin.read()'])"
    with subprocess.Popen([sys.executable, "-I", "-c", code], stdin=subprocess.PIPE) as child:
        trees = memory.tree_pids([child.pid])
        while len(trees[child.pid]) < 2:
            trees = memory.tree_pids([child.pid, os.getpid()])
        assert trees[child.pid][0] == child.pid
        assert set(trees[child.pid]) < set(trees[os.getpid()])
        assert child.stdin is not None
        child.stdin.close()
    assert memory.tree_pids([child.pid]) == {}
    assert memory.tree_pids([]) == {}


@pytest.fixture(params=["proc", "psutil"])
def _table(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "psutil":
        monkeypatch.setattr(memory, "_PROC", tmp_path)


@pytest.mark.usefixtures("_table")
def test_a_zombie_holds_no_memory() -> None:
    """trap 27"""
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert psutil.pid_exists(child.pid)
    assert memory.tree_pids([child.pid]) == {}
    child.wait()
    assert os.getpid() in memory.tree_pids([os.getppid()])[os.getppid()]


def test_a_process_may_be_called_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    for pid, stat in (("self", ""), ("7", "7 (a) Z 1) S 1 7"), ("8", "8 (b\n) S 7 7"), ("9", "gone"), ("x", "")):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "stat").write_text(stat)
    assert memory.tree_pids([7]) == {7: (7, 8)}


def test_a_table_with_a_circle_ends() -> None:
    """Pids are reused while the table is read."""
    assert list(memory._descend(1, {1: [2], 2: [3, 1], 3: [2]})) == [1, 2, 3]


MAPPER = """
import mmap, os, sys
size = os.path.getsize(sys.argv[1])
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as weights:
    sum(weights[::4096])
    print(flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PSS is Linux's")
def test_weights_that_two_processes_map_count_once(tmp_path: Path) -> None:
    """trap 45: each of two instances of one model maps the same file, and it is in memory once."""
    weights = tmp_path / "weights"
    weights.write_bytes(os.urandom(64 * MIB))
    command = [sys.executable, "-I", "-S", "-c", MAPPER, str(weights)]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(command, stdin=pipe, stdout=pipe) as one,
        subprocess.Popen(command, stdin=pipe, stdout=pipe) as two,
    ):
        for child in (one, two):
            assert child.stdout is not None
            child.stdout.readline()
        together, alone = memory.resident([one.pid, two.pid]), memory.resident([one.pid])
        for child in (one, two):
            assert child.stdin is not None
            child.stdin.close()
    assert together is not None
    assert alone is not None
    assert 64 <= together.total_mib < 64 + 40
    assert 32 <= alone.total_mib < 32 + 20
    assert together.held_mib < 40  # the file's pages give way


def rollup(proc: Path, pid: int, **sizes_mib: int) -> None:
    (proc / str(pid)).mkdir()
    lines = [f"{name}:  {mib * 1024} kB" for name, mib in sizes_mib.items()]
    (proc / str(pid) / "smaps_rollup").write_text("\n".join(["1000-2000 ---p 00:00 0 [rollup]", *lines]))


@pytest.mark.parametrize(
    ("sizes", "held_mib"),
    [
        ({"Pss_Anon": 100, "Pss_File": 900, "Pss_Shmem": 5, "Locked": 0}, 105),
        ({"Pss_Anon": 100, "Pss_File": 900, "Pss_Shmem": 0, "Locked": 880}, 980),  # --mlock of a mapped file
        ({"Pss_Anon": 1000, "Pss_File": 5, "Pss_Shmem": 0, "Locked": 900}, 1005),  # --mlock --no-mmap
        ({}, 1005),  # a kernel before 5.4 does not tell
    ],
)
def test_what_of_a_process_cannot_be_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], held_mib: int
) -> None:
    """trap 45"""
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    rollup(tmp_path, 7, Rss=2000, Pss=1005, **sizes)
    assert memory.resident([7]) == memory.Resident(1005, held_mib)


def test_where_there_is_no_pss_the_resident_set_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not Linux, or somebody else's process."""
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    rollup(tmp_path, 7, Rss=1, Pss=5, Pss_Anon=4)
    own = psutil.Process().memory_info()
    together = memory.resident([7, os.getpid()])
    assert together is not None
    assert abs(together.total_mib - (5 + own.rss // MIB)) <= 2
    assert 4 < together.held_mib < together.total_mib
    assert memory.resident([2**22 + 1]) is None
    assert memory.resident([]) is None


async def test_the_loop_is_free_while_a_tree_is_read() -> None:
    """trap 108"""
    usage = await memory.sample_tree_async(os.getpid())
    assert usage is not None
    assert usage.processes >= 1
