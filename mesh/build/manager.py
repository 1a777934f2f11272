"""Keeps the builds of a node current: at boot, on schedule, and when somebody asks.

Owns the attempts and what is shown of them; each attempt is a task (``mesh.build.running``). One attempt at a time per
build, in all processes that share its directory, and one that compiles at a time in this process. All of this runs on
the event loop; what is shown comes from memory, and the disk is looked at in threads.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Final

import msgspec

from mesh.build import install
from mesh.build.command import Surroundings
from mesh.build.events import Events, Subscription
from mesh.build.lane import Lane
from mesh.build.lock import BuildLock, holder
from mesh.build.pipeline import Request, Tester, Tools
from mesh.build.running import Running
from mesh.build.spec import BuildSpec
from mesh.build.state import lock_path
from mesh.build.status import (
    Attempt,
    BuildStatus,
    BuiltVersion,
    Outcome,
    Stage,
    Summary,
    Trigger,
)
from mesh.config.builds import DEFAULT_BUILD
from mesh.core.build_policy import BOOT_DELAYS_S, SCHEDULED_DELAYS_S
from mesh.errors import BuildBusyError, DrainingError, MeshError, UnknownBuildError
from mesh.host.warden import Warden
from mesh.logs import Log
from mesh.tasks import forever, spawn, wall_time

#: how often the disk is looked at for what others did to it
LOOK_EVERY_S: Final = 15.0
#: how long the end of everything may take: processes that must be killed, half-built directories to be removed
CLOSE_LIMIT_S: Final = 30.0
_DELAYS: Final = {Trigger.BOOT: BOOT_DELAYS_S, Trigger.SCHEDULED: SCHEDULED_DELAYS_S, Trigger.MANUAL: ()}
_MAX_REMEMBERED: Final = 100

_log = Log(__name__)


class BuildManager:
    """All builds of a node. Use ``start`` and ``close``; without ``start`` nothing happens by itself."""

    def __init__(
        self,
        specs: Sequence[BuildSpec],
        *,
        tester: Tester,
        on_installed: Callable[[str], None],
        in_use: Callable[[], Collection[Path]],
        environ: Callable[[], Mapping[str, str]] = lambda: os.environ,
        warden: Warden | None = None,
        wall: Callable[[], float] = wall_time,
    ) -> None:
        """*on_installed* is told the name of a build after another version of it was put in force.

        *in_use* are the binaries, symlinks resolved, that instances run from: their directories stay. *environ* is what
        git, cmake and the compilers get. With a *warden* they share the node's; else they have one of their own.
        """
        self._own_warden = Warden() if warden is None else None
        around = Surroundings(environ, warden or self._own_warden)
        self._tools = Tools(tester, on_installed, in_use, around, wall, time.monotonic)
        self._lanes = {spec.name: Lane(spec) for spec in specs}
        self._events = Events()
        self._ids = count(1)
        self._slot = asyncio.Lock()
        self._attempts: dict[int, tuple[Running, asyncio.Task[None]]] = {}
        self._background: list[asyncio.Task[None]] = []
        self._rollbacks: set[asyncio.Task[BuiltVersion | MeshError]] = set()
        self._undecided: set[asyncio.Task[BuiltVersion | MeshError]] = set()  #: rollbacks that have changed nothing yet
        self._closed = False

    def start(self) -> None:
        """Begin with the attempts at boot, then follow the schedules. Returns at once."""
        made = [lane for lane in self._lanes.values() if lane.spec.made]
        for lane in made:
            self._background.append(spawn(self._keep_current(lane), f"build {lane.spec.name}"))
        self._background.append(spawn(self._watch() if made else self._refresh_all(), "look at builds"))

    async def close(self) -> None:
        """Cancel everything, and return when no process, thread or task of it is left. Idempotent.

        What waits for a disk that does not answer is left alone after a while: requests are still to be finished.
        """
        self._closed = True
        for task in self._background:
            task.cancel()
        for lane in self._lanes.values():
            self.cancel(lane.spec.name)
        for rollback in self._undecided:
            rollback.cancel()
        attempts = {task for _, task in self._attempts.values()}
        if left := {*self._background, *attempts, *self._rollbacks}:
            _, stuck = await asyncio.wait(left, timeout=CLOSE_LIMIT_S)
            if stuck:
                _log.warning("builds do not end; they wait for a disk, perhaps", tasks=[t.get_name() for t in stuck])
        if self._own_warden is not None:
            await asyncio.to_thread(self._own_warden.close)
        self._events.close()

    # -- what is shown

    def statuses(self) -> tuple[BuildStatus, ...]:
        """Return all builds, as configured, from memory."""
        return tuple(lane.status() for lane in self._lanes.values())

    def summary(self) -> Summary:
        """Return all builds together, as llamesh tells it."""
        lanes = self._lanes.values()
        ended = [lane.last for lane in lanes if lane.last is not None]
        newest = max(ended, key=lambda attempt: attempt.ended_at_wall or 0.0, default=None)
        failing = [lane for lane in lanes if lane.last_error is not None]
        error = max(failing, key=lambda lane: lane.last_build_at_wall or 0.0).last_error if failing else None
        return Summary(any(lane.running for lane in lanes), error, newest.ended_at_wall if newest else None)

    def subscribe(self) -> Subscription:
        """Return what happens from now on."""
        return self._events.subscribe()

    async def wait(self, attempt_id: int) -> Attempt:
        """Return the attempt when it has ended. Raise ``UnknownBuildError`` if it is not known (any more)."""
        if (known := self._attempts.get(attempt_id)) is None:
            raise UnknownBuildError(f"there is no attempt {attempt_id}")
        running, task = known
        await asyncio.wait({task})
        return running.attempt

    # -- what can be asked for

    def rebuild(self, name: str | None, *, ref: str | None = None, force: bool = False) -> Attempt:
        """Start an attempt at build *name* (None: the default one) in the background; what it is now is returned.

        *ref* is built this once instead of what is configured. *force* compiles even what is there already. Raise
        ``BuildBusyError`` if that build is busy, here or in another process, ``UnknownBuildError`` for a wrong name.
        """
        lane = self._lane(name)
        if not lane.spec.made:
            return self._nothing_to_do(lane)
        lock = self._exclusively(lane)
        return self._begin(lane, Trigger.MANUAL, Request(ref or lane.spec.ref, by_hand=True, force=force), lock).attempt

    def can_roll_back(self, name: str | None = None) -> bool:
        """Whether what is in force was put there by a node, and there is a version to go back to; from memory.

        As of the last look at the disk: not yet of what ``on_installed`` is just being told of. That it still runs is
        found out by ``rollback`` only. Raise ``UnknownBuildError`` for a wrong name.
        """
        return self._lane(name).can_roll_back

    async def rollback(self, name: str | None = None, *, why: str = install.ROLLED_BACK) -> BuiltVersion:
        """Put the version in force that ran before, and return it; the one that it replaces is held back for *why*.

        It is carried out even if the caller is cancelled. Raise ``UnknownBuildError`` if there is nothing to go back
        to, ``BuildBusyError`` while the build is busy.
        """
        lane = self._lane(name)
        lock = self._exclusively(lane)
        going_back = self._roll_back(lane, lock, why, lambda: self._undecided.discard(task))
        task = spawn(going_back, f"roll back {lane.spec.name}")
        for tasks in (self._rollbacks, self._undecided):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        task.add_done_callback(lambda _: lock.release())  # also if it was cancelled before it began
        await asyncio.wait({task})
        if task.cancelled():
            raise DrainingError("this node is shutting down; nothing was rolled back")
        done: BuiltVersion | MeshError = task.result()
        if isinstance(done, MeshError):
            raise done
        return done

    def cancel(self, name: str | None = None) -> bool:
        """Tell the attempt at build *name* to end; False if there is none, or its result is being installed."""
        lane = self._lane(name)
        if lane.running is None or lane.running.stage is Stage.INSTALLING:
            return False
        _, task = self._attempts[lane.running.attempt.id]
        if not task.cancelling():  # a second one would cut short how it ends its processes
            task.cancel()
        return True

    # -- attempts

    def _begin(self, lane: Lane, trigger: Trigger, request: Request, lock: BuildLock | None) -> Running:
        first = Attempt(
            next(self._ids), lane.spec.name, trigger, self._tools.wall(), stage=Stage.WAITING, ref=request.ref
        )
        lane.running = running = Running(lane.spec, first, request, self._tools, self._events, lock)
        task = spawn(running.run(self._slot, lane.refresh), f"attempt {first.id} at build {lane.spec.name}")
        self._attempts[first.id] = (running, task)
        task.add_done_callback(lambda _: self._ended(lane, running))
        ended = [id for id, (_, task) in self._attempts.items() if task.done()]
        for old in ended[:-_MAX_REMEMBERED]:  # never one that goes on: it must be possible to cancel it
            del self._attempts[old]
        return running

    def _ended(self, lane: Lane, running: Running) -> None:
        lane.running = None  # before anybody is told, and asks for the next one
        running.end()
        lane.note(running.attempt)

    def _nothing_to_do(self, lane: Lane) -> Attempt:
        """Do what llamesh does where nothing is to be built: succeed, and note the time."""
        why = "llama_cpp.enabled is false" if lane.spec.repo_url else "llama_cpp.repo_url is not set"
        now = self._tools.wall()
        attempt = Attempt(next(self._ids), lane.spec.name, Trigger.MANUAL, now, stage=Stage.WAITING, ref=lane.spec.ref)
        attempt = replace(attempt, ended_at_wall=now, outcome=Outcome.DISABLED, notes=(f"nothing is built: {why}",))
        lane.note(attempt)
        data = {"build": attempt.build, "attempt": attempt.id, "attempt_state": msgspec.to_builtins(attempt)}
        self._events.publish("ended", data)
        return attempt

    async def _roll_back(
        self, lane: Lane, lock: BuildLock, why: str, decided: Callable[[], None]
    ) -> BuiltVersion | MeshError:
        try:
            version = await install.roll_back(lane.spec, self._tools.around, _log.debug, decided, why=why)
        except MeshError as error:
            return error
        finally:
            lock.release()
        await lane.refresh()
        lane.generation += 1
        try:
            self._tools.on_installed(lane.spec.name)
        except Exception:  # the link leads back already, whatever happens now
            _log.exception("a build was rolled back, but what follows that failed", build=lane.spec.name)
        self._events.publish("rolled_back", {"build": lane.spec.name, "version": msgspec.to_builtins(version)})
        return version

    def _exclusively(self, lane: Lane) -> BuildLock:
        """Return the lock of *lane*'s directory. Raise ``BuildBusyError`` if somebody is at work there."""
        if self._closed:
            raise DrainingError("this node is shutting down")
        name = lane.spec.name
        if lane.running is not None:
            cancel = "" if name == DEFAULT_BUILD else f" {name}"
            at = f"attempt {lane.running.attempt.id}, {lane.running.stage}"
            raise BuildBusyError(f"build {name} is busy ({at}); llama-mesh rebuild{cancel} --cancel ends that")
        path = lock_path(lane.spec)
        if (lock := BuildLock.take(path)) is None:
            raise BuildBusyError(f"build {name} is busy: {holder(path)} is at work in {lane.spec.build_path.parent}")
        return lock

    # -- by themselves

    async def _keep_current(self, lane: Lane) -> None:
        await self._series(lane, Trigger.BOOT)
        while lane.spec.auto_update_interval_s > 0:
            await asyncio.sleep(lane.spec.auto_update_interval_s)
            if lane.running is None:
                await self._series(lane, Trigger.SCHEDULED)

    async def _series(self, lane: Lane, trigger: Trigger) -> None:
        """Try until it works, it is of no use, or another version got in; nothing is locked in the pauses (trap 91)."""
        generation = lane.generation
        for delay_s in (0.0, *_DELAYS[trigger]):
            await asyncio.sleep(delay_s)
            while lane.running is not None:
                await self.wait(lane.running.attempt.id)
            if lane.generation != generation:
                return
            running = self._begin(lane, trigger, Request(lane.spec.ref), None)
            await self.wait(running.attempt.id)
            if not running.retry:
                return

    async def _watch(self) -> None:
        await forever(self._refresh_all, every_s=LOOK_EVERY_S, name="look at builds")

    async def _refresh_all(self) -> None:
        for lane in self._lanes.values():
            await lane.refresh()

    def _lane(self, name: str | None) -> Lane:
        lane = self._lanes.get(name or DEFAULT_BUILD)
        if lane is None:
            raise UnknownBuildError(f"there is no build {name!r}; there are: {', '.join(self._lanes)}")
        return lane
