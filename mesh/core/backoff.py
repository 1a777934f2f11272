"""How long a profile that keeps failing is left alone."""

from __future__ import annotations

from dataclasses import dataclass

#: A process that lived this long before it died did not die of its start: the count begins again.
SOUND_LIFE_S = 30.0
MAX_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True)
class Failure:
    """The last load failure or crash of a profile. ``retry_at`` is on the caller's monotonic clock."""

    kind: str  #: "load", "crash" or "engine" (there is none to run)
    reason: str
    count: int
    retry_at: float
    log_tail: tuple[str, ...] = ()


def delay_s(count: int) -> float:
    """Return the pause after the *count*-th failure in a row: none after the first, then 1, 2, 4 ... 60 seconds.

    A single failure is often an operator who is fixing a path right now; the next request tries again (trap 24).
    """
    return 0.0 if count <= 1 else min(2.0 ** min(count - 2, 10), MAX_BACKOFF_S)


def after_failure(
    previous: Failure | None, kind: str, reason: str, log_tail: tuple[str, ...], *, lived_s: float, now: float
) -> Failure:
    """Return the record after one more failure of a process that lived *lived_s* seconds."""
    count = 1 if previous is None or lived_s >= SOUND_LIFE_S else previous.count + 1
    return Failure(kind, reason, count, now + delay_s(count), log_tail)
