"""What happens to a version when it is done: put in force, gone back to, held back, or removed.

Everything is done under the lock of the build, in an order in which a kill between any two steps leaves a binary in
force and a way back. ``binary_path`` is what counts; the file of states follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from mesh.build import layout, state
from mesh.build.command import Command, Surroundings, run
from mesh.build.layout import Shelf
from mesh.build.spec import BuildSpec
from mesh.build.state import State
from mesh.build.status import BuiltVersion
from mesh.build.threads import settled
from mesh.core.build_policy import Hold, Installed, remembered, rollback_targets, to_prune, with_hold, without_hold
from mesh.errors import BuildError, UnknownBuildError
from mesh.logs import Log

_VERSION_LIMIT_S = 30.0

_log = Log(__name__)


def put_in_force(spec: BuildSpec, version: Installed) -> None:
    """Let ``binary_path`` lead to *version*, which nothing holds back any more. Blocks."""
    before = state.up_to_date(state.load(spec), layout.look(spec))
    _save(spec, before)  # from here on there is a way back
    layout.swap(spec, Path(version.binary))
    history = remembered((*before.history, version), version)
    _save(spec, State(history, without_hold(before.held, version.commit)))


def hold(spec: BuildSpec, commit: str, why: Hold) -> None:
    """Keep *commit* from being built by itself. Blocks."""
    known = state.load(spec)
    _save(spec, State(known.history, with_hold(known.held, commit, why)))


async def roll_back(spec: BuildSpec, around: Surroundings, say: Callable[[str], None]) -> BuiltVersion:
    """Put the version in force that ran before, hold the one that it replaces, and return it.

    Raise ``UnknownBuildError`` if there is none that still runs.
    """
    shelf, known = await settled(lambda: _before(spec))
    live = state.installed(shelf)
    reasons: list[str] = []
    for version in rollback_targets(known.history, live.binary if live else None):
        if (problem := await _problem(Path(version.binary), around, say)) is None:
            await settled(lambda version=version: _go_back(spec, known, live, version))  # type: ignore[misc]
            return _described(shelf, version)
        reasons.append(f"{version.binary}: {problem}")
    why = "; ".join(reasons) or "no other version was installed before"
    raise UnknownBuildError(f"nothing to go back to: {why}")


def prune(spec: BuildSpec, in_use: Collection[Path]) -> tuple[str, ...]:
    """Remove old builds; return what could not be removed, and why. Blocks."""
    shelf = layout.look(spec)
    kept = {str(each.path) for each in map(shelf.at, in_use) if each}
    if shelf.live is None:
        return ("old builds stay: binary_path leads to none of them",)
    doomed = to_prune(
        [each.on_disk() for each in shelf.found],
        kept={*kept, str(shelf.live.path)},
        previous=previous_directory(shelf, state.load(spec)),
        keep=spec.keep_builds,
    )
    return tuple(problem for directory in doomed if (problem := _removed(Path(directory))))


def previous_directory(shelf: Shelf, known: State) -> str | None:
    """Return the directory that a rollback would go back to, as far as can be told without running anything."""
    live = state.installed(shelf)
    targets = rollback_targets(known.history, live.binary if live else None)
    there = (shelf.at(Path(version.binary)) for version in targets if layout.is_executable(Path(version.binary)))
    return next((str(each.path) for each in there if each), None)


def taboo(shelf: Shelf, known: State, in_use: Collection[Path]) -> set[Path]:
    """Return the directories in which nothing may be compiled."""
    used = {each.path for each in map(shelf.at, in_use) if each}
    live = {shelf.live.path} if shelf.live else set()
    previous = previous_directory(shelf, known)
    return used | live | ({Path(previous)} if previous else set())


def _before(spec: BuildSpec) -> tuple[Shelf, State]:
    shelf = layout.look(spec)
    return shelf, state.up_to_date(state.load(spec), shelf)


def _go_back(spec: BuildSpec, known: State, live: Installed | None, version: Installed) -> None:
    """Hold *live* first: killed after the swap, nothing may put it in force again by itself."""
    held = known.held
    if live is not None and live.commit:
        held = with_hold(held, live.commit, Hold("rolled back"))
    _save(spec, State(known.history, held))
    layout.swap(spec, Path(version.binary))
    _save(spec, State(remembered(known.history, version), held))


def _described(shelf: Shelf, version: Installed) -> BuiltVersion:
    path = Path(version.binary)
    if (found := shelf.at(path)) is not None:
        return found.version(live=True, previous=False)
    return BuiltVersion(str(path.parent.parent), str(path), version.commit, version.ref, live=True)


async def _problem(binary: Path, around: Surroundings, say: Callable[[str], None]) -> str | None:
    """Return why *binary* cannot be gone back to; None if it runs."""
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
