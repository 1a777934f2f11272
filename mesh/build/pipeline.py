"""One attempt at a build: fetch, compile, test, compare, swap.

Owns the order of the steps and what a failure of each means; the lock of the build is held by the caller. Until the
swap nothing that is in use is touched, so whatever goes wrong, and whenever the node is killed, what ran before runs
on. The subtle part is what becomes of a commit that fails: see ``_judged``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from mesh.build import install, layout, state
from mesh.build.command import Surroundings
from mesh.build.compile import CompileError, StageReport, build, full_disk
from mesh.build.layout import Found, Manifest, Shelf
from mesh.build.rejected import RejectedError
from mesh.build.repository import Repository, Revision
from mesh.build.spec import BuildSpec
from mesh.build.state import State
from mesh.build.status import Comparison, Outcome, Stage
from mesh.build.threads import settled
from mesh.config.builds import DEFAULT_BUILD
from mesh.core.build_policy import Hold, Installed, hold_reason
from mesh.core.build_progress import is_transient, parse
from mesh.errors import BuildError, MeshError
from mesh.logs import Log

__all__ = ["Pipeline", "Report", "Request", "Result", "StageReport", "Tester", "Tools"]

_log = Log(__name__)


class Tester(Protocol):
    """Decides whether a finished build may come into use."""

    async def test(
        self,
        binary: Path,
        old: Path | None,
        *,
        spec: BuildSpec,
        say: Callable[[str], None],
        stage: StageReport,
    ) -> tuple[tuple[Comparison, ...], tuple[str, ...]]:
        """Try *binary*, and compare it with *old*, what ``binary_path`` leads to now (None: nothing).

        Return what was measured and what an admin should know. Raise ``RejectedError`` if it must not come into use;
        any other error leaves the commit to be tried again. Cancellation leaves no process behind.
        """
        ...


@dataclass(frozen=True, slots=True)
class Request:
    ref: str
    by_hand: bool = False  #: then what was rejected before is tried again
    force: bool = False  #: compile even what is there already


@dataclass(frozen=True, slots=True)
class Report:
    """Where an attempt says what it does. Called on the event loop."""

    stage: StageReport
    say: Callable[[str], None]
    commit: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Tools:
    tester: Tester
    on_installed: Callable[[str], None]
    in_use: Callable[[], Collection[Path]]
    around: Surroundings
    wall: Callable[[], float]
    monotonic: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Result:
    outcome: Outcome
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()


class Pipeline:
    """One attempt. Make one, ``run`` it once."""

    def __init__(self, spec: BuildSpec, request: Request, tools: Tools, report: Report) -> None:
        self._spec = spec
        self._request = request
        self._tools = tools
        self._report = report
        self._git_stage = Stage.FETCHING
        self._repository = Repository(spec, tools.around, self._on_git)

    async def run(self) -> Result:
        """Bring what the ref means now into use. Raise ``BuildError`` if that fails; nothing has changed then.

        May be cancelled at any time; once the stage is INSTALLING that comes too late.
        """
        await settled(partial(layout.check_link, self._spec))  # hours later it would be of no use to anybody
        self._report.stage(Stage.FETCHING, None, None)
        revision = await self._repository.find(self._request.ref)
        self._report.commit(revision.commit)
        shelf, known = await settled(self._look)
        usable = None if self._request.force else await self._usable(shelf, revision)
        if usable is not None and usable is shelf.live:
            adopted = "made by llamesh or by hand: with which build_args is not known; --force builds it anew"
            notes = await self._chosen_again(revision)
            return Result(Outcome.UNCHANGED, notes=notes if usable.manifest else (adopted, *notes))
        spec = self._spec
        why = hold_reason(known.held, revision.commit, spec.build_args, spec.build_command_args)
        if why is not None and not self._request.by_hand:
            text = f"{revision.short} is held back ({why}); llama-mesh rebuild {spec.name} tries it again"
            return Result(Outcome.SKIPPED, notes=(text,))
        return await self._judged(revision, shelf, known, usable.path if usable else None)

    async def _usable(self, shelf: Shelf, revision: Revision) -> Found | None:
        """Return the build of *revision* that is there already, if it still runs: a driver may have changed since."""
        found = shelf.usable(revision.commit, self._spec.build_args)
        if found is None:
            return None
        problem = await install.problem_of(found.binary, self._tools.around, self._report.say)
        if problem is None:
            return found
        self._report.say(f"{found.binary} does not run any more, so it is built anew: {problem}")
        return None

    def _on_git(self, line: str) -> None:
        if (progress := parse(line)) is not None:
            self._report.stage(self._git_stage, progress.done, progress.total)
        if not is_transient(line):
            self._report.say(line)

    def _look(self) -> tuple[Shelf, State]:
        return layout.look(self._spec), state.load(self._spec)

    async def _judged(self, revision: Revision, shelf: Shelf, known: State, directory: Path | None) -> Result:
        """Compile, test and install; remember a commit that does not compile or is rejected.

        What may be better next time (network, disk, memory) is not remembered: it is tried again.
        """
        try:
            if directory is None:
                directory = await self._make(revision, shelf, known)
            comparisons, notes = await self._tested(directory / layout.BINARY)
        except (CompileError, RejectedError) as error:
            reason = error.message.splitlines()[0][:300] if error.message else ""
            why = Hold(reason, self._spec.build_args, self._spec.build_command_args)
            await settled(partial(install.hold, self._spec, revision.commit, why))
            await self._prune_rejected()
            raise
        await settled(partial(self._note_speeds, directory, comparisons))
        more = await self._install(revision, directory)
        return Result(Outcome.INSTALLED, comparisons, (*notes, *more))

    # -- compile

    async def _make(self, revision: Revision, shelf: Shelf, known: State) -> Path:
        """Compile *revision* in a directory that nobody uses, and return it; after a failure it is gone."""
        taboo = install.taboo(shelf, known, self._tools.in_use())
        directory = layout.choose_directory(self._spec, shelf, revision.short, revision.commit, taboo)
        source = directory.with_name(directory.name + layout.SOURCE_SUFFIX)
        try:
            await self._compile(revision, directory, source)
        except BaseException as error:
            log_tail = getattr(error, "log_tail", ())
            full = await settled(partial(full_disk, directory, self._tools.around.environ(), log_tail))
            await _tidied(partial(layout.remove_build, directory))
            if isinstance(error, (BuildError, OSError)):
                raise _explained(error, directory, full=full) from error
            raise
        finally:
            await self._without(source)
        return directory

    async def _compile(self, revision: Revision, directory: Path, source: Path) -> None:
        started_at = self._tools.monotonic()
        self._git_stage = Stage.PREPARING
        self._report.stage(Stage.PREPARING, None, None)
        manifest = self._manifest(revision)
        await settled(partial(layout.begin, directory, manifest))
        await self._repository.lay_out(revision.commit, source)
        await build(self._spec, source, directory, self._tools.around, self._report.say, self._report.stage)
        took = {"built_at_wall": self._tools.wall(), "seconds": round(self._tools.monotonic() - started_at, 1)}
        await settled(partial(layout.finish, directory, msgspec.structs.replace(manifest, **took)))

    async def _without(self, source: Path) -> None:
        """Remove the sources; ``git worktree`` forgets them, too."""
        try:
            await self._repository.remove(source)
        except (BuildError, OSError) as error:
            _log.warning("sources stay until after the next build", path=str(source), error=str(error))

    def _manifest(self, revision: Revision) -> Manifest:
        spec = self._spec
        return Manifest(spec.name, revision.commit, self._request.ref, spec.build_args, spec.build_command_args)

    # -- test and install

    async def _tested(self, binary: Path) -> tuple[tuple[Comparison, ...], tuple[str, ...]]:
        self._report.stage(Stage.TESTING, None, None)
        old = await settled(partial(layout.target_of, self._spec))
        report = self._report
        return await self._tools.tester.test(binary, old, spec=self._spec, say=report.say, stage=report.stage)

    def _note_speeds(self, directory: Path, comparisons: tuple[Comparison, ...]) -> None:
        """Write the speeds down beside the build, for people; it works without."""
        found = layout.look(self._spec).at(directory / layout.BINARY)
        if found is not None and found.manifest is not None:
            try:
                layout.finish(directory, msgspec.structs.replace(found.manifest, comparisons=comparisons))
            except OSError as error:
                _log.warning("speeds were not written down", directory=str(directory), error=error.strerror)

    async def _install(self, revision: Revision, directory: Path) -> tuple[str, ...]:
        over = await self._instead_of()
        self._report.stage(Stage.INSTALLING, None, None)
        version = Installed(str(directory / layout.BINARY), revision.commit, self._request.ref)
        notes = self._chosen(await settled(partial(install.put_in_force, self._spec, version, by_hand_over=over)))
        try:
            self._tools.on_installed(self._spec.name)
            return (*notes, *await self._prune())
        except Exception:  # it is installed, whatever happens now
            _log.exception("a build was installed, but what follows that failed", build=self._spec.name)
            return (*notes, "it was installed, but what follows an installation failed; see the log")

    async def _instead_of(self) -> str | None:
        """Return the commit of the configured branch if somebody asked for another one ("": not known), else None."""
        if not self._request.by_hand or self._request.ref == self._spec.ref:
            return None
        try:
            return await self._repository.tip(self._spec.ref)
        except BuildError as error:
            self._report.say(f"what {self._spec.ref} means now is not known: {error.message}")
            return ""

    async def _chosen_again(self, revision: Revision) -> tuple[str, ...]:
        """Remember that somebody asked for what is in force already, if somebody did; return what is to be said."""
        if not self._request.by_hand:
            return ()
        over = await self._instead_of()
        held = await settled(partial(install.choose_again, self._spec, revision.commit, by_hand_over=over))
        if over == "":
            return (f"what {self._spec.ref} means now is not known; the next update may replace what runs",)
        return self._chosen(held)

    def _chosen(self, held: tuple[str, ...]) -> tuple[str, ...]:
        if not held:
            return ()
        name = "" if self._spec.name == DEFAULT_BUILD else f" {self._spec.name}"
        until = f"it stays until {self._spec.ref} moves on, or 'llama-mesh rebuild{name}' asks for that again"
        return (f"chosen by hand instead of {self._spec.ref}; {until}",)

    async def _prune_rejected(self) -> None:
        """Remove what is too much, so that one rejection after the other does not fill the disk."""
        try:
            for problem in await self._prune():
                _log.warning("an old build stays", build=self._spec.name, why=problem)
        except (MeshError, OSError) as error:
            _log.warning("old builds stay", build=self._spec.name, error=str(error))

    async def _prune(self) -> tuple[str, ...]:
        problems = await settled(partial(install.prune, self._spec, tuple(self._tools.in_use())))
        for source in (await settled(partial(layout.look, self._spec))).sources:
            await self._without(source)
        return problems


async def _tidied(job: Callable[[], None]) -> None:
    try:
        await settled(job)
    except OSError as error:
        _log.warning("what a failed build left stays; it goes after the next one", error=str(error))


def _explained(error: BuildError | OSError, directory: Path, *, full: Path | None) -> BuildError:
    """Return *error* as one of ours that says what to do; a full disk is nobody's bad commit."""
    if full is not None:
        status, tail = (error.exit_status, error.log_tail) if isinstance(error, BuildError) else (None, ())
        text = f"the disk of {directory.parent} is full: free some space, or lower keep_builds; what runs is untouched"
        if full != directory:
            helps = "free some space there, or set TMPDIR to a directory that has more"
            text = f"the disk of the temporary directory {full} is full: {helps}; what runs is untouched"
        return BuildError(text, exit_status=status, log_tail=tail)
    if isinstance(error, OSError):
        return BuildError(f"cannot build in {directory}: {error.strerror or error}")
    return error
