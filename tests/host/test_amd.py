"""AMD GPUs in a made-up /sys."""

from __future__ import annotations

from pathlib import Path

from mesh.host import amd
from mesh.host.memory import MIB
from tests.host.conftest import Start


def add_card(sys_root: Path, number: int, pci: str, *, vram_mib: int, used_mib: int = 0, **files: str) -> Path:
    """Add a card as amdgpu shows it; *files* overrides or adds files of its PCI directory."""
    device = sys_root / "devices" / pci
    device.mkdir(parents=True)
    contents = {
        "vendor": amd.VENDOR,
        "mem_info_vram_total": str(vram_mib * MIB),
        "mem_info_vram_used": str(used_mib * MIB),
        "mem_info_gtt_total": str(16384 * MIB),
        **files,
    }
    for name, text in contents.items():
        (device / name).write_text(f"{text}\n")
    card = sys_root / "class/drm" / f"card{number}"
    card.mkdir(parents=True)
    (card / "device").symlink_to(device)
    (card.with_name(f"card{number}-DP-1")).mkdir()
    return device


def add_node(sys_root: Path, number: int, **properties: int) -> None:
    node = sys_root / "class/kfd/kfd/topology/nodes" / str(number)
    node.mkdir(parents=True)
    (node / "properties").write_text("".join(f"{name} {value}\n" for name, value in properties.items()))


def test_a_card_as_the_driver_shows_it(tmp_path: Path) -> None:
    add_card(
        tmp_path, 1, "0000:03:00.0", vram_mib=24560, used_mib=700, unique_id="a1b2", product_name="Radeon RX 7900 XTX"
    )
    (gpu,) = amd.read(tmp_path).gpus
    assert gpu is not None
    assert (gpu.uuid, gpu.name, gpu.vendor, gpu.index) == ("GPU-a1b2", "Radeon RX 7900 XTX", "amd", 0)
    assert (gpu.total_mib, gpu.used_mib, gpu.processes, gpu.unified) == (24560, 700, None, False)


def test_cards_are_numbered_as_rocm_numbers_them(tmp_path: Path) -> None:
    """card0 may be the second for HIP: the numbers come from the list of compute nodes."""
    add_card(tmp_path, 0, "0000:43:00.0", vram_mib=8000)
    add_card(tmp_path, 1, "0000:03:00.0", vram_mib=16000)
    assert [gpu.total_mib for gpu in amd.read(tmp_path).gpus if gpu] == [16000, 8000]  # no ROCm: by PCI address
    add_node(tmp_path, 0, cpu_cores_count=16, simd_count=0)
    add_node(tmp_path, 10, simd_count=96, domain=0, location_id=0x0300)
    add_node(tmp_path, 2, simd_count=64, domain=0, location_id=0x4300)
    found = amd.read(tmp_path).gpus
    assert [(gpu.index, gpu.total_mib, gpu.uuid) for gpu in found if gpu] == [
        (0, 8000, "0000:43:00.0"),
        (1, 16000, "0000:03:00.0"),
    ]


def test_an_apu_uses_main_memory(tmp_path: Path) -> None:
    """trap 48"""
    add_card(tmp_path, 0, "0000:0a:00.0", vram_mib=512, used_mib=400)
    add_card(tmp_path, 1, "0000:0b:00.0", vram_mib=65536)  # an APU whose BIOS sets that much aside has it
    small, large = amd.read(tmp_path).gpus
    assert small is not None
    assert large is not None
    assert (small.unified, small.total_mib, small.used_mib) == (True, 0, 0)
    assert (large.unified, large.total_mib) == (False, 65536)


def test_a_card_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    """trap 44"""
    add_card(tmp_path, 0, "0000:03:00.0", vram_mib=8000, mem_info_vram_used="broken")
    add_card(tmp_path, 1, "0000:04:00.0", vram_mib=16000)
    found = amd.read(tmp_path)
    assert found.gpus[0] is None
    assert found.gpus[1] is not None
    assert found.problems[0].startswith("AMD GPU 0000:03:00.0 cannot be read: invalid literal")


def test_other_vendors_and_an_empty_sys(tmp_path: Path) -> None:
    assert amd.read(tmp_path / "none") == amd.Found()
    add_card(tmp_path, 0, "0000:00:02.0", vram_mib=8000, vendor="0x8086")
    assert amd.read(tmp_path) == amd.Found()


def test_it_is_what_a_machine_without_nvidia_has(machine: Start, tmp_path: Path) -> None:
    add_card(tmp_path, 0, "0000:03:00.0", vram_mib=8000, mem_info_vram_used="broken")
    add_card(tmp_path, 1, "0000:04:00.0", vram_mib=16000)
    _, reader = machine(sys_root=tmp_path)
    devices = reader.read()
    assert devices.kind == "amd"
    assert [gpu.kind for gpu in devices.gpus] == ["gpu1"]  # gpu0 is the one that cannot be read now
    assert len(devices.problems) == 1
