"""Which instances run an engine that has been replaced since: a new build, a rollback, or a file changed by hand.

What is compared is the identity of the binary, so a link that leads elsewhere counts as well as a file that was
replaced in place (trap 93). An engine that is not there, or cannot be looked at, changes nothing: what runs, runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mesh.core.world import LIVE
from mesh.engine.instances import Instance, LauncherLike
from mesh.engine.locate import EngineBinary
from mesh.errors import MeshError
from mesh.logs import Log

_log = Log(__name__)


def mark_superseded(instances: Iterable[Instance], launcher: LauncherLike) -> Iterator[tuple[Instance, EngineBinary]]:
    """Mark those whose engine is another one now, and unmark those whose engine is back.

    Yield each that was marked now, with what would run its profile. Looks at the disk: a few ``stat`` calls.
    """
    for instance in instances:
        if instance.state not in LIVE or (running := instance.runner.engine) is None:
            continue
        engine = _next_engine(instance, launcher)
        if engine is None or not running.identity or instance.superseded == (engine.identity != running.identity):
            continue
        instance.superseded = not instance.superseded
        what = "the engine was replaced" if instance.superseded else "the engine is back"
        _log.info(what, instance=instance.id, build=engine.build, runs=running.version or running.argv[-1],
                  now=engine.version or engine.argv[-1])  # fmt: skip
        if instance.superseded:
            yield instance, engine


def _next_engine(instance: Instance, launcher: LauncherLike) -> EngineBinary | None:
    """Return what the instance's profile would be started with now; None if that cannot be told."""
    try:
        engine = launcher.engine(instance.profile)
    except MeshError:
        return None
    return engine if engine.identity else None
