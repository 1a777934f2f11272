"""The memory report: what is left, and what an error says about it."""

from __future__ import annotations

import json

from mesh.core.footprint import Source
from mesh.core.lifecycle import State
from mesh.core.placement import Need
from mesh.core.resources import Resources
from mesh.engine.memory_report import Holder, MemoryReport, capacity_details, unplaced

HOLDER = Holder(
    "i-1",
    "qwen:default",
    "Qwen",
    State.DRAINING,
    Resources({"ram": 512, "gpu0": 9000, "vram": 9000, "instances": 1}),
    live=Resources({"ram": 500}),
    source=Source.LEARNED,
    active=2,
    pinned=True,
)


def report(*, used: int = 9000, foreign: int = 3000) -> MemoryReport:
    capacity = Resources({"gpu0": 24000, "instances": 100})
    taken = Resources({"gpu0": foreign})
    return MemoryReport(capacity, capacity - taken, taken, Resources({"gpu0": used, "ram": 512}), (HOLDER,))


def test_free_is_the_budget_less_what_is_held_and_what_others_use() -> None:
    """trap 42; a kind without a limit has no "free", and processes are no memory."""
    assert report().free == Resources({"gpu0": 12000})


def test_free_is_never_negative() -> None:
    """Others may take what was already in use."""
    assert report(used=20000, foreign=23000).free == Resources({"gpu0": 0})


def test_details_carry_need_have_and_who_holds_it() -> None:
    """trap 49: numbers, and they are JSON."""
    details = capacity_details(Need(Resources({"ram": 300, "instances": 1}), split_mib=40000, each_mib=500), report())
    assert json.loads(json.dumps(details)) == {
        "need_mib": {"ram": 300, "vram": 40500},
        "capacity_mib": {"gpu0": 24000},
        "free_mib": {"gpu0": 12000},
        "held_by": [
            {
                "model": "Qwen",
                "instance": "i-1",
                "state": "draining",
                "memory_mib": {"ram": 512, "gpu0": 9000, "vram": 9000},
                "active": 2,
                "pinned": True,
            }
        ],
        "foreign_mib": {"gpu0": 3000},
    }


def test_a_need_that_has_a_place_is_told_as_placed() -> None:
    placed = Resources({"gpu1": 700, "vram": 700, "instances": 1})
    assert capacity_details(placed, report())["need_mib"] == {"gpu1": 700, "vram": 700}


def test_a_need_without_gpus_names_none() -> None:
    assert unplaced(Need(Resources({"ram": 5}))) == Resources({"ram": 5})
