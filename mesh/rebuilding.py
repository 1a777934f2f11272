"""This node's builds of llama.cpp: the build manager wired to the instances that run what it makes.

A composition root like ``app``. The manager knows nothing of models and requests, the supervisor nothing of builds:
here one learns what was installed and what still runs, and lends the other's instances to a canary.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mesh.api.builds import count_builds
from mesh.build.manager import BuildManager
from mesh.build.spec import specs_of
from mesh.build.tester import BuildTester
from mesh.config.builds import DEFAULT_BUILD
from mesh.config.engines import keys_of
from mesh.config.settings import Settings
from mesh.engine.children import own_env
from mesh.engine.supervisor import Supervisor
from mesh.errors import UnknownModelError
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
        await self.manager.close()

    def _on_installed(self, name: str) -> None:
        log.info("another llama-server is in force; instances are replaced one after the other", build=name)
        self._supervisor.engines_changed(name)
        self._installed()

    async def _look(self) -> None:
        await self._supervisor.look_at_engines()

    def _in_use(self) -> Collection[Path]:
        return {Path(view.engine_path) for view in self._supervisor.instances() if view.engine_path}
