"""This node's builds of llama.cpp: the build manager wired to the instances that run what it makes.

A composition root like ``app``. The manager knows nothing of models and requests, the supervisor nothing of builds:
here one learns what was installed and what still runs, lends the other's instances to a canary, and goes back to the
version before when a new one passed its tests but cannot load a model whose old instance made room for it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from mesh.api.builds import count_builds
from mesh.build.manager import BuildManager
from mesh.build.spec import specs_of
from mesh.build.status import Attempt, BuildStatus, BuiltVersion, Stage, Trigger
from mesh.build.tester import BuildTester
from mesh.config.builds import DEFAULT_BUILD
from mesh.config.engines import keys_of
from mesh.config.profile import Profile
from mesh.config.settings import Settings
from mesh.engine.children import own_env
from mesh.engine.locate import file_identity
from mesh.engine.supervisor import Supervisor
from mesh.errors import BuildError, MeshError, UnknownModelError
from mesh.host.warden import Warden
from mesh.logs import Log
from mesh.metrics import Metrics
from mesh.tasks import forever, spawn

log = Log(__name__)

#: How often binaries are looked at that somebody else may have replaced (trap 93).
LOOK_EVERY_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class TrialServer:
    """An instance lent to a canary."""

    base_url: str
    api_key: str | None = field(repr=False)


class Trials:
    """Runs profiles of the cookbook for a canary, under the node's budget like any other instance."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def runs_by_default(self, profile_name: str, build: str) -> bool:
        """Whether the usual engine of *profile_name* is the one of *build*. ``trial`` tells if there is none."""
        try:
            profile = self._supervisor.catalog.resolve(profile_name)
        except UnknownModelError:
            return True
        return (profile.engine_build or DEFAULT_BUILD) == build

    @asynccontextmanager
    async def trial(self, profile_name: str, binary: Path | None) -> AsyncIterator[TrialServer]:
        """Lend an instance of *profile_name* that runs *binary*, or with None its usual engine.

        Raise ``UnknownModelError`` if the cookbook has no such profile, or none that a llama-server runs, and what the
        queue and the load may raise.
        """
        profile = self._supervisor.catalog.resolve(profile_name)
        if not (keys := keys_of(profile.engine)).has_builds:
            raise UnknownModelError(f"{profile.id} is run by {keys.program}: no canary for a llama-server")
        async with self._supervisor.trial(profile, binary) as lease:
            endpoint = lease.endpoint
            yield TrialServer(f"http://{endpoint.host}:{endpoint.port}", endpoint.api_key)


class Builds(Protocol):
    """What ``WayBack`` asks of ``mesh.build.manager.BuildManager``."""

    def statuses(self) -> Sequence[BuildStatus]: ...
    def can_roll_back(self, name: str, /) -> bool: ...
    def cancel(self, name: str, /) -> bool: ...
    async def wait(self, attempt_id: int, /) -> Attempt: ...
    async def rollback(self, name: str, /, *, why: str) -> BuiltVersion: ...


class WayBack:
    """Puts the version before in force again, once for each installation by this process, so that nothing flaps.

    What it went back from is held by the manager. A version that was put in place by hand, or before this process
    began, is for a hand to undo. *no_way_back* is told the key of each profile for which that was tried, in the end;
    *look_again* the build whose profiles are to be started with what is in force.
    """

    def __init__(self, builds: Builds, no_way_back: Callable[[str], None], look_again: Callable[[str], None]) -> None:
        self._builds = builds
        self._no_way_back = no_way_back
        self._look_again = look_again
        #: by build, the binary that was installed since the last rollback, and its identity then: a hand may put
        #: another one in its place
        self._installed: dict[str, tuple[Path, str]] = {}
        self._under_way: dict[str, asyncio.Task[None]] = {}  #: by build

    def changed(self, name: str) -> None:
        """Another version of build *name* is in force now. Other than a rollback, an installation is an attempt's."""
        status = self._status(name)
        self._installed.pop(name, None)
        if status is not None and status.current is not None and status.current.stage is Stage.INSTALLING:
            path = Path(status.binary_path).resolve()
            self._installed[name] = (path, file_identity(path))

    def ask(self, profile: Profile, engine: str, reason: str, *, in_force: bool) -> bool:
        """Whether *profile*, which did not start, will get another one (``mesh.engine.surroundings.GoBack``)."""
        name = profile.engine_build or DEFAULT_BUILD
        if not keys_of(profile.engine).has_builds:
            return False
        if not in_force:  # installed, or rolled back, while it loaded
            asyncio.get_running_loop().call_soon(self._look_again, name)
            return True
        status, installed = self._status(name), self._installed.get(name)
        if status is None or installed is None or name in self._under_way or engine != installed[1]:
            return False
        if not self._may_go_back(status):
            return False
        going_back = self._go_back(name, installed[0], profile, reason.partition("\n")[0])
        self._under_way[name] = task = spawn(going_back, f"go back to the version before of {name}")
        task.add_done_callback(lambda _: self._ended(name, profile))  # also if it was cancelled before it began
        return True

    def _may_go_back(self, status: BuildStatus) -> bool:
        """Whether the version before can be put in force soon: nobody waits for an hour's compiling.

        While an attempt installs, what is known of the disk may be older than what it has just installed.
        """
        if (attempt := status.current) is None:
            return self._builds.can_roll_back(status.name)
        if attempt.stage is Stage.INSTALLING:
            return True
        return attempt.trigger is not Trigger.MANUAL and self._builds.cancel(status.name)  # there will be another one

    def close(self) -> None:
        """What has begun is carried out, if it can no longer be undone; else it is left."""
        for task in self._under_way.values():
            task.cancel()

    def _ended(self, name: str, profile: Profile) -> None:
        del self._under_way[name]
        self._no_way_back(profile.key)  # says nothing to who was served meanwhile

    async def _go_back(self, name: str, installed: Path, profile: Profile, reason: str) -> None:
        words = {"build": name, "binary": str(installed), "model": profile.id, "reason": reason}
        try:
            await self._free(name, installed)
            back = await self._builds.rollback(name, why=f"{profile.id} did not start with it: {reason}")
        except MeshError as error:
            log.error("a model does not start with the new llama-server, and there is no way back", **words,
                      why=error.message)  # fmt: skip
        else:
            log.error("a model did not start with the new llama-server: the version before is in force again", **words,
                      commit=back.commit, back=back.binary)  # fmt: skip

    async def _free(self, name: str, installed: Path) -> None:
        """Wait for the attempt that goes on, if any. Raise ``BuildError`` if *installed* is not to be undone then."""
        status = self._status(name)
        if status is not None and status.current is not None:
            await self._builds.wait(status.current.id)
        if (status := self._status(name)) is None or not self._builds.can_roll_back(name):
            raise BuildError("there is no version to go back to")
        if await asyncio.to_thread(Path(status.binary_path).resolve) != installed:
            raise BuildError(f"{status.binary_path} leads to another version by now")

    def _status(self, name: str) -> BuildStatus | None:
        return next((status for status in self._builds.statuses() if status.name == name), None)


class Rebuilding:
    """The builds of a node while it runs. Made on the running loop; ``start`` once, ``close`` once."""

    def __init__(
        self,
        settings: Settings,
        supervisor: Supervisor,
        metrics: Metrics,
        *,
        warden: Warden,
        installed: Callable[[], None],
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """*installed* is called, on the loop, after another binary was put in force."""
        self._supervisor = supervisor
        self._metrics = metrics
        self._installed = installed
        self.manager = BuildManager(
            specs_of(settings.build_settings()),
            tester=BuildTester(env=lambda: own_env(environ), trials=Trials(supervisor), warden=warden),
            on_installed=self._on_installed,
            in_use=self._in_use,
            environ=lambda: own_env(environ),
            warden=warden,
        )
        self._way_back = WayBack(self.manager, supervisor.no_way_back, supervisor.engines_changed)
        supervisor.go_back = self._way_back.ask
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to build what is configured, and to look for binaries that somebody else replaced."""
        self._tasks.append(spawn(count_builds(self.manager, self._metrics), "count builds"))
        self._tasks.append(spawn(forever(self._look, every_s=LOOK_EVERY_S, name="binaries"), "look at binaries"))
        self.manager.start()

    async def close(self) -> None:
        """Stop what is being built or tried out. To be called before the supervisor closes: a trial is a request."""
        for task in self._tasks:
            task.cancel()
        self._way_back.close()
        await self.manager.close()

    def _on_installed(self, name: str) -> None:
        log.info("another llama-server is in force; instances are replaced one after the other", build=name)
        self._way_back.changed(name)
        self._supervisor.engines_changed(name)
        self._installed()

    async def _look(self) -> None:
        await self._supervisor.look_at_engines()

    def _in_use(self) -> Collection[Path]:
        return {Path(view.engine_path) for view in self._supervisor.instances() if view.engine_path}
