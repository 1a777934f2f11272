"""The composition root: builds a node from its settings, starts it in order, and takes it down in order.

Start: lock the state, logs, counters, engine and supervisor, listener, watchers. Stop, at the first SIGTERM, SIGINT or
SIGHUP: close the listening socket, serve what waits and runs for at most ``shutdown_grace_period_seconds``, stop all
children in parallel, save the counters. A second signal kills the children and exits at once.
"""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import IO

import uvloop

from mesh import __version__
from mesh.api.auth import Authenticator
from mesh.api.context import NodeContext
from mesh.api.dataplane import DataPlane
from mesh.api.server import build_app
from mesh.config.loader import DEFAULT_COOKBOOK, Diagnostic, Loaded, load_catalog
from mesh.config.profile import Profile
from mesh.config.settings import Settings
from mesh.config.watch import watch_cookbook
from mesh.core.budget import BudgetLimits
from mesh.core.devices import Devices
from mesh.core.gpu_choice import named
from mesh.core.resources import RAM
from mesh.engine.footprints import FootprintBook
from mesh.engine.kinds import engines as engines_of
from mesh.engine.runner import Launcher
from mesh.engine.status import EngineStatus
from mesh.engine.supervisor import Limits, Supervisor
from mesh.engine.telemetry import Telemetry
from mesh.errors import ConfigError
from mesh.host.devices import DeviceReader
from mesh.host.memory import ram_available_mib, ram_total_mib
from mesh.host.ports import PortAllocator
from mesh.host.scratch import Scratch
from mesh.logs import Log, Logging, configure
from mesh.member import MeshMember
from mesh.metrics import Metrics
from mesh.net.listener import Listener, has_ipv6
from mesh.net.tls import ServerCertificate
from mesh.rebuilding import Rebuilding
from mesh.signals import Signals
from mesh.tasks import forever, spawn, wall_time

log = Log(__name__)

#: How long the start waits for the first look at the machine's memory.
FIRST_SAMPLE_S = 5.0
SAVE_METRICS_EVERY_S = 10.0
#: After the last answer: how long clients may take to read it.
LAST_BYTES_S = 5.0


def run(loaded: Loaded) -> int:
    """Run a node until it is told to stop; return the exit status. Raise ``ConfigError`` if it cannot start."""
    logging = configure(loaded.settings.logging)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(loaded, logging))
    finally:
        logging.close()


async def _serve(loaded: Loaded, logging: Logging) -> int:
    async with AsyncExitStack() as stack:
        node = Node(loaded, logging)
        stack.callback(node.unlock)
        await node.start()
        stop = Signals(node.kill)
        await stop.first.wait()
        await node.stop()
    return 0


class Node:
    """One running node. ``start`` once, ``stop`` once."""

    def __init__(self, loaded: Loaded, logging: Logging) -> None:
        settings = loaded.settings
        self.settings = settings
        self._loaded = loaded
        self._warnings = _unplaced(loaded.warnings)  #: those that were told
        self._logging = logging
        self._cookbook_path = loaded.cookbook_path or DEFAULT_COOKBOOK  # one that appears later is loaded too
        self._metrics_path = Path(settings.metrics_path).expanduser()
        self._lock = lock_state(self._metrics_path)
        self.metrics = Metrics(settings.node_id, wall_time())
        self.metrics.restore(self._metrics_path)
        ports = settings.llama_cpp_ports.numbers() if settings.llama_cpp_ports is not None else None
        engines = engines_of(settings)
        self._scratch = Scratch(scratch_path(settings).absolute())
        self._launcher = Launcher(engines, PortAllocator(ports), self._scratch)
        self._engine = EngineStatus(engines, lambda: {p.engine for p in self.supervisor.catalog.profiles})
        self._footprints = FootprintBook(
            engine=engines.of,
            ram_limit_mib=lambda: self.supervisor.ledger.capacity.mib.get(RAM),
            devices=lambda: self.supervisor.ledger.devices,
            path=footprints_path(settings),
            changed=lambda: self.supervisor.footprints_changed(),
        )
        self._footprints.restore()
        self.supervisor = Supervisor(
            catalog=loaded.catalog,
            launcher=self._launcher,
            limits=limits(settings),
            metrics=self.metrics,
            footprints=self._footprints,
        )
        self._devices = DeviceReader()
        self._telemetry = Telemetry(self._devices.read, self.supervisor.processes, self.supervisor.sampled)
        self.context = NodeContext(
            settings=settings,
            supervisor=self.supervisor,
            metrics=self.metrics,
            access_log=logging.access,
            authenticator=Authenticator(settings.auth),
            node_id=settings.node_id,
            started_at_wall=self.metrics.started_at_wall,
            engine_version=self._engine.version,
            engine_problem=self._engine.problem,
        )
        self.metrics.gauges = self.context.gauges
        self._rebuilding = Rebuilding(
            settings,
            self.supervisor,
            self.metrics,
            warden=self._launcher.warden,
            installed=self._engine_installed,
        )
        self.context.builds = self._rebuilding.manager
        self.plane = DataPlane(self.context, build_app(self.context))
        self._member = MeshMember(self.context, self.plane) if settings.cluster.enabled else None
        self.listener = listener(settings, self.plane, self._member)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Listen and serve. Raise ``ConfigError`` if the port is taken or a certificate cannot be used."""
        await self._look_at_the_machine()
        await asyncio.to_thread(self._scratch.clear)
        await self.listener.start()
        if self._member is not None:
            await self._member.start(self.listener.host, self.listener.port)
        self._rebuilding.start()
        self._tasks.append(spawn(forever(self._save, every_s=SAVE_METRICS_EVERY_S, name="metrics"), "metrics"))
        self._tasks.append(spawn(watch_cookbook(self._cookbook_path, self._reload), "watch cookbook"))
        host, _ = self.settings.listen
        log.info("node started", node=self.settings.node_id, version=__version__, host=host, port=self.listener.port,
                 config=_shown(self._loaded.config_path), cookbook=_shown(self._loaded.cookbook_path),
                 models=len(self.supervisor.catalog.profiles), engine=self._engine.version(),
                 engine_problem=self._engine.problem())  # fmt: skip
        if self._loaded.cookbook_path is None:
            log.warning(f"no cookbook: looked for {DEFAULT_COOKBOOK} in {Path.cwd()}; pass --cookbook")
        if (missing := self._engine.missing()) is not None:
            log.error("no model can be started: there is no engine", reason=missing.message)

    async def stop(self) -> None:
        """Drain, then stop everything; see the module docstring."""
        self.context.draining = True
        self.listener.close_listening()
        for task in self._tasks:  # but not telemetry: what is queued may still wait for memory to return
            task.cancel()
        self.plane.begin_drain()
        if self._member is not None:
            self._member.begin_drain()
        await self._rebuilding.close()
        await self.supervisor.close(self.settings.shutdown_grace_period_seconds, lambda: self.plane.busy)
        await self.listener.close()
        await self.plane.close(LAST_BYTES_S)
        if self._member is not None:
            await self._member.close()
        await self._launcher.close()
        self._sampling.cancel()
        self._telemetry.close()
        self._devices.close()
        await self._save()
        log.info("node stopped", node=self.settings.node_id)

    def kill(self) -> None:
        """Kill the children and write out the logs; the caller ends the process."""
        self.supervisor.kill_all()
        self._logging.flush(0.5)

    def unlock(self) -> None:
        self._lock.close()

    def _engine_installed(self) -> None:
        """Look what another llama-server means for the models: other figures, other flags."""
        self._footprints.survey(self.supervisor.catalog.profiles)

    async def _save(self) -> None:
        await self.metrics.save(self._metrics_path)
        await self._footprints.save()

    async def _look_at_the_machine(self) -> None:
        """Know the budget before the first request; a driver that hangs must not keep the node from starting."""
        self.supervisor.telemetry = self._telemetry
        self._sampling = spawn(self._telemetry.run(), "telemetry")
        try:
            async with asyncio.timeout(FIRST_SAMPLE_S):
                await self.supervisor.first_sample.wait()
        except TimeoutError:
            log.warning("the GPU driver does not answer; only main memory is budgeted until it does")
            self.supervisor.ledger.assume(Devices("none", (), ram_total_mib(), ram_available_mib()))
        self._footprints.survey(self.supervisor.catalog.profiles)
        devices = self.supervisor.ledger.devices
        if self.settings.max_vram_mb == "auto" and (devices is None or not devices.budgeted):
            log.warning("max_vram_mb: auto, but no GPU could be measured; GPU memory is not limited")
        if devices is not None and devices.gpus and self._engine.source() == "embedded":
            log.warning("there are GPUs, but the embedded engine is for the CPU; set llama_cpp.binary_path to use them",
                        gpus=[gpu.name for gpu in devices.gpus])  # fmt: skip
        self._warn_of_devices()

    def _warn_of_devices(self) -> None:
        """Say which GPUs the files name that this machine does not have; nothing runs on them."""
        devices = self.supervisor.ledger.devices
        gpus = devices.gpus if devices is not None else ()
        for where, name in gpu_names(self.settings, self.supervisor.catalog.profiles) if gpus else ():
            if not any(named(gpu, name) for gpu in gpus):
                there = ", ".join(f"{gpu.index} ({gpu.uuid}, {gpu.name})" for gpu in gpus)
                log.warning("there is no such GPU", key=where, named=name, there=there)

    async def _reload(self) -> None:
        """Swap the catalog if the cookbook is valid as a whole; else keep the old one and say why, once."""
        version = self.supervisor.catalog.version + 1
        try:
            catalog, warnings = await asyncio.to_thread(load_catalog, self._cookbook_path, self.settings, version)
        except ConfigError as error:
            log.error("cookbook_reload_failed; the old cookbook stays in force", cookbook=_shown(self._cookbook_path),
                      errors=str(error).splitlines())  # fmt: skip
            return
        for warning in warnings:
            if not _unplaced([warning]) <= self._warnings:
                log.warning("cookbook", warning=str(warning))
        self._warnings = _unplaced(warnings)
        self.supervisor.apply_catalog(catalog)
        self._footprints.survey(catalog.profiles)
        self._warn_of_devices()
        log.info("cookbook reloaded", cookbook=_shown(self._cookbook_path), version=version,
                 models=len(catalog.profiles))  # fmt: skip


def _shown(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _unplaced(warnings: Iterable[Diagnostic]) -> frozenset[str]:
    """Return *warnings* without their lines, which an edit above them moves."""
    return frozenset(f"{warning.path} {warning.message}".strip() for warning in warnings)


def listener(settings: Settings, plane: DataPlane, member: MeshMember | None) -> Listener:
    """Return the node's listener; raise ``ConfigError`` if a certificate cannot be used."""
    tls, (host, port) = settings.server_tls, settings.listen
    if settings.listens_for_nodes:
        host = "::" if has_ipv6() else "0.0.0.0"
    certificate = None
    if tls.enabled:
        assert tls.cert_path is not None, "the loader requires both paths"
        assert tls.key_path is not None, "the loader requires both paths"
        certificate = ServerCertificate(tls.cert_path, tls.key_path)
    return Listener(
        host,
        port,
        plane.protocol,
        detect_timeout_s=settings.http.protocol_detect_timeout_ms / 1000,
        certificate=certificate,
        allow_plain_http=tls.allow_plain_http,
        noise=None if member is None else member.accept,
        http_from_here_only=settings.listens_for_nodes,
    )


def gpu_names(settings: Settings, profiles: Iterable[Profile]) -> Iterator[tuple[str, str]]:
    """Yield the key and the name for each GPU that the files name."""
    yield from (("max_vram_mb_per_gpu", name) for name in settings.max_vram_mb_per_gpu)
    yield from ((f"devices of {profile.key}", name) for profile in profiles for name in profile.devices)


def footprints_path(settings: Settings) -> Path:
    """Return where a node with *settings* keeps what it learned of its models' memory."""
    metrics = Path(settings.metrics_path).expanduser()
    return metrics.with_name(metrics.stem + ".footprints.json")


def scratch_path(settings: Settings) -> Path:
    """Return where children of a node with *settings* get their directories."""
    metrics = Path(settings.metrics_path).expanduser()
    return metrics.with_name(metrics.stem + ".scratch")


def limits(settings: Settings) -> Limits:
    """Return the node's limits as the operator set them; ``auto`` becomes a figure once the machine was looked at."""
    budget = BudgetLimits(
        ram_mib=settings.max_sysmem_mb,
        vram_mib=settings.max_vram_mb,
        per_gpu_mib=settings.max_vram_mb_per_gpu,
        instances=settings.max_instances_per_node,
    )
    return Limits(budget, settings.max_total_queue_entries)


def lock_state(metrics_path: Path) -> IO[str]:
    """Return the lock that keeps a second node off the same state (trap 28); raise ``ConfigError`` if it is taken.

    The lock is the kernel's, so it is gone with the process however that ends; the file itself stays.
    """
    path = metrics_path.with_name(metrics_path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise ConfigError(f"metrics_path: cannot write in {path.parent}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(
            f"another llama-mesh node uses {metrics_path} already; stop it, or give this one its own metrics_path"
        ) from error
    return file
