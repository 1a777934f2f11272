"""What to build, to keep, to go back to and to try again: the decisions of the build pipeline. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

#: pauses between attempts, in seconds; llamesh's. Nobody is locked out while one passes (trap 91)
BOOT_DELAYS_S = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
SCHEDULED_DELAYS_S = (30.0, 120.0, 300.0)

#: what is remembered of the past: more than anybody goes back by hand
MAX_HISTORY = 20
MAX_HELD = 50


@dataclass(frozen=True, slots=True)
class Installed:
    """A version that ``binary_path`` led to at some time."""

    binary: str
    commit: str  #: as long as it is known; "" for a binary that is not ours
    ref: str | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """Why a commit is not built by itself. Of both arguments: only with these; None: with any.

    What was written down before there were *build_command_args* lacks them, and holds whatever they are.
    """

    reason: str
    build_args: tuple[str, ...] | None = None
    build_command_args: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A directory of this build, finished or not."""

    directory: str
    made_at: float  #: Unix seconds
    finished: bool
    held: bool = False  #: it was rejected, rolled back or replaced by hand


def to_prune(found: Collection[OnDisk], *, kept: Collection[str], previous: str | None, keep: int) -> tuple[str, ...]:
    """Return the directories to remove, oldest first.

    *kept* (the live one, those that instances run from, the one just built) stay and do not count. Of the other
    finished ones the newest *keep* stay; *previous*, which a rollback goes back to, counts as the newest of all, and
    those that are held count as the oldest: they push no good one out. Unfinished ones are of no use to anybody.
    """
    others = sorted(
        (build for build in found if build.directory not in kept),
        key=lambda build: (
            *(build.finished, build.directory == previous, not build.held),
            *(build.made_at, build.directory),
        ),
    )
    finished = sum(build.finished for build in others)
    return tuple(build.directory for build in others[: len(others) - min(keep, finished)])


def remembered(history: Sequence[Installed], live: Installed | None) -> tuple[Installed, ...]:
    """Return *history* so that it ends with *live*, whatever a killed node or a hand did to the link meanwhile.

    What came after *live* was left by a rollback and is forgotten.
    """
    if live is None:
        return tuple(history[-MAX_HISTORY:])
    at = _last_index(history, live.binary)
    kept = (*history[:at], history[at]) if at is not None else (*history, live)
    return kept[-MAX_HISTORY:]


def rollback_targets(history: Sequence[Installed], live: str | None) -> tuple[Installed, ...]:
    """Return what ran before *live* (a binary), the latest first, each once."""
    at = None if live is None else _last_index(history, live)
    before = history if at is None else history[:at]
    latest = {entry.binary: entry for entry in before}
    order = dict.fromkeys(entry.binary for entry in reversed(before))
    return tuple(latest[binary] for binary in order if binary != live)


def hold_reason(
    held: Mapping[str, Hold], commit: str, build_args: Sequence[str], build_command_args: Sequence[str] | None = None
) -> str | None:
    """Return why *commit* with these arguments is not to be built by itself; None if it is.

    *build_command_args*: None asks for whatever they are. Of a build that is not ours only the beginning of the hash is
    known.
    """
    hold = next((held[known] for known in held if known and commit.startswith(known)), None)
    if hold is None or _differ(hold.build_args, build_args) or _differ(hold.build_command_args, build_command_args):
        return None
    return hold.reason


def _differ(one: Sequence[str] | None, other: Sequence[str] | None) -> bool:
    return one is not None and other is not None and tuple(one) != tuple(other)


def with_hold(held: Mapping[str, Hold], commit: str, hold: Hold) -> dict[str, Hold]:
    """Return *held* with one more, as the newest; the oldest ones are forgotten."""
    others = {known: why for known, why in held.items() if known != commit}
    return dict([*others.items(), (commit, hold)][-MAX_HELD:])


def without_hold(held: Mapping[str, Hold], commit: str) -> dict[str, Hold]:
    """Return *held* without *commit*: somebody wanted it, and it works."""
    return {known: why for known, why in held.items() if not commit.startswith(known)}


def replaced_by_hand(live: Installed | None, branch: str, chosen: str) -> tuple[str, ...]:
    """Return the commits to hold when somebody chose the commit *chosen* instead of what *branch* means (""; unknown).

    None if they are the same: then nothing would undo the choice. Else the one that was *live*, and the branch's: it
    may have moved on already, and the choice was made instead of that.
    """
    if branch == chosen:
        return ()
    commits = dict.fromkeys((live.commit if live else "", branch))
    return tuple(commit for commit in commits if commit and not chosen.startswith(commit))


def _last_index(history: Sequence[Installed], binary: str) -> int | None:
    return next((i for i in reversed(range(len(history))) if history[i].binary == binary), None)
