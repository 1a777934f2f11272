"""Which launches are worth that others go for them: those that worked before, or whose arguments were looked over.

A profile with a typing mistake would otherwise evict idle models, fail, and do it again at the next request. So would a
model that never loads: after ``DOUBTED_AFTER`` failures in a row it has to show in free memory that it can, or to be
edited, or to wait ``DOUBT_S``.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Final

from mesh.config.profile import Profile
from mesh.core.footprint import Source
from mesh.engine.instances import LauncherLike, launch_identity
from mesh.engine.ledger import Footprints
from mesh.errors import InstanceError, MeshError
from mesh.logs import Log
from mesh.tasks import spawn

_log = Log(__name__)

DOUBTED_AFTER: Final = 2
DOUBT_S: Final = 600.0


class Trust:
    """Written by the supervisor. *done* is called on the loop with the profile and what is wrong with it, or None."""

    def __init__(
        self,
        launcher: LauncherLike,
        footprints: Footprints,
        clock: Callable[[], float],
        done: Callable[[Profile, MeshError | None], None],
    ) -> None:
        self._launcher = launcher
        self._footprints = footprints
        self._clock = clock
        self._done = done
        self._cleared: set[tuple[object, ...]] = set()
        self._failures: dict[tuple[object, ...], tuple[int, float]] = {}  #: how many in a row, and when the last one
        self._under_way: set[str] = set()
        self._engines: dict[str, str] = {}  #: what runs a profile since its engine was replaced, by key

    def passed(self, profile: Profile) -> bool:
        """Whether *profile* may cost others their place."""
        identity = self._identity(profile)
        if identity in self._cleared:
            return True
        if profile.key in self._engines:
            return False  # what is known of its memory may still be of the engine before
        known = self._footprints.peek(profile)  # learned from an instance that ran with this very binary
        return known is not None and known.source is Source.LEARNED and identity not in self._failures

    def engine_replaced(self, profile: Profile, identity: str) -> None:
        """What is known of *profile* is not known of the engine that would run it now."""
        self._engines[profile.key] = identity

    def engine_is_back(self, profile: Profile) -> None:
        """What ran it before its engine was replaced would run it now."""
        self._engines.pop(profile.key, None)

    def doubted_until(self, profile: Profile) -> float:
        """Return when ``doubtful`` ends; the past if it is not."""
        count, last_at = self._failures.get(self._identity(profile), (0, 0.0))
        return last_at + DOUBT_S if count >= DOUBTED_AFTER else -inf

    def under_way(self, profile: Profile) -> bool:
        return profile.key in self._under_way

    def begin(self, profile: Profile) -> None:
        """Look the arguments of *profile* over."""
        self._under_way.add(profile.key)
        spawn(self._vet(profile), f"vet {profile.key}")

    def accepted(self, profile: Profile) -> None:
        """There is nothing wrong with its arguments."""
        self._cleared.add(self._identity(profile))

    def proven(self, profile: Profile) -> None:
        """It became ready."""
        self.accepted(profile)
        self._failures.pop(self._identity(profile), None)

    def doubted(self, profile: Profile) -> None:
        """It failed to start."""
        identity = self._identity(profile)
        self._cleared.discard(identity)
        self._failures[identity] = (self._failures.get(identity, (0, 0.0))[0] + 1, self._clock())

    def doubtful(self, profile: Profile) -> bool:
        """Whether it failed so often that nobody goes for it any more."""
        return self._clock() < self.doubted_until(profile)

    def _identity(self, profile: Profile) -> tuple[object, ...]:
        """Name the launch; a file or an engine that was replaced makes it another one."""
        known = self._footprints.peek(profile)
        engine = self._engines.get(profile.key)
        return (*launch_identity(profile), engine, None if known is None else known.identity)

    async def _vet(self, profile: Profile) -> None:
        complaint: MeshError | None = None
        try:
            complaint = self._known_trouble(profile)
            if complaint is None and (line := await self._launcher.vet(profile)) is not None:
                complaint = InstanceError(line)
        except MeshError as error:  # it cannot even be started
            complaint = error
        except Exception:
            _log.exception("arguments could not be looked over", model=profile.id)  # the start itself will tell
        finally:
            self._under_way.discard(profile.key)
        if complaint is None:
            self.accepted(profile)
        self._done(profile, complaint)

    def _known_trouble(self, profile: Profile) -> MeshError | None:
        known = self._footprints.peek(profile)
        if known is not None and known.problem is not None:
            return InstanceError(known.problem)
        if not self.doubtful(profile):
            return None
        count, _ = self._failures[self._identity(profile)]
        return InstanceError(f"{count} times in a row; no other model is stopped for it until it was edited or has "
                             "started in free memory")  # fmt: skip
