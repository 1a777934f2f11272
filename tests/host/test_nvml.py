"""Real nvidia-ml-py calls against a scripted ``libnvidia-ml.so.1``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mesh.host import nvml
from mesh.host.memory import MIB
from tests.fake_nvml.build import FakeDriver, GpuSpec, fake_uuid
from tests.fake_nvml.reader import RemoteReader, remote_reader
from tests.host.conftest import Start

BIG = GpuSpec(24576, used_mib=100, reserved_mib=300)
SMALL = GpuSpec(12288, name="NVIDIA Fake 12GB", flags="consumer")
LOST, NOT_LOADED, NOT_SUPPORTED, NO_PERMISSION, NO_FUNCTION, UNKNOWN = 15, 9, 3, 4, 13, 999
MEMORY = "nvmlDeviceGetMemoryInfo"


def test_what_the_driver_reserves_is_neither_used_by_others_nor_to_be_had(machine: Start) -> None:
    _, reader = machine(BIG, SMALL)
    big, small = reader.read().gpus
    assert (big.total_mib, big.used_mib) == (24576 - 300, 100)
    assert (small.kind, small.name, small.uuid) == ("gpu1", "NVIDIA Fake 12GB", fake_uuid(1))
    assert (small.total_mib, small.used_mib, small.index, small.processes) == (12288, 0, 1, {})
    assert small.vendor == "nvidia"
    assert small.combinable
    assert not small.unified


def test_an_old_driver_has_the_same_free_memory(machine: Start) -> None:
    driver, reader = machine(BIG)
    driver.add("process 0 7 1000", f"error {MEMORY}_v2 * {NO_FUNCTION}")
    for kind in ("Compute", "Graphics", "MPSCompute"):
        driver.add(f"error nvmlDeviceGet{kind}RunningProcesses_v3 * {NO_FUNCTION}")
    (gpu,) = reader.read().gpus
    assert gpu.total_mib - gpu.used_mib == 24576 - 300 - 1100
    assert gpu.processes == {7: 1000}


def test_a_process_in_several_lists_counts_once(machine: Start) -> None:
    """trap 42"""
    driver, reader = machine(BIG, SMALL)
    driver.add("process 0 7 1000 compute", "process 0 7 1000 graphics", "process 0 8 200 graphics")
    driver.add("process 0 9 300 mps", "process 0 10 na", "process 1 7 50")
    big, small = reader.read().gpus
    assert big.processes == {7: 1000, 8: 200, 9: 300, 10: None}
    assert big.used_mib == 100 + 1500
    assert small.processes == {7: 50}


def test_a_list_that_outgrows_its_buffer_is_read_again(machine: Start) -> None:
    driver, reader = machine(BIG)
    driver.add("process 0 7 1000", "shortfall 1")
    assert reader.read().gpus[0].processes == {7: 1000}


@pytest.mark.parametrize("code", [NOT_SUPPORTED, NO_PERMISSION])
def test_no_list_of_processes_is_not_an_empty_one(machine: Start, code: int) -> None:
    driver, reader = machine(BIG)
    driver.add("process 0 7 1000", f"error nvmlDeviceGetComputeRunningProcesses_v3 * {code}")
    (gpu,) = reader.read().gpus
    assert gpu.processes is None
    assert gpu.used_mib == 1100


def test_a_gpu_that_fails_for_a_moment_is_named_and_hides_no_other(machine: Start) -> None:
    """trap 44: its list of processes failing is a failure too, or its memory would look like a stranger's."""
    driver, reader = machine(BIG, SMALL, BIG)
    for call in (f"{MEMORY}_v2", "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetHandleByIndex_v2"):
        driver.add(fault := f"error {call} {fake_uuid(1)} {LOST}")
        devices = reader.read()
        assert [gpu.kind for gpu in devices.gpus] == ["gpu0", "gpu2"]
        assert devices.problems == ("NVIDIA GPU 1 cannot be read: GPU is lost",)
        driver.remove(fault)
        assert [gpu.kind for gpu in reader.read().gpus] == ["gpu0", "gpu1", "gpu2"]


class TestMig:
    PARENT = GpuSpec(81920, used_mib=10, name="NVIDIA A100", flags="mig")

    def test_a_gpu_in_mig_mode_is_replaced_by_its_instances(self, machine: Start) -> None:
        driver, reader = machine(SMALL, self.PARENT)
        driver.add("mig 1 0 7 MIG-aaa 20480 5 - NVIDIA A100 MIG 2g.20gb")
        driver.add("mig 1 3 9 MIG-bbb 40960 0 - NVIDIA A100 MIG 3g.40gb", "process MIG-bbb 7 3000")
        whole, small, large = reader.read().gpus
        assert whole.combinable
        assert (small.kind, small.uuid, small.index, small.combinable) == ("gpu1", "MIG-aaa", 1, False)
        assert (large.kind, large.uuid, large.index, large.combinable) == ("gpu2", "MIG-bbb", 1, False)
        assert (small.total_mib, small.used_mib, small.processes) == (20480, 5, {})
        assert (large.total_mib, large.used_mib, large.processes) == (40960, 3000, {7: 3000})

    def test_two_compute_instances_of_one_slice_share_its_memory(self, machine: Start) -> None:
        driver, reader = machine(self.PARENT)
        driver.add("mig 0 0 7 MIG-aaa 20480 5 - first", "mig 0 1 7 MIG-bbb 20480 5 - second")
        assert [gpu.uuid for gpu in reader.read().gpus] == ["MIG-aaa"]

    def test_without_instances_it_is_not_used_and_says_so(self, machine: Start) -> None:
        _, reader = machine(SMALL, self.PARENT)
        devices = reader.read()
        assert [gpu.kind for gpu in devices.gpus] == ["gpu0"]
        assert devices.problems == ("NVIDIA GPU 1 is in MIG mode and has no MIG instance; it is not used",)


RAM_MIB = psutil.virtual_memory().total // MIB


@pytest.mark.parametrize(
    ("gpu", "unified"),
    [
        (GpuSpec(0, name="NVIDIA GB10", flags="unified,ats"), True),  # "Memory-Usage: Not Supported"
        (GpuSpec(0, name="NVIDIA Newer Thing"), True),
        (GpuSpec(RAM_MIB, 5000, name="Orin (nvgpu)"), True),
        (GpuSpec(RAM_MIB - 100, 5000, name="NVIDIA Newer Thing", flags="ats"), True),
        (GpuSpec(RAM_MIB // 3, 5000, name="NVIDIA GH200 480GB", flags="ats"), False),
        (GpuSpec(RAM_MIB * 2, 5000, name="NVIDIA H200"), False),  # more memory than the machine, and its own
        (GpuSpec(RAM_MIB * 2, 5000, name="NVIDIA GB102"), False),
    ],
)
def test_a_gpu_without_memory_of_its_own(machine: Start, gpu: GpuSpec, unified: bool) -> None:
    """trap 48"""
    driver, reader = machine(gpu)
    driver.add("process 0 7 1000")
    devices = reader.read()
    (found,) = devices.gpus
    assert found.unified is unified
    assert (found.total_mib == 0) is unified
    assert found.used_mib == (0 if unified else 6000)
    assert found.processes == {7: 1000}
    assert devices.budgeted == (() if unified else (found,))


@pytest.mark.parametrize("call", ["*", f"{MEMORY}_v2"])
def test_the_driver_is_opened_again_after_a_reload(machine: Start, call: str) -> None:
    """trap 44"""
    driver, reader = machine(BIG)
    reader.read()
    driver.add(f"error {call} * 1", f"init {NOT_LOADED}")
    for _ in range(2):
        devices = reader.read()
        assert (devices.kind, devices.gpus) == ("nvml", ())
        assert len(devices.problems) == 1
        assert devices.ram_total_mib > 0
    assert devices.problems == ("the NVIDIA driver is not loaded",)
    driver.remove(f"error {call} * 1", f"init {NOT_LOADED}")
    assert [gpu.kind for gpu in reader.read().gpus] == ["gpu0"]


def test_an_ill_gpu_has_the_driver_opened_again_but_not_with_every_read(machine: Start) -> None:
    driver, reader = machine(BIG, SMALL)
    reader.read(0)
    driver.add(f"error {MEMORY}_v2 {fake_uuid(1)} {LOST}", f"init {UNKNOWN}")  # a second nvmlInit would show
    for now_s in (1, nvml.REOPEN_EVERY_S - 1, nvml.REOPEN_EVERY_S):
        assert len(reader.read(now_s).gpus) == 1
    assert reader.read(nvml.REOPEN_EVERY_S).problems == ("the NVIDIA driver does not answer: Unknown Error",)


def test_a_driver_that_hangs_may_come_back(machine: Start) -> None:
    """trap 44: what the node does meanwhile is in tests/engine/test_telemetry.py."""
    driver, reader = machine(BIG)
    driver.add(fault := f"error {MEMORY}_v2 * hang")
    reader.ask()
    assert not reader.has_answer(0.05)
    driver.remove(fault)
    assert len(reader.answer().gpus) == 1


def test_a_replaced_driver_asks_for_a_restart(machine: Start) -> None:
    driver, reader = machine(BIG)
    driver.add("init 18")
    devices = reader.read()
    assert devices.kind == "none"
    assert "restart the node" in devices.problems[0]


@pytest.mark.parametrize("content", ["", "not a library"])
def test_without_a_driver_there_are_no_gpus_and_no_problem(tmp_path: Path, content: str) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text(content)  # hides a real one
    with remote_reader({**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}) as reader:
        devices = reader.read()
    assert (devices.kind, devices.gpus, devices.problems) == ("none", (), ())
    assert devices.ram_total_mib > 0


def test_a_driver_without_gpus(machine: Start) -> None:
    _, reader = machine()
    assert reader.read().kind == "none"


def test_a_process_that_has_a_gpu_open_is_known(tmp_path: Path) -> None:
    """Every process of a CUDA build opens nvidiactl; the GPU itself only one that uses it."""
    for pid, target in ((1, "/dev/nvidiactl"), (2, "/dev/nvidia0"), (3, "/dev/dxg"), (4, "/dev/nvidia-uvm")):
        (tmp_path / f"{pid}/fd").mkdir(parents=True)
        (tmp_path / f"{pid}/fd/5").symlink_to(target)
    assert [pid for pid in range(6) if nvml.opened_by([pid], tmp_path)] == [2, 3]
    assert nvml.opened_by([1, 2], tmp_path)
    assert not nvml.opened_by([os.getpid()])


class TestConsumers:
    """The fake's own way to give real children GPU memory."""

    def test_a_process_uses_what_it_says_on_the_gpus_that_it_sees(self, machine: Start) -> None:
        driver, reader = machine(BIG, SMALL)
        driver.add("consumers 0")
        with consumer(f"{fake_uuid(1)},{fake_uuid(0)}", "4000", "--tensor-split", "3,1") as process:
            wait_for_exec(process)
            big, small = reader.read().gpus
            assert (big.processes, big.used_mib) == ({process.pid: 1000}, 1100)
            assert (small.processes, small.used_mib) == ({process.pid: 3000}, 3000)
            end(process)
        assert [gpu.used_mib for gpu in reader.read().gpus] == [100, 0]

    def test_memory_may_come_back_later_than_the_end(self, machine: Start) -> None:
        """trap 43"""
        driver, reader = machine(BIG)
        driver.add("consumers 3600000")
        with consumer(fake_uuid(0), "4000") as process:
            wait_for_exec(process)
            assert reader.read().gpus[0].used_mib == 4100
            end(process)
        (gpu,) = reader.read().gpus
        assert (gpu.used_mib, gpu.processes) == (4100, {})
        driver.write(*driver.lines[:-1], "consumers 0")
        assert self.used(reader) == 100

    @staticmethod
    def used(reader: RemoteReader) -> int:
        return reader.read().gpus[0].used_mib


def consumer(visible: str, mib: str, *args: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "FAKE_GPU_MIB": mib}
    code = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-I", "-S", "-c", code, *args]
    return subprocess.Popen(
        command, env=env, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )


def wait_for_exec(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    process.stdout.readline()


def end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(10)


def test_a_script_is_replaced_whole(tmp_path: Path, nvml_library: Path) -> None:
    driver = FakeDriver(tmp_path, BIG, library=nvml_library)
    driver.add("init 1")
    assert driver.script.read_text() == f"gpu {fake_uuid(0)} 24576 300 100 - NVIDIA Fake 24GB\ninit 1\n"
