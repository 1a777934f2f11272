"""What happens to a version when it is done: put in force, gone back to, held back, or removed.

Everything is done under the lock of the build, in an order in which a kill between any two steps leaves a binary in
force and a way back. ``binary_path`` is what counts; the file of states follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path

from mesh.build import layout, state
from mesh.build.command import Command, Surroundings, run
from mesh.build.layout import Found, Shelf
from mesh.build.spec import BuildSpec
from mesh.build.state import State
from mesh.build.status import BuiltVersion
from mesh.build.threads import settled
from mesh.core.build_policy import (
    Hold,
    Installed,
    hold_reason,
    remembered,
    replaced_by_hand,
    rollback_targets,
    to_prune,
    with_hold,
    without_hold,
)
from mesh.errors import BuildError, UnknownBuildError
from mesh.logs import Log

_VERSION_LIMIT_S = 30.0
_BY_HAND = "replaced by hand"
#: why a version is held that somebody went back from
ROLLED_BACK = "rolled back"

_log = Log(__name__)


def put_in_force(spec: BuildSpec, version: Installed, *, by_hand_over: str | None = None) -> tuple[str, ...]:
    """Let ``binary_path`` lead to *version*, which nothing holds back any more; return the commits held for it. Blocks.

    *by_hand_over*: somebody chose *version*, and this commit is what the configured branch means (""; not known). Then
    that commit and the one that is replaced are held, so that nothing puts them in force again by itself.
    """
    shelf = layout.look(spec)
    before = state.up_to_date(state.load(spec), shelf)
    replaced = () if by_hand_over is None else replaced_by_hand(state.installed(shelf), by_hand_over, version.commit)
    held = _held_by_hand(before.held, replaced)
    _swap(spec, version, before, held)  # from here on there is a way back
    history = remembered((*before.history, version), version)
    _save(spec, State(history, without_hold(held, version.commit)))
    return replaced


def choose_again(spec: BuildSpec, commit: str, *, by_hand_over: str | None) -> tuple[str, ...]:
    """Remember that somebody chose *commit*, which is in force; return the commits that are held for it. Blocks.

    *by_hand_over* as for ``put_in_force``: nothing is put in place, but the choice is kept in the same way.
    """
    shelf, known = layout.look(spec), state.load(spec)
    replaced = () if by_hand_over is None else replaced_by_hand(state.installed(shelf), by_hand_over, commit)
    held = _held_by_hand(without_hold(known.held, commit), replaced)
    if held != dict(known.held):
        _save(spec, State(known.history, held))
    return replaced


def _held_by_hand(held: Mapping[str, Hold], commits: Iterable[str]) -> Mapping[str, Hold]:
    for commit in commits:
        held = with_hold(held, commit, Hold(_BY_HAND))
    return held


def _swap(spec: BuildSpec, to: Installed, before: State, held: Mapping[str, Hold]) -> None:
    """Remember what is *held* from now on, and put *to* in place; if that fails, all is as *before*."""
    _save(spec, State(before.history, held))
    try:
        layout.swap(spec, Path(to.binary))
    except BuildError:
        _save(spec, before)  # what ran runs on, and nothing is to be said against it
        raise


def hold(spec: BuildSpec, commit: str, why: Hold) -> None:
    """Keep *commit* from being built by itself. Blocks."""
    known = state.load(spec)
    _save(spec, State(known.history, with_hold(known.held, commit, why)))


async def roll_back(
    spec: BuildSpec,
    around: Surroundings,
    say: Callable[[str], None],
    decided: Callable[[], None] = lambda: None,
    *,
    why: str = ROLLED_BACK,
) -> BuiltVersion:
    """Put the version in force that ran before, hold the one that it replaces for *why*, and return it.

    May be cancelled until *decided* is called: nothing has changed then. Raise ``UnknownBuildError`` if there is none
    that still runs.
    """
    shelf, known = await settled(lambda: _before(spec))
    live = state.installed(shelf)
    reasons: list[str] = []
    for version in rollback_targets(known.history, live.binary if live else None):
        if (problem := await problem_of(Path(version.binary), around, say)) is None:
            decided()
            await settled(partial(_go_back, spec, known, live, version, why))
            return _described(shelf, version)
        reasons.append(f"{version.binary}: {problem}")
    tried = "; ".join(reasons) or "no other version was installed before"
    raise UnknownBuildError(f"nothing to go back to: {tried}")


def prune(spec: BuildSpec, in_use: Collection[Path]) -> tuple[str, ...]:
    """Remove old builds; return what could not be removed, and why. Blocks."""
    shelf, known = layout.look(spec), state.load(spec)
    kept = {str(each.path) for each in map(shelf.at, in_use) if each}
    builds = [each.on_disk(held=_is_held(each, known)) for each in shelf.found]
    if shelf.live is None:  # then only of what was rejected can be told that nobody misses it
        builds, unknown = [each for each in builds if each.held], len(builds)
    else:
        kept.add(str(shelf.live.path))
        unknown = 0
    doomed = to_prune(builds, kept=kept, previous=previous_directory(shelf, known), keep=spec.keep_builds)
    problems = tuple(problem for directory in doomed if (problem := _removed(Path(directory))))
    return (*problems, "old builds stay: binary_path leads to none of them") if unknown > len(builds) else problems


def can_roll_back(shelf: Shelf, known: State) -> bool:
    """Whether the live version is ours, put in force by a node, and there is one to go back to. Runs nothing.

    What a hand made, or let ``binary_path`` lead to, is for a hand to undo.
    """
    if (live := shelf.live) is None or live.manifest is None:
        return False
    if not known.history or known.history[-1].binary != str(live.binary):
        return False
    targets = rollback_targets(known.history, str(live.binary))
    return any(layout.is_executable(Path(version.binary)) for version in targets)


def previous_directory(shelf: Shelf, known: State) -> str | None:
    """Return the directory that a rollback would go back to, as far as can be told without running anything."""
    live = state.installed(shelf)
    targets = rollback_targets(known.history, live.binary if live else None)
    there = (shelf.at(Path(version.binary)) for version in targets if layout.is_executable(Path(version.binary)))
    return next((str(each.path) for each in there if each), None)


def _is_held(found: Found, known: State) -> bool:
    args = found.manifest.build_args if found.manifest else ()
    return hold_reason(known.held, found.commit, args) is not None  # compiled with whatever build_command_args


def taboo(shelf: Shelf, known: State, in_use: Collection[Path]) -> set[Path]:
    """Return the directories in which nothing may be compiled."""
    used = {each.path for each in map(shelf.at, in_use) if each}
    live = {shelf.live.path} if shelf.live else set()
    previous = previous_directory(shelf, known)
    return used | live | ({Path(previous)} if previous else set())


def _before(spec: BuildSpec) -> tuple[Shelf, State]:
    shelf = layout.look(spec)
    return shelf, state.up_to_date(state.load(spec), shelf)


def _go_back(spec: BuildSpec, known: State, live: Installed | None, version: Installed, why: str) -> None:
    """Hold *live* first: killed after the swap, nothing may put it in force again by itself."""
    held = known.held
    if live is not None and live.commit:
        held = with_hold(held, live.commit, Hold(why))
    _swap(spec, version, known, held)
    _save(spec, State(remembered(known.history, version), without_hold(held, version.commit)))


def _described(shelf: Shelf, version: Installed) -> BuiltVersion:
    path = Path(version.binary)
    if (found := shelf.at(path)) is not None:
        return found.version(live=True, previous=False)
    return BuiltVersion(str(path.parent.parent), str(path), version.commit, version.ref, live=True)


async def problem_of(binary: Path, around: Surroundings, say: Callable[[str], None]) -> str | None:
    """Return why *binary* is of no use any more; None if it runs at all."""
    if not await settled(lambda: layout.is_executable(binary)):
        return "it is gone"
    try:
        await run(Command((str(binary), "--version"), limit_s=_VERSION_LIMIT_S, nice=False), around, say)
    except BuildError as error:
        return error.message
    return None


def _removed(directory: Path) -> str | None:
    try:
        layout.remove_build(directory)
    except OSError as error:
        return f"cannot remove the old build {directory}: {error.strerror}"
    _log.info("an old build was removed", directory=str(directory))
    return None


def _save(spec: BuildSpec, known: State) -> None:
    """Write *known* down; on a full disk the swap is worth more than the memory of it."""
    try:
        state.save(spec, known)
    except OSError as error:
        path = str(state.state_path(spec))
        _log.error("a file cannot be written; a rollback may not find its way", path=path, error=error.strerror)
