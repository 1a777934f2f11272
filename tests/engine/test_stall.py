"""The stall timer: what counts as progress, and for how long there may be none (trap 22)."""

from __future__ import annotations

import pytest

from mesh.engine.stall import StallClock, silence_limit_s
from mesh.host.memory import TreeUsage

GIB = 1024**3
IDLE = TreeUsage(processes=1, rss_mib=100, pss_mib=None, cpu_s=10.0, io_bytes=1_000_000)


def test_big_files_get_more_patience_within_bounds() -> None:
    assert silence_limit_s(60, 0) == 60
    assert silence_limit_s(60, 64 * GIB) == 120
    assert silence_limit_s(60, 4096 * GIB) == 300


def test_silence_is_a_stall_after_the_limit() -> None:
    clock = StallClock(100.0, limit_s=60.0)
    assert not clock.stalled(159.9)
    assert clock.stalled(160.0)


def test_output_postpones_it_however_long_the_load_takes() -> None:
    """trap 22: twenty minutes of a healthy load."""
    clock = StallClock(0.0, limit_s=60.0)
    for now in range(0, 1200, 50):
        clock.output(float(now))
        assert not clock.stalled(now + 50.0)
    clock.output(3.0)  # an old time does not turn it back
    assert not clock.stalled(1200.0)
    assert clock.stalled(1211.0)


@pytest.mark.parametrize(
    ("usage", "progress"),
    [
        (TreeUsage(1, 100, None, 10.5, 1_000_000), True),
        (TreeUsage(1, 100, None, 10.0, 9_000_000), True),
        (TreeUsage(1, 102, None, 10.0, 1_000_000), True),
        (TreeUsage(2, 100, None, 10.0, 1_000_000), True),
        (TreeUsage(1, 100, None, 10.01, 1_000_500), False),  # it only answers our probes
        (IDLE, False),
        (None, False),
    ],
    ids=["cpu", "io", "memory", "processes", "probes", "nothing", "gone"],
)
def test_what_counts_as_work(usage: TreeUsage | None, progress: bool) -> None:
    clock = StallClock(0.0, limit_s=10.0)
    clock.sampled(8.0, IDLE)  # the first sample has nothing to compare with
    clock.sampled(9.0, usage)
    assert clock.stalled(10.0) is not progress
