"""Which instances run an engine that has been replaced since: a new build, a rollback, or a file changed by hand.

What is compared is the identity of the binary, so a link that leads elsewhere counts as well as a file that was
replaced in place (trap 93). An engine that is not there, or cannot be looked at, changes nothing: what runs, runs. So
does one that merely stands in for the configured one: it is good for a start, and no reason to stop anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from mesh.config.profile import Profile
from mesh.core.world import LIVE
from mesh.engine.instances import Instance, LauncherLike
from mesh.engine.locate import EngineBinary
from mesh.errors import MeshError
from mesh.logs import Log
from mesh.tasks import in_daemon_thread

_log = Log(__name__)

#: What would run each profile now, by its key. Those of which that cannot be told are left out.
Found = Mapping[str, EngineBinary]


def look(profiles: Iterable[Profile], launcher: LauncherLike) -> Found:
    """Return what *profiles* would be started with now. Looks at the disk, a few ``stat`` calls each."""
    found = {}
    for profile in {p.key: p for p in profiles}.values():
        try:
            engine = launcher.engine(profile)
        except MeshError:
            continue
        if engine.identity:
            found[profile.key] = engine
    return found


def would_run(launcher: LauncherLike, instance: Instance) -> bool:
    """Whether the profile of *instance* would be started with the same engine again."""
    running, found = instance.runner.engine, look([instance.profile], launcher).get(instance.profile.key)
    return running is not None and found is not None and found.identity == running.identity


def mark_superseded(instances: Iterable[Instance], found: Found) -> Iterator[tuple[Instance, EngineBinary]]:
    """Mark those whose engine is another one now, and unmark those whose engine is back.

    Yield each whose mark changed, with what would run its profile.
    """
    for instance, engine in differing(instances, found):
        instance.superseded = not instance.superseded
        what, running = (
            "the engine was replaced" if instance.superseded else "the engine is back",
            instance.runner.engine,
        )
        assert running is not None, "else it would not differ"
        _log.info(what, instance=instance.id, build=engine.build, runs=running.version or running.argv[-1],
                  now=engine.version or engine.argv[-1])  # fmt: skip
        yield instance, engine


def differing(instances: Iterable[Instance], found: Found) -> Iterator[tuple[Instance, EngineBinary]]:
    """Yield those whose mark is wrong, with what would run their profile."""
    for instance in instances:
        running, engine = instance.runner.engine, found.get(instance.profile.key)
        if instance.state not in LIVE or running is None or engine is None or not running.identity:
            continue
        stands_in = running.source == "configured" != engine.source and running.build == engine.build
        if not stands_in and instance.superseded != (engine.identity != running.identity):
            yield instance, engine


class Watch:
    """Looks for engines that somebody else replaced: they count once two looks in a row have seen the same.

    A file that is being copied, or is gone for a moment, is not to be run.
    """

    def __init__(self, launcher: LauncherLike) -> None:
        self._launcher = launcher
        self._seen: Found = {}
        self._installs = 0

    def installed(self) -> None:
        """The node has put an engine in place itself: what was seen before says nothing any more."""
        self._seen = {}
        self._installs += 1

    async def look(self, profiles: Iterable[Profile]) -> Found:
        """Return what would run *profiles*, as far as it is as it was at the last look. In a thread (trap 97)."""
        installs = self._installs
        found = await in_daemon_thread(partial(look, list(profiles), self._launcher), "look at engines")
        if installs != self._installs:
            return {}
        before, self._seen = self._seen, found
        return {k: e for k, e in found.items() if k in before and before[k].identity == e.identity}
