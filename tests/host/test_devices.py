"""The names of GPUs and the choice between vendors; the readers themselves are fakes here."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.core.devices import Gpu
from mesh.host import memory
from mesh.host.devices import DeviceReader, TelemetryError
from mesh.host.nvml import Found, NoNvmlError, Nvml, NvmlError
from tests.host.test_amd import add_card

NOTHING = Path("/nothing")


def gpu(uuid: str, index: int = 0) -> Gpu:
    return Gpu(kind="", uuid=uuid, name=uuid, total_mib=1000, used_mib=10, index=index)


class FakeNvml(Nvml):
    """Answers what the test put there; an exception is raised."""

    def __init__(self, *answers: Found | NvmlError) -> None:
        super().__init__()
        self.answers = list(answers)
        self.closed = 0

    def read(self) -> Found:
        answer = self.answers.pop(0)
        if isinstance(answer, NvmlError):
            raise answer
        return answer

    def close(self) -> None:
        self.closed += 1


def found(*uuids: str | None) -> Found:
    gpus = tuple(gpu(uuid, place) if uuid else None for place, uuid in enumerate(uuids))
    return Found(gpus, tuple(f"GPU {place} is ill" for place, uuid in enumerate(uuids) if uuid is None))


def names(*answers: Found) -> list[dict[str, str]]:
    reader = DeviceReader(sys_root=NOTHING, nvml=FakeNvml(*answers), environ={})
    return [{each.uuid: each.kind for each in reader.read().gpus} for _ in answers]


def test_a_name_stays_with_its_gpu() -> None:
    """One falls off the bus and the driver counts anew: the others keep their names, and their budgets."""
    whole = {"a": "gpu0", "b": "gpu1", "c": "gpu2"}
    assert names(found("a", "b", "c"), found("a", "c"), found("c", "b", "a")) == [
        whole,
        {"a": "gpu0", "c": "gpu2"},
        whole,
    ]


def test_a_gpu_that_is_ill_from_the_start_keeps_its_place_free() -> None:
    assert names(found("a", None, "c"), found("a", "b", "c")) == [
        {"a": "gpu0", "c": "gpu2"},
        {"a": "gpu0", "b": "gpu1", "c": "gpu2"},
    ]


def test_a_new_gpu_takes_nobodys_name() -> None:
    assert names(found("a", "b"), found("b", "new"))[1] == {"b": "gpu1", "new": "gpu2"}


def test_gpus_come_in_the_order_of_their_names() -> None:
    reader = DeviceReader(sys_root=NOTHING, nvml=FakeNvml(found("a", "b"), found("b", "a")))
    for _ in range(2):
        assert [each.kind for each in reader.read().gpus] == ["gpu0", "gpu1"]


@pytest.mark.parametrize("silence", [NvmlError("no answer"), NoNvmlError("no answer"), Found()])
def test_a_driver_that_had_gpus_and_falls_silent_is_a_problem(silence: Found | NvmlError) -> None:
    """trap 44: not a machine without GPUs."""
    reader = DeviceReader(sys_root=NOTHING, nvml=FakeNvml(found("a"), silence, found("a")))
    reader.read()
    now = reader.read()
    assert (now.kind, now.gpus) == ("nvml", ())
    assert now.problems
    assert reader.read().problems == ()


def test_a_driver_that_never_worked_is_no_gpu(tmp_path: Path) -> None:
    answers = NoNvmlError("not there"), NvmlError("no permission"), Found()
    reader = DeviceReader(sys_root=NOTHING, nvml=FakeNvml(*answers), environ={})
    assert [reader.read().problems for _ in answers] == [(), ("no permission",), ()]
    add_card(tmp_path, 0, "0000:03:00.0", vram_mib=8000)
    now = DeviceReader(sys_root=tmp_path, nvml=FakeNvml(NvmlError("no permission"))).read()
    assert (now.kind, now.problems) == ("amd", ("no permission",))


def test_beside_an_nvidia_card_the_cpus_own_amd_gpu_is_not_used(tmp_path: Path) -> None:
    add_card(tmp_path, 0, "0000:03:00.0", vram_mib=512)
    now = DeviceReader(sys_root=tmp_path, nvml=FakeNvml(found("a"))).read()
    assert (now.kind, [each.uuid for each in now.gpus]) == ("nvml", ["a"])


def test_ram_is_the_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ram_total_mib", lambda: 64)
    monkeypatch.setattr(memory, "ram_available_mib", lambda: 65)  # the two are not read at the same moment
    now = DeviceReader(sys_root=NOTHING, nvml=FakeNvml(Found())).read()
    assert (now.ram_total_mib, now.ram_available_mib) == (64, 64)


def test_nothing_to_read_is_an_error_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise OSError("no /proc")

    monkeypatch.setattr(memory, "ram_total_mib", broken)
    with pytest.raises(TelemetryError, match="no /proc"):
        DeviceReader(sys_root=NOTHING, nvml=FakeNvml(Found())).read()


def test_closing_lets_go_of_the_driver_but_waits_for_no_read_that_hangs() -> None:
    class Hanging(FakeNvml):
        begun, ended = threading.Event(), threading.Event()

        def read(self) -> Found:
            self.begun.set()
            self.ended.wait(10)
            return found("a")

    driver = Hanging()
    reader = DeviceReader(sys_root=NOTHING, nvml=driver)
    thread = threading.Thread(target=reader.read)
    thread.start()
    driver.begun.wait(10)
    reader.close()
    assert driver.closed == 0
    driver.ended.set()
    thread.join(10)
    reader.close()
    assert driver.closed == 1


def test_a_named_gpu_is_otherwise_the_drivers() -> None:
    (now,) = DeviceReader(sys_root=NOTHING, nvml=FakeNvml(found("a"))).read().gpus
    assert now == replace(gpu("a"), kind="gpu0")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ["gpu0", "gpu1", "gpu2"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2", ["gpu2"]),
        ("2, 0", ["gpu0", "gpu2"]),
        ("GPU-b", ["gpu1"]),
        ("GPU-a1,GPU-c3", ["gpu0", "gpu2"]),
    ],
)
def test_a_gpu_that_is_hidden_from_the_node_is_hidden_from_its_children(value: str | None, expected: list[str]) -> None:
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    reader = DeviceReader(sys_root=NOTHING, nvml=FakeNvml(found("GPU-a1", "GPU-b2", "GPU-c3")), environ=environ)
    assert [each.kind for each in reader.read().gpus] == expected


def test_amd_has_variables_of_its_own(tmp_path: Path) -> None:
    for number in range(3):
        add_card(tmp_path, number, f"0000:0{number}:00.0", vram_mib=8000)
    environ = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "0,1", "ROCR_VISIBLE_DEVICES": "1,2"}
    reader = DeviceReader(sys_root=tmp_path, nvml=FakeNvml(NoNvmlError()), environ=environ)
    assert [each.kind for each in reader.read().gpus] == ["gpu1"]
