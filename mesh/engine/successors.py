"""What comes after instances that made room for it, and the way back if it cannot be loaded.

Where a model does not fit twice, the old instance is gone before anybody knows whether the new engine can load that
model. If it cannot, the engine before is asked for (``Lives.go_back``). Until that is in force again its clients wait:
to refuse them, or to try the bad engine once more, would be of no use to anybody.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from mesh.core.exits import Cause
from mesh.core.replacing import speaks_against
from mesh.engine.instances import Instance, launch_identity
from mesh.engine.queues import Place


@dataclass(frozen=True, slots=True)
class _Expected:
    place: Place  #: keeps the successor wanted where no client waits
    before: str  #: identity of the engine that made room
    launch: tuple[object, ...]  #: what it was started from; edited since, a failure says nothing about engines


class Successors:
    """Written by the supervisor. Keys are those of profiles."""

    def __init__(self) -> None:
        self._expected: dict[str, _Expected] = {}
        self._returning: dict[str, str] = {}  #: the identity of the engine that was asked for, by key

    @property
    def keys(self) -> Set[str]:
        """Those whose old instance made room, until the new one is ready or was given up."""
        return self._expected.keys()

    @property
    def places(self) -> int:
        """How many places of the queues are taken by successors alone."""
        return sum(expected.place.open for expected in self._expected.values())

    def has_place(self, key: str) -> bool:
        return (expected := self._expected.get(key)) is not None and expected.place.open

    def expect(self, place: Place, made_room: Instance) -> None:
        """*made_room* goes, and *place* waits for what comes after it."""
        self._expected[place.key] = _Expected(place, engine_identity(made_room), launch_identity(made_room.profile))

    def give_up(self, key: str) -> None:
        """Wait no longer for the successor of *key*: it is there, or nobody wants it."""
        self._expected.pop(key).place.cancel()

    # -- the way back --------------------------------------------------------------------------------------------------

    def speaks_against_engine(self, instance: Instance, cause: Cause) -> bool:
        """Whether that the load of *instance* failed is to be laid to its engine."""
        expected = self._expected.get(instance.profile.key)
        if expected is None or expected.launch != launch_identity(instance.profile):
            return False
        return speaks_against(engine_identity(instance), expected.before, cause)

    def returns(self, key: str) -> bool:
        """Whether the engine before is being put in force again for *key*: nothing is started until then."""
        return key in self._returning

    def begin_return(self, key: str) -> None:
        self._returning[key] = self._expected[key].before

    @property
    def returning(self) -> Set[str]:
        return self._returning.keys()

    def end_return(self, key: str) -> str | None:
        """Return which engine was asked for; None if none was, or that is over already."""
        return self._returning.pop(key, None)


def engine_identity(instance: Instance) -> str:
    """Return what *instance* runs; "" if that is not known."""
    engine = instance.runner.engine
    return "" if engine is None else engine.identity
