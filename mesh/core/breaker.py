"""Whether a peer is asked at all: a circuit breaker, one per peer, as a table of phases.

Three rules:

1. Every change of phase is a row of ``TRANSITIONS`` and begins a new *generation*. Whoever wants to ask the peer gets a
   ``Permit`` of the present generation; what comes of a permit of an older one is ignored (trap 53).
2. A half-open circuit has one *probe* out at a time, and only that probe's own result moves it. A probe that is never
   heard of again (its task died) is given up after ``permit_s``, so that it cannot keep the circuit from closing.
3. Nothing happens by itself: time counts when somebody asks. Gossip asks too, with the same permits, so an opened
   circuit closes once the peer is back although no client wants anything of it (trap 52).

A failure is a peer that cannot be reached, breaks off or says nothing. One that answers 503 because it is full is
healthy: its caller reports success, and asks elsewhere. Success is due with the answer's head: an answer may take an
hour, and the circuit should not be half-open until then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    CLOSED = "closed"  # it is asked; failures in a row are counted
    OPEN = "open"  # it failed too often and is left alone
    HALF_OPEN = "half_open"  # one at a time may try whether it is back


class Event(StrEnum):
    TRIPPED = "tripped"  # failures in a row reached the threshold
    COOLED = "cooled"  # the pause is over, and somebody asks
    RELAPSED = "relapsed"  # the probe failed
    RECOVERED = "recovered"  # enough probes succeeded


TRANSITIONS: Mapping[tuple[Phase, Event], Phase] = {
    (Phase.CLOSED, Event.TRIPPED): Phase.OPEN,
    (Phase.OPEN, Event.COOLED): Phase.HALF_OPEN,
    (Phase.HALF_OPEN, Event.RELAPSED): Phase.OPEN,
    (Phase.HALF_OPEN, Event.RECOVERED): Phase.CLOSED,
}

#: Doubling stops here; whatever the settings, 2**32 pauses of any length are for ever.
_MOST_DOUBLINGS = 32


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings of cluster.circuit_breaker, in seconds."""

    enabled: bool = True
    failure_threshold: int = 5  #: failures in a row that open the circuit; less than 1 counts as 1
    success_threshold: int = 2  #: successful probes that close it; less than 1 counts as 1
    open_base_s: float = 5.0  #: the first pause; doubles with every failed probe
    open_max_s: float = 60.0
    probe_interval_s: float = 1.0  #: from the start of one probe to the next; 0 = no pacing
    permit_s: float = (
        120.0  #: a probe that says nothing for so long is lost; longer than any first-byte limit of a probe
    )

    def pause_s(self, relapses: int) -> float:
        """Return how long a circuit stays open after *relapses* failed probes in a row."""
        return min(self.open_base_s * 2.0 ** min(relapses, _MOST_DOUBLINGS), max(self.open_base_s, self.open_max_s))


@dataclass(frozen=True, slots=True)
class Permit:
    """The right to ask the peer once. Give it back with ``succeeded``, ``failed`` or ``dropped``, once."""

    generation: int
    probe: int = 0  #: number of the probe; 0 = the circuit was closed


class Breaker:
    """The circuit to one peer. ``now`` is monotonic seconds."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.phase = Phase.CLOSED
        self.generation = 0
        self._count = 0  #: closed: failures in a row; half-open: successful probes
        self._relapses = 0  #: probes that failed since the circuit was last closed
        self._retry_at = 0.0  #: open: end of the pause; half-open: when the next probe may start
        self._probes = 0  #: probes so far, which numbers them
        self._probe: int | None = None  #: the one that is out
        self._probe_ends = 0.0  #: when it is given up

    def allows(self, now: float) -> Permit | None:
        """Take the right to ask the peer; None if it is to be left alone now."""
        if self.refusal_s(now) is not None:
            return None
        if not self.limits.enabled:
            return Permit(self.generation)
        if self.phase is Phase.OPEN:
            self._move(Event.COOLED)
        if self.phase is Phase.CLOSED:
            return Permit(self.generation)
        self._probes += 1
        self._probe, self._probe_ends = self._probes, now + self.limits.permit_s
        self._retry_at = now + self.limits.probe_interval_s
        return Permit(self.generation, self._probes)

    def refusal_s(self, now: float) -> float | None:
        """Return None if ``allows`` would say yes, else after how many seconds it may; takes nothing (for ranking)."""
        if self.phase is Phase.CLOSED or not self.limits.enabled:
            return None
        until = self._retry_at if self._probe is None else max(self._retry_at, self._probe_ends)
        return until - now if until > now else None

    def succeeded(self, permit: Permit, now: float) -> None:
        """The peer answered, whatever its answer was."""
        if permit.generation != self.generation:
            return
        if self.phase is Phase.CLOSED:
            self._count = 0
        elif permit.probe == self._probe:
            self._probe = None
            self._count += 1
            if self._count >= self.limits.success_threshold:
                self._relapses = 0
                self._move(Event.RECOVERED)

    def failed(self, permit: Permit, now: float) -> None:
        """The peer did not answer."""
        if permit.generation != self.generation or not self.limits.enabled:
            return
        if self.phase is Phase.CLOSED:
            self._count += 1
            if self._count >= self.limits.failure_threshold:
                self._open(Event.TRIPPED, now)
        elif permit.probe == self._probe:
            self._relapses += 1
            self._open(Event.RELAPSED, now)

    def dropped(self, permit: Permit) -> None:
        """Nothing was learned: the client left before the peer could answer. The next probe need not wait for it."""
        if permit.generation == self.generation and permit.probe == self._probe:
            self._probe = None

    def _open(self, event: Event, now: float) -> None:
        self._move(event)
        self._retry_at = now + self.limits.pause_s(self._relapses)

    def _move(self, event: Event) -> None:
        self.phase = TRANSITIONS[self.phase, event]
        self.generation += 1
        self._count = 0
        self._probe = None
        self._retry_at = 0.0


def diagram() -> str:
    """Return the table as a Mermaid state diagram."""
    rows = [f"    {phase} --> {target}: {event}" for (phase, event), target in TRANSITIONS.items()]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {Phase.CLOSED}", *rows])
