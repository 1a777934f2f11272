"""What the scheduler sees and what it says: a snapshot of the node, and decisions. Values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

from mesh.core.lifecycle import State
from mesh.core.placement import Need
from mesh.core.resources import Resources

LIVE = frozenset({State.SPAWNING, State.READY})
GOING = frozenset({State.DRAINING, State.STOPPING})


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the scheduler needs to know of a profile."""

    key: str
    need: Need | None  #: what one instance takes; None = being looked up, nothing can be decided yet
    max_instances: int = 1
    min_tenure_s: float = 15.0
    idle_timeout_s: float = 300.0  #: 0 = never
    pinned: bool = False
    failing: bool = False  #: its last start failed and its back-off is not over
    vetted: bool = True  #: it started before, or its arguments were looked over; else nobody is evicted for it
    vetting: bool = False  #: they are being looked over
    turn_ended: float = -inf  #: when an instance of it last had to go for another profile
    fresh: bool = True  #: False: the need is as it was a while ago and is being looked up again before a start
    ran_out: Resources | None = None  #: where its last load ran out of memory; the next one gets all that idles there
    guessed: bool = False  #: nothing is known of its size: the need is next to nothing
    doubtful: bool = False  #: it failed again and again: it is not started without anybody asking for it
    yielding: bool = False  #: it waits until others fall idle by themselves: none is kept from new work for it


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One process, as counted by the supervisor. ``footprint`` is charged until the process has exited."""

    id: str
    key: str
    state: State
    footprint: Resources
    active: int = 0  #: requests of any kind that it holds and whose clients are there
    busy: int = 0  #: those of them that take a slot
    slots: int = 1  #: requests at once; 0 = unlimited
    ready_since: float = 0.0
    idle_since: float = 0.0  #: end of the last request, or when it became ready
    fresh: bool = False  #: nothing was admitted to it yet
    stale: bool = False  #: started from a profile that changed or is gone
    pinned: bool = False
    superseded: bool = False  #: it runs another engine than its profile would be started with now


@dataclass(frozen=True, slots=True)
class Demand:
    """The requests that wait for one profile."""

    key: str
    since: float  #: arrival of the oldest
    slotted: int = 0  #: requests that need a slot
    free: int = 0  #: requests that do not (tokenize, prewarm)
    attended: bool = True  #: False: only the successor of an instance that made room for it waits, and no client


@dataclass(frozen=True, slots=True)
class Snapshot:
    now: float
    capacity: Resources
    recipes: Mapping[str, Recipe]
    instances: Sequence[InstanceView]
    demands: Sequence[Demand]
    foreign: Resources = field(default_factory=Resources)  #: what of the capacity others use; never evictable
    replacing: frozenset[str] = frozenset()  #: profiles whose only instance made way for one with another engine
    spare_ram_mib: float = inf  #: of the machine, for second copies, if the capacity does not limit main memory

    @property
    def ceiling(self) -> Resources:
        """What may be used now: of each kind the limit, less what others take of it."""
        return Resources({kind: mib - self.foreign.mib.get(kind, 0) for kind, mib in self.capacity.mib.items()})


class Reason(StrEnum):
    PROFILE_CHANGED = "profile changed"
    IDLE = "idle"
    ROOM = "room for another model"
    ENGINE_REPLACED = "engine replaced"


class Refusal(StrEnum):
    UNKNOWN = "unknown"
    NOT_HERE = "max_instances is 0"
    TOO_LARGE = "larger than the whole budget"
    FAILING = "failing"


@dataclass(frozen=True, slots=True)
class Admit:
    """Send the first *slotted* and *free* waiting requests of the instance's profile to it."""

    instance: str
    key: str
    slotted: int
    free: int


@dataclass(frozen=True, slots=True)
class Spawn:
    key: str
    footprint: Resources  #: with the GPUs that it is to use


@dataclass(frozen=True, slots=True)
class Vet:
    """Look the arguments of *key* over: others would have to go for it."""

    key: str


@dataclass(frozen=True, slots=True)
class Forgo:
    """Wait for the successor of *key* no longer: its room is gone, and nobody asked for it."""

    key: str


@dataclass(frozen=True, slots=True)
class Drain:
    instance: str
    reason: Reason
    competitor: str | None = None  #: for whom; its own profile: for its successor, which is to be waited for


@dataclass(frozen=True, slots=True)
class Refuse:
    """Turn away every request that waits for *key*."""

    key: str
    refusal: Refusal


Decision = Admit | Spawn | Drain | Refuse | Vet | Forgo


@dataclass(frozen=True, slots=True)
class Plan:
    decisions: tuple[Decision, ...]
    held: frozenset[str]  #: instances that must get no new work until the next plan
    cramped: frozenset[str] = frozenset()  #: profiles whose engine was replaced, but whose successor has no room


@dataclass(frozen=True, slots=True)
class Outlook:
    """What would happen if somebody asked for a model now."""

    placement: Resources | None  #: where it would go; None = it is larger than the whole budget
    victims: tuple[str, ...] = ()  #: instances that would have to go
    waits: bool = False  #: some of those are busy, pinned or just loaded, or other programs use the memory
