"""What this node tells the others of itself, and the figures that it learns of its own speed.

Reads the supervisor and the cookbook; never changes anything. What is slow to find out (whether a model would fit) is
refreshed off the path of requests and remembered; what changes with every request is read when it is needed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from mesh import __version__
from mesh.api.context import NodeContext
from mesh.api.exchange import Exchange
from mesh.config.profile import Profile
from mesh.core.lifecycle import State
from mesh.core.node_state import Fit, Kind, NodeState, ProfileState
from mesh.core.speed import Speed
from mesh.core.speed import State as SpeedState
from mesh.engine import memory_report
from mesh.engine.kind import Capability
from mesh.engine.kinds import kind_of
from mesh.files import replace_file
from mesh.logs import Log

_log = Log(__name__)

#: Requests of one profile that are learned from: more of them per second say nothing new.
LEARN_EVERY_S: Final = 0.05
#: Nobody downloads a model onto a disk that is as good as full (trap 64).
LEAST_FREE_MIB: Final = 1024
_MIB: Final = 1024 * 1024
#: Where llama-server keeps what it downloads, if the variable is set; else below the home directory.
_CACHES: Final = ("LLAMA_CACHE", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
_LONGEST_DESCRIPTION: Final = 200

_FITS: Final = {
    memory_report.Fit.LOADED: Fit.NOW,
    memory_report.Fit.NOW: Fit.NOW,
    memory_report.Fit.AFTER_EVICTION: Fit.EVICT,
    memory_report.Fit.WAITS: Fit.WAIT,
    memory_report.Fit.NEVER: Fit.NEVER,
}


class OwnState:
    """See the module. Everything but ``look`` is cheap."""

    def __init__(self, ctx: NodeContext, *, boot: str, addresses: Callable[[], tuple[str, ...]]) -> None:
        self._ctx = ctx
        self._boot = boot
        self._addresses = addresses
        self._fits: dict[str, Fit] = {}
        self._speeds: dict[str, Speed] = {}
        self._learned_at: dict[str, float] = {}
        self._timed: set[str] = set()  # instances whose load was timed
        self._saved = b""
        self._save_failed = False

    # --- what others are told

    def state(self) -> NodeState:
        """Return the node's state now."""
        ctx = self._ctx
        budget = ctx.supervisor.budget()
        return NodeState(
            node_id=ctx.node_id,
            version=__version__,
            engine_version=ctx.engine_version() or "",
            addresses=self._addresses(),
            public_url=ctx.settings.public_url or "",
            started_at_unix=int(ctx.started_at_wall),
            boot=self._boot,
            ready=ctx.engine_problem() is None,
            draining=ctx.draining or ctx.drained,
            current_requests=ctx.metrics.current_requests,
            queue_length=sum(ctx.supervisor.queues().values()),
            capacity_mib=dict(budget.capacity.mib),
            used_mib=dict(budget.used.mib),
            profiles=tuple(self.profile(p) for p in ctx.supervisor.catalog.profiles if p.max_instances),
        )

    def profile(self, profile: Profile) -> ProfileState:
        """Return the state of one profile now."""
        load = self._ctx.supervisor.load(profile.key)
        learned = self.speed(profile.key).figures()
        return ProfileState(
            key=profile.key,
            id=profile.id,
            aliases=profile.aliases,
            kind=_kind(profile),
            multimodal=profile.multimodal,
            description=(profile.description or profile.model_description or "")[:_LONGEST_DESCRIPTION],
            fit=self._fits.get(profile.key, Fit.WAIT),
            ready=load.ready,
            loading=load.loading,
            slots=0 if load.unlimited else load.slots,
            busy=load.busy,
            queued=load.queued,
            load_s=_rounded(learned.load_s),
            prefill_tps=_rounded(learned.prefill_tps),
            decode_tps=_rounded(learned.decode_tps),
            service_s=_rounded(learned.service_s),
            max_instances=profile.max_instances,
            max_queue=profile.max_queue,
        )

    def active(self) -> list[ProfileState]:
        """Return the profiles that have instances or are waited for."""
        supervisor = self._ctx.supervisor
        keys = {view.key for view in supervisor.instances()} | supervisor.queues().keys()
        return [self.profile(p) for p in supervisor.catalog.profiles if p.key in keys]

    def shape(self) -> tuple[object, object]:
        """Return two values. A change of the first decides whom others ask: what is offered, loaded, draining. A change
        of the second, who is full and who is not, does so for a moment."""
        ctx = self._ctx
        views = ctx.supervisor.instances()
        states = sorted((view.id, str(view.state)) for view in views)
        offered = (ctx.draining, ctx.drained, ctx.supervisor.catalog.version, states, self._addresses())
        loads = ((key, ctx.supervisor.load(key)) for key in sorted({view.key for view in views}))
        return offered, [(key, load.has_room, bool(load.queued)) for key, load in loads]

    # --- what is looked up

    async def look(self) -> None:
        """Find out which models would fit. Looks at files, off the loop."""
        problem = self._ctx.engine_problem()
        fits = {fit.key: fit for fit in await self._ctx.supervisor.model_fits()}
        failures = self._ctx.supervisor.failures()
        for profile in self._ctx.supervisor.catalog.profiles:
            fit = fits.get(profile.key)
            failure = failures.get(profile.key)
            if problem is not None or not profile.max_instances or fit is None:
                self._fits[profile.key] = Fit.NEVER
            elif failure is not None and failure.retry_in_s:
                self._fits[profile.key] = Fit.NEVER  # until it may be tried again
            elif fit.fit is memory_report.Fit.UNKNOWN:
                self._fits[profile.key] = Fit.NOW if _obtainable(profile) else Fit.NEVER
            else:
                self._fits[profile.key] = _FITS[fit.fit]
        known = {profile.key for profile in self._ctx.supervisor.catalog.profiles}
        self._fits = {key: fit for key, fit in self._fits.items() if key in known}

    def time_loads(self, now: float) -> None:
        """Learn how long instances took to start; called often enough to see each one."""
        views = [v for v in self._ctx.supervisor.instances() if v.state is State.READY and not v.hidden]
        for view in views:
            if view.id not in self._timed and view.ready_at_wall is not None:
                self.speed(view.key).observe_load(max(1e-3, view.ready_at_wall - view.started_at_wall), now)
        self._timed = {view.id for view in views}

    # --- what is learned

    def speed(self, key: str) -> Speed:
        return self._speeds.get(key) or self._speeds.setdefault(key, Speed())

    def finished(self, exchange: Exchange, now: float, tokens: tuple[int, int]) -> None:
        """Learn from a request that an instance of this node has answered in full."""
        key = exchange.profile.key
        if now - self._learned_at.get(key, 0.0) < LEARN_EVERY_S or not exchange.watched:
            return
        self._learned_at[key] = now
        prompt, generated = tokens
        admitted = exchange.admitted_at
        first = exchange.first_byte_at
        load = self._ctx.supervisor.load(key)
        told = exchange.timings()
        self.speed(key).observe_request(
            now=now,
            prompt_tokens=prompt if told is None else told.prompt_tokens,
            processed_tokens=None if told is None else told.prompt_tokens,
            ttft_s=(None if first is None else first - admitted) if told is None else told.prompt_s,
            generated=generated if told is None else told.generated,
            decode_s=(None if first is None else now - first) if told is None else told.decode_s,
            slot_s=now - admitted,
            concurrency=1.0 + load.busy / max(1, load.ready),
            shared=1.0 + sum(view.key != key and view.active > 0 for view in self._ctx.supervisor.instances()),
        )

    def restore(self, path: Path, now: float) -> None:
        """Begin with what an earlier process learned; a bad file is a warning."""
        try:
            states = msgspec.json.decode(path.read_bytes(), type=dict[str, SpeedState])
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            _log.warning("speeds are learned anew: the file cannot be read", path=str(path), reason=str(error))
            return
        self._speeds = {key: Speed.restore(state, now) for key, state in states.items()}

    async def save(self, path: Path) -> None:
        """Keep what was learned, if it is anything new; written off the loop (trap 97)."""
        content = msgspec.json.encode({key: speed.saved() for key, speed in sorted(self._speeds.items())})
        if content == self._saved:
            return
        try:
            await asyncio.to_thread(replace_file, path, content)
        except OSError as error:
            if not self._save_failed:  # edge-triggered
                _log.warning("speeds are kept in memory only", path=str(path), reason=str(error))
            self._save_failed = True
            return
        self._saved, self._save_failed = content, False


def _kind(profile: Profile) -> Kind:
    able = kind_of(profile).capabilities(profile)
    if Capability.TEXT in able:
        return Kind.TEXT
    kinds = ((Capability.EMBEDDING, Kind.EMBEDDING), (Capability.RERANK, Kind.RERANK), (Capability.AUDIO, Kind.AUDIO))
    return next((kind for capability, kind in kinds if capability in able), Kind.TEXT)


def _rounded(figure: float | None) -> float | None:
    """Return *figure* with three digits: more would only make every record differ from the last one."""
    return None if figure is None else float(f"{figure:.3g}")


def _obtainable(profile: Profile) -> bool:
    """Whether a model whose size is not known can be had: it is on disk, or there is room to download it (trap 64)."""
    if profile.model_path is not None:
        return Path(profile.model_path).expanduser().exists()
    need_mib = max(LEAST_FREE_MIB, *profile.estimate.mib.values(), 0)
    place = next(
        (Path(path) for name in _CACHES if (path := profile.env.get(name) or os.environ.get(name))), Path.home()
    )
    while not place.exists() and place != place.parent:  # it is made with the first download
        place = place.parent
    try:
        return shutil.disk_usage(place).free // _MIB >= need_mib
    except OSError:
        return False
