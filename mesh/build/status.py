"""What can be said of builds: frozen values for admins, metrics and the command line. Times are Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Stage(StrEnum):
    """Where an attempt is, in this order; stages may be left out."""

    WAITING = "waiting"  #: for another process that builds in the same place
    FETCHING = "fetching"  #: git fetch
    PREPARING = "preparing"  #: the sources of one commit are laid out
    CONFIGURING = "configuring"  #: cmake -S … -B …
    COMPILING = "compiling"  #: cmake --build
    TESTING = "testing"  #: the new binary loads a tiny model and answers
    COMPARING = "comparing"  #: its speed against that of the running one
    INSTALLING = "installing"  #: the symlink is put in place; instances are replaced after that


class Trigger(StrEnum):
    MANUAL = "manual"
    BOOT = "boot"
    SCHEDULED = "scheduled"


class Outcome(StrEnum):
    """How an attempt ended. Only ``INSTALLED`` changed what runs."""

    INSTALLED = "installed"
    UNCHANGED = "unchanged"  #: that commit runs already
    SKIPPED = "skipped"  #: that commit was rejected or rolled back before, and nobody asked for it by hand
    DISABLED = "disabled"  #: nothing is configured to be built
    REJECTED = "rejected"  #: it was built, and failed its test or lost too much speed
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Speed:
    """What a server did with one model, in tokens per second."""

    prefill_tps: float
    decode_tps: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The speed of a new build beside that of the running one, on one model."""

    model: str  #: "tiny model", or the profile's id
    old: Speed | None  #: None: there was none to compare with
    new: Speed


@dataclass(frozen=True, slots=True)
class Attempt:
    """One run of the pipeline, going on or ended. ``id`` grows with each; unique in this process."""

    id: int
    build: str
    trigger: Trigger
    started_at_wall: float
    stage: Stage
    done: int | None = None  #: steps of the stage, for example ninja's; None while they are not known
    total: int | None = None
    ref: str | None = None  #: branch, tag or commit that was asked for
    commit: str | None = None  #: the full hash, once it is known
    ended_at_wall: float | None = None
    outcome: Outcome | None = None
    error: str | None = None  #: one paragraph; what was done is in ``log_tail``
    exit_status: int | None = None
    log_tail: tuple[str, ...] = ()  #: at most 40 lines
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()  #: for example "the GPUs were full; tested on the CPU"


@dataclass(frozen=True, slots=True)
class BuiltVersion:
    """One build on disk."""

    directory: str
    binary: str
    commit: str  #: as long as it is known
    ref: str | None = None
    built_at_wall: float | None = None  #: None: made by llamesh, or by hand
    live: bool = False
    previous: bool = False  #: what a rollback goes back to


@dataclass(frozen=True, slots=True)
class BuildStatus:
    """One configured build."""

    name: str
    enabled: bool  #: it is made from source by this node
    repo_url: str | None
    ref: str
    binary_path: str
    live_commit: str | None = None
    versions: tuple[BuiltVersion, ...] = ()
    current: Attempt | None = None  #: what is going on
    last: Attempt | None = None  #: what ended last
    last_error: str | None = None  #: of the last attempt, None if it ended well
    last_build_at_wall: float | None = None
    held: Mapping[str, str] = field(default_factory=dict)  #: commits that are not built by themselves, and why


@dataclass(frozen=True, slots=True)
class Summary:
    """All builds together, as llamesh tells it."""

    is_building: bool = False
    last_build_error: str | None = None
    last_build_at_wall: float | None = None


@dataclass(frozen=True, slots=True)
class BuildEvent:
    """Something happened. *kind*: "snapshot", "started", "stage", "progress", "log", "ended" or "rolled_back".

    ``data`` is JSON-ready. "log" carries ``{"build", "attempt", "line"}``; "progress" ``{"build", "attempt", "stage",
    "done", "total"}``; "started", "stage" and "ended" the whole attempt under "attempt_state".
    """

    id: int
    kind: str
    data: Mapping[str, object]
