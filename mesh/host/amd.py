"""AMD GPUs through sysfs, as the amdgpu driver shows them: how much memory each has, and how much of it is taken.

Reads files and nothing else: no ROCm library is needed. The driver has no list of a GPU's processes there.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mesh.core.devices import Gpu

MIB: Final = 1024 * 1024
VENDOR: Final = "0x1002"
#: an APU with less memory of its own than this works in the machine's memory (GTT); the BIOS gives it 0.5 to 2 GiB
SMALL_CARVE_OUT_MIB: Final = 3072


@dataclass(frozen=True, slots=True)
class Found:
    """What one read found, in HIP's order; None is in the place of a GPU that could not be read."""

    gpus: tuple[Gpu | None, ...] = ()
    problems: tuple[str, ...] = ()


def read(sys_root: Path = Path("/sys")) -> Found:
    """Return all AMD GPUs; ``kind`` is left empty. Blocks for less than a millisecond for each."""
    gpus: list[Gpu | None] = []
    problems: list[str] = []
    order = _hip_order(sys_root)
    cards = sorted(_cards(sys_root), key=lambda card: (order.get(card.name, len(order)), card.name))
    for index, card in enumerate(cards):
        try:
            gpus.append(_gpu(card, order.get(card.name, index)))
        except (OSError, ValueError) as error:
            gpus.append(None)
            problems.append(f"AMD GPU {card.name} cannot be read: {error}")
    return Found(tuple(gpus), tuple(problems))


def _cards(sys_root: Path) -> Iterator[Path]:
    """Yield the PCI directory of each AMD card, e.g. ``/sys/devices/.../0000:03:00.0``."""
    for card in (sys_root / "class/drm").glob("card*"):
        device = card / "device"
        if re.fullmatch(r"card\d+", card.name) and _text(device / "vendor") == VENDOR:  # cardN-DP-1 is a connector
            yield device.resolve()


def _gpu(device: Path, index: int) -> Gpu:
    total_mib = int((device / "mem_info_vram_total").read_text()) // MIB
    used_mib = -(-int((device / "mem_info_vram_used").read_text()) // MIB)
    unified = total_mib <= SMALL_CARVE_OUT_MIB and _shared_mib(device) > total_mib
    unique_id = _text(device / "unique_id")
    return Gpu(
        kind="",
        uuid=f"GPU-{unique_id}" if unique_id else device.name,
        name=_text(device / "product_name") or f"AMD GPU {_text(device / 'device') or device.name}",
        total_mib=0 if unified else total_mib,
        used_mib=0 if unified else min(used_mib, total_mib),
        vendor="amd",
        index=index,
        unified=unified,
    )


def _shared_mib(device: Path) -> int:
    """Return how much of the machine's memory it may use."""
    with contextlib.suppress(ValueError):
        return int(_text(device / "mem_info_gtt_total")) // MIB
    return 0


def _hip_order(sys_root: Path) -> Mapping[str, int]:
    """Return the number that ROCm gives each PCI address: the order of the kernel's list of compute nodes."""
    addresses: list[str] = []
    nodes = (sys_root / "class/kfd/kfd/topology/nodes").glob("*")
    for node in sorted((node for node in nodes if node.name.isdigit()), key=lambda node: int(node.name)):
        lines = (line.split() for line in _text(node / "properties").splitlines())
        facts = {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit()}
        if facts.get("simd_count", 0) > 0:
            addresses.append(_pci_address(facts.get("domain", 0), facts.get("location_id", 0)))
    return {address: number for number, address in enumerate(addresses)}


def _pci_address(domain: int, location: int) -> str:
    return f"{domain:04x}:{location >> 8 & 0xFF:02x}:{location >> 3 & 0x1F:02x}.{location & 7}"


def _text(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text().strip()
    return ""
