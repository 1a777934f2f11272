"""One configured build as the manager knows it: what goes on, what ended last, and what is on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mesh.build import install, layout, state
from mesh.build.command import without_passwords
from mesh.build.spec import BuildSpec
from mesh.build.status import Attempt, BuildStatus, BuiltVersion, Outcome
from mesh.build.threads import settled
from mesh.errors import BuildError
from mesh.logs import Log

if TYPE_CHECKING:
    from mesh.build.running import Running

_log = Log(__name__)
_BAD = (Outcome.FAILED, Outcome.REJECTED, Outcome.CANCELLED)


@dataclass(frozen=True, slots=True)
class OnDiskView:
    """What a look at the disk found."""

    live_commit: str | None = None
    versions: tuple[BuiltVersion, ...] = ()
    held: dict[str, str] = field(default_factory=dict)
    can_roll_back: bool = False


class Lane:
    """Written by the manager only."""

    def __init__(self, spec: BuildSpec) -> None:
        self.spec = spec
        self.running: Running | None = None
        self.last: Attempt | None = None
        self.last_error: str | None = None
        self.generation = 0  #: grows with each version that is put in force
        self._view = OnDiskView()
        self._complaint = ""

    @property
    def last_build_at_wall(self) -> float | None:
        return self.last.ended_at_wall if self.last else None

    @property
    def can_roll_back(self) -> bool:
        """Whether the node put in force what is live, and there was something before; as of the last look."""
        return self._view.can_roll_back

    def note(self, ended: Attempt) -> None:
        """Take in how an attempt ended. What was skipped leaves the error standing that it was skipped for."""
        self.last = ended
        if ended.outcome is Outcome.INSTALLED:
            self.generation += 1
        if ended.outcome is not Outcome.SKIPPED:
            self.last_error = ended.error if ended.outcome in _BAD else None

    async def refresh(self) -> None:
        """Look at the disk, off the loop; what cannot be looked at stays as it was known."""
        try:
            self._view = await settled(lambda: _look(self.spec))
        except BuildError as error:
            if error.message != self._complaint:  # once, not every few seconds
                _log.warning("a build cannot be looked at", build=self.spec.name, error=error.message)
            self._complaint = error.message

    def status(self) -> BuildStatus:
        view = self._view
        return BuildStatus(
            name=self.spec.name,
            enabled=self.spec.made,
            repo_url=without_passwords(self.spec.repo_url) if self.spec.repo_url else None,
            ref=self.spec.ref,
            binary_path=str(self.spec.binary_path),
            live_commit=view.live_commit,
            versions=view.versions,
            current=self.running.attempt if self.running else None,
            last=self.last,
            last_error=self.last_error,
            last_build_at_wall=self.last_build_at_wall,
            held=view.held,
        )


def _look(spec: BuildSpec) -> OnDiskView:
    shelf, known = layout.look(spec), state.load(spec)
    live, previous = shelf.live, install.previous_directory(shelf, known)
    versions = tuple(
        each.version(live=each is live, previous=str(each.path) == previous)
        for each in sorted(shelf.found, key=lambda each: each.made_at, reverse=True)
        if each.finished
    )
    held = {commit: why.reason for commit, why in known.held.items()}
    return OnDiskView(live.commit if live else None, versions, held, install.can_roll_back(shelf, known))
