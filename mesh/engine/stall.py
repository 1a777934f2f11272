"""Whether a load is stuck: how long the child has shown no sign of work, and how long it may (trap 22).

Signs are output, I/O, growth of memory and CPU time of the whole process tree. Pure: samples and the time are
arguments; ``mesh.engine.runner`` takes them.
"""

from __future__ import annotations

from typing import Final

from mesh.host.memory import TreeUsage

#: answering our own health probes costs a child some 0.1 % of a CPU and no file I/O; loading costs far more
BUSY_CPU_SHARE: Final = 0.05
MOVED_IO_BYTES: Final = 64 * 1024
GROWN_RSS_MIB: Final = 1
#: a big file gets more patience, up to this many times the configured silence
MAX_STRETCH: Final = 5.0
STRETCH_PER_BYTE: Final = 1 / (64 * 1024**3)


def silence_limit_s(startup_timeout_s: float, model_bytes: int) -> float:
    """Return the silence that means "stuck": the configured time, once more for each 64 GiB of model."""
    return startup_timeout_s * min(1.0 + model_bytes * STRETCH_PER_BYTE, MAX_STRETCH)


class StallClock:
    """Knows when the child last did something."""

    def __init__(self, now: float, limit_s: float) -> None:
        self.limit_s = limit_s
        self._progress_at = now
        self._sampled_at = now
        self._sample: TreeUsage | None = None

    def output(self, at: float) -> None:
        """It printed something."""
        self._progress_at = max(self._progress_at, at)

    def sampled(self, now: float, usage: TreeUsage | None) -> None:
        """Compare *usage* with the sample before; the first one only starts the comparison."""
        if usage is None:
            return
        if self._sample is not None and _worked(self._sample, usage, now - self._sampled_at):
            self._progress_at = now
        self._sample, self._sampled_at = usage, now

    def stalled(self, now: float) -> bool:
        """Whether the silence has reached the limit."""
        return now - self._progress_at >= self.limit_s


def _worked(before: TreeUsage, after: TreeUsage, elapsed_s: float) -> bool:
    return (
        after.cpu_s - before.cpu_s >= BUSY_CPU_SHARE * elapsed_s
        or after.io_bytes - before.io_bytes >= MOVED_IO_BYTES
        or after.rss_mib - before.rss_mib >= GROWN_RSS_MIB
        or after.processes != before.processes
    )
