"""One other node as this node sees it: its newest record, whether it lives, and the rules by which that changes.

    ALIVE    nothing speaks against it. It may be out of reach from here alone: that is the breaker's matter
    SUSPECT  out of reach in several tries of this node, or by somebody's word; it has time to contradict
    DEAD     by own evidence only (trap 55): several failed tries, spread over the suspicion time, and neither a newer
             record from anywhere nor any sign of life in it. A tombstone: the same record does not bring it back
    LEFT     it said goodbye. A tombstone too; only a newer record of its own undoes it

Times are on the caller's monotonic clock; nothing here is compared with another node's time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf, log2, log10

import msgspec

from mesh.core.gossip_record import Age, Record
from mesh.core.node_state import PeerKey


class Status(StrEnum):
    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"


class Change(StrEnum):
    """What happened to a member."""

    JOINED = "joined"  # unknown until now, or back after its goodbye
    UPDATED = "updated"  # a newer record
    SUSPECT = "suspect"
    ALIVE = "alive"  # suspected or dead, and it lives
    DEAD = "dead"
    LEFT = "left"
    FORGOTTEN = "forgotten"  # its tombstone expired, or it was told to be forgotten
    OWN_KEY = "own_key"  # somebody else's record under this node's own key, newer than this node's own


@dataclass(frozen=True, slots=True)
class MemberView:
    key: PeerKey
    payload: bytes
    status: Status
    incarnation: int
    version: int
    last_heard: float | None  #: own sign of life; None = known from others only
    updated_at: float  #: when its newest record came


@dataclass(frozen=True, slots=True)
class Event:
    change: Change
    record: Record
    restarted: bool = False  #: UPDATED, and the incarnation is another


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """The protocol's constants. Raising ``fanout`` costs bytes, ``suspicion`` time, ``tombstone_s`` memory."""

    interval_s: float = 5.0
    fanout: int = 2  #: exchanges begun per tick
    urgent_fanout: int = 3  #: of each round of urgent news
    urgent_rounds: int = 2
    urgent_gap_s: float = 0.075  #: at least this long between two such rounds
    urgent_burst: float = 8.0  #: so many rounds may follow each other at that gap,
    urgent_late_s: float = 0.5  #: what is not answered by then is told to others instead
    urgent_refill_s: float = 0.5  #: then one in this time: a thousand nodes that start at once are no storm
    urgent_at_once: int = 16  #: more than so many urgent records of others at a time wait for ticks
    probes: int = 3  #: own tries planned in the suspicion time; at least 2 must have failed
    suspicion_ticks: float = 2.0  #: and 0.8 more per doubling of the mesh
    tombstone_s: float = 600.0
    dead_retry_ticks: int = 6  #: a node tries one of its dead again about this often
    probes_per_tick: int = 32
    max_members: int = 20_000
    refused_s: float = 60.0  #: how long a record that may not come in is not asked for again
    catch_up_s: float = 0.1  #: before the next exchange if the last had no room for everything

    def failures(self, members: int) -> int:
        """Return how many own exchanges in a row must fail before a member is suspected.

        In a large mesh with bad links, somebody always has bad luck with somebody; a suspicion is looked into by all.
        """
        return max(3, int(log10(members + 1)) + 1)

    def suspicion_s(self, members: int) -> float:
        """Return how long a suspect may take to contradict: rumours need O(log n) ticks to it, and as many back."""
        return self.interval_s * (self.suspicion_ticks + 0.8 * log2(members + 1))


MIN_PROBES = 2
_LONGEST_AVOIDANCE_TICKS = 32


@dataclass(slots=True)
class Member:
    record: Record
    since: float  #: of the status
    updated_at: float
    status: Status = Status.ALIVE
    heard_at: float = -inf  #: last own sign of life
    failures: int = 0  #: own failed exchanges since then; in SUSPECT, those since the suspicion began
    failed_at: float = -inf  #: when the last one that counted failed
    pending: int = 0  #: exchanges that are on their way
    retry_at: float = inf  #: when to try again out of turn
    deadline: float = inf  #: of the suspicion
    own_doubt: bool = False  #: the suspicion is this node's own
    doubted: bool = False  #: somebody could not reach it: it is to be told, so that it contradicts
    refusals: int = 0  #: how often it contradicted although it could never be reached from here
    avoid_until: float = -inf  #: not picked for an exchange until then: it is out of reach from here
    _view: MemberView | None = None

    @property
    def here(self) -> bool:
        """Whether it counts as a member: in digests, in lists, as a target."""
        return self.status is Status.ALIVE or self.status is Status.SUSPECT

    @property
    def watched(self) -> bool:
        """Whether it has a time at which something is to be done about it."""
        return self.here and (self.failures > 0 or self.status is Status.SUSPECT)

    def view(self) -> MemberView:
        if self._view is None:
            heard = None if self.heard_at == -inf else self.heard_at
            age: Age = self.record.age
            self._view = MemberView(
                self.record.key, self.record.payload, self.status, *age, last_heard=heard, updated_at=self.updated_at
            )
        elif self._view.last_heard != self.heard_at and self.heard_at != -inf:
            self._view = replace(self._view, last_heard=self.heard_at)
        return self._view

    def renew(self, record: Record, now: float, tuning: Tuning) -> None:
        """Take a newer record: whatever was held against it is void.

        Who cannot reach it while others can would suspect it again at once, and it would contradict again, for ever:
        each time it is left alone for longer.
        """
        if self.status is Status.SUSPECT and self.own_doubt and self.heard_at < self.since:
            self.refusals += 1
            ticks = min(2.0**self.refusals, _LONGEST_AVOIDANCE_TICKS)
            self.avoid_until = now + ticks * tuning.interval_s
        self.record = record
        self.doubted = False
        self.updated_at = now
        self._become(Status.LEFT if record.left else Status.ALIVE, now)

    def live(self, now: float) -> None:
        """It gave a sign of life to this node."""
        self.heard_at = max(self.heard_at, now)
        self.failures = self.refusals = 0
        self.retry_at, self.avoid_until = inf, -inf
        if self.status in (Status.SUSPECT, Status.DEAD):
            self._become(Status.ALIVE, now)

    def suspect(self, now: float, suspicion_s: float, chance: float, tuning: Tuning, *, own: bool) -> None:
        self._become(Status.SUSPECT, now)
        self.own_doubt, self.doubted = own, True
        self.deadline = now + suspicion_s
        # who doubts first looks again soon, so that a mistake is over before many have heard of it
        self.retry_at = now + 0.3 * chance * tuning.interval_s if own else self._try_at(now, chance, tuning)

    def fail(self, started_at: float, now: float, chance: float, tuning: Tuning) -> None:
        """An exchange with it failed; plan the next try. Several at the same time are one piece of evidence."""
        if started_at < self.failed_at:
            return
        self.failed_at = now + 0.05 * tuning.interval_s
        self.failures += 1
        if self.status is Status.SUSPECT:
            self.retry_at = self._try_at(now, chance, tuning)
        elif self.status is Status.ALIVE:
            self.retry_at = now + tuning.interval_s * (0.2 + 0.3 * chance)

    def expired(self, now: float) -> bool:
        """Whether the suspicion is to end in death."""
        over = self.status is Status.SUSPECT and now >= self.deadline
        return over and self.failures >= MIN_PROBES and not self.pending

    def die(self, now: float) -> None:
        self._become(Status.DEAD, now)

    def _try_at(self, now: float, chance: float, tuning: Tuning) -> float:
        """Return when to try a suspect next: the tries are spread over its time, so that not all nodes come at once."""
        if self.failures >= tuning.probes:
            return self.deadline
        span = (self.deadline - self.since) / tuning.probes
        return max(self.since + span * (self.failures + 0.1 + 0.8 * chance), now + 0.1 * span)

    def _become(self, status: Status, now: float) -> None:
        self.status = status
        self.since = now
        self.failures = 0
        self.retry_at = self.deadline = inf
        self.own_doubt = False
        self._view = None
