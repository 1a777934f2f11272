"""What every request handler of the node may use, and what it needs of the supervisor. Holds no logic but views.

The Protocols are the consumer's side of the seam to ``mesh.engine.supervisor``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mesh.config.profile import Catalog, Profile
from mesh.core.lifecycle import State
from mesh.core.resources import Resources
from mesh.engine.lease import Admission
from mesh.engine.memory_report import MemoryReport, ModelFit
from mesh.metrics import BuildGauge, Gauges

if TYPE_CHECKING:
    from mesh.api.auth import Authenticator
    from mesh.build.status import Attempt, BuildEvent, BuildStatus, BuiltVersion, Summary
    from mesh.config.settings import Settings
    from mesh.core.node_state import PeerIdentity
    from mesh.core.routing import Ranked
    from mesh.logs import AccessLog
    from mesh.metrics import Metrics
    from mesh.net.peers import Peers


class InstanceView(Protocol):
    """One instance, frozen at the moment of the question."""

    @property
    def id(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def model_id(self) -> str: ...
    @property
    def state(self) -> State: ...
    @property
    def pid(self) -> int | None: ...
    @property
    def port(self) -> int | None: ...
    @property
    def slots(self) -> int | None: ...
    @property
    def active(self) -> int: ...
    @property
    def busy(self) -> int | bool | None: ...
    @property
    def ready_at_wall(self) -> float | None: ...
    @property
    def started_at_wall(self) -> float: ...
    @property
    def last_used_s_ago(self) -> float | None: ...
    @property
    def memory(self) -> Resources: ...
    @property
    def command(self) -> tuple[str, ...]: ...
    @property
    def stale(self) -> bool: ...
    @property
    def engine_version(self) -> str | None: ...
    @property
    def engine_build(self) -> str: ...
    @property
    def engine_path(self) -> str: ...
    @property
    def superseded(self) -> bool: ...
    @property
    def hidden(self) -> bool: ...


class Budget(Protocol):
    """Memory that may be used, and that is; a kind that the capacity does not name is not limited."""

    @property
    def capacity(self) -> Resources: ...
    @property
    def used(self) -> Resources: ...


class Failure(Protocol):
    """Why a profile's last instance did not come up or died."""

    @property
    def reason(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def retry_in_s(self) -> float | None: ...
    @property
    def log_tail(self) -> Sequence[str]: ...


class ProfileLoad(Protocol):
    """How busy the instances of one profile are, together."""

    queued: int
    ready: int
    loading: int
    busy: int
    slots: int
    unlimited: bool

    @property
    def has_room(self) -> bool: ...


class LogSubscription(Protocol):
    """A live view of one ring; ``close`` ends the iteration, ``dropped`` counts the lines it was too slow for."""

    @property
    def dropped(self) -> int: ...
    def __aiter__(self) -> AsyncIterator[str]: ...
    def close(self) -> None: ...


class LogRing(Protocol):
    """The last lines of one instance's output."""

    def tail(self, count: int, /) -> list[str]: ...
    def subscribe(self) -> LogSubscription: ...


class Supervisor(Admission, Protocol):
    """What the API asks of the one owner of instances, queues and the budget."""

    @property
    def catalog(self) -> Catalog: ...
    def instances(self) -> Sequence[InstanceView]: ...
    def queues(self) -> Mapping[str, int]: ...
    def load(self, key: str) -> ProfileLoad: ...
    def budget(self) -> Budget: ...
    def memory_report(self) -> MemoryReport: ...
    async def model_fits(self) -> Sequence[ModelFit]: ...
    def failures(self) -> Mapping[str, Failure]: ...
    async def prewarm(self, profile: Profile, *, wait: bool, deadline: float | None) -> InstanceView | None: ...
    def unload(self, key: str | None) -> int: ...
    def log_ring(self, key: str) -> Sequence[tuple[str, LogRing]]: ...


class MeshView(Protocol):
    """What the API asks of this node's part in the mesh."""

    @property
    def peers(self) -> Peers: ...
    @property
    def own_fingerprint(self) -> str: ...
    @property
    def largest_message_bytes(self) -> int: ...

    def gossip(self, peer: PeerIdentity, body: bytes, /) -> bytes:
        """Answer a message of *peer*; raise ``RequestError`` if it is malformed."""

    def explain(
        self, name: str | None, *, prompt_tokens: int, max_tokens: int | None
    ) -> tuple[Profile, Sequence[Ranked]]:
        """Return the profile that *name* leads to, here or elsewhere, and who would serve it, soonest first."""

    async def call(self, node_id: str, path: str, body: Mapping[str, Any], *, timeout_s: float | None) -> Any:
        """POST *body* to another node over a link and return its JSON. Raise ``MeshError`` in its words, or ours."""


class BuildSubscription(Protocol):
    """Events from now on; ``close`` ends the iteration, ``dropped`` counts those that it was too slow for."""

    @property
    def dropped(self) -> int: ...
    def __aiter__(self) -> AsyncIterator[BuildEvent]: ...
    def close(self) -> None: ...


class BuildsView(Protocol):
    """What the API asks of the builds of llama.cpp (``mesh.build.manager``); all but ``rollback`` answer at once."""

    def statuses(self) -> Sequence[BuildStatus]: ...
    def summary(self) -> Summary: ...
    def rebuild(self, name: str | None, *, ref: str | None = None, force: bool = False) -> Attempt:
        """Start it in the background; raise ``BuildBusyError`` or ``UnknownBuildError``."""

    async def rollback(self, name: str) -> BuiltVersion:
        """Return what runs now; raise ``BuildBusyError``, ``UnknownBuildError`` or ``BuildError``."""

    def cancel(self, name: str) -> bool:
        """Tell the attempt to end; False if there is none."""

    def subscribe(self) -> BuildSubscription: ...


def _no_version() -> str | None:
    return None


def _no_problem() -> str | None:
    return None


@dataclass(slots=True)
class NodeContext:
    """The node as its handlers see it. ``draining`` is set by the app at the first signal and never unset."""

    settings: Settings
    supervisor: Supervisor
    metrics: Metrics
    access_log: AccessLog
    authenticator: Authenticator
    node_id: str
    started_at_wall: float
    draining: bool = False
    drained: bool = False  #: by an operator: the node takes no new work until it is told to
    #: the engine's version, None if not known; must be cheap, and answered from memory (trap 98)
    engine_version: Callable[[], str | None] = _no_version
    mesh: MeshView | None = None  #: set by the app, in a mesh
    #: why no instance can be started ("Binary missing"), None if one can; cheap like the version
    engine_problem: Callable[[], str | None] = _no_problem
    builds: BuildsView | None = None  #: set by the app; without it nothing is built, and asking for it changes nothing

    def gauges(self) -> Gauges:
        """Return what is true now, for metrics; call it on the event loop's thread."""
        instances = self.supervisor.instances()
        active: Counter[str] = Counter()
        for view in instances:
            if not view.hidden:
                active[view.model_id] += view.active
        ids = {profile.key: profile.id for profile in self.supervisor.catalog.profiles}
        queued: Counter[str] = Counter()
        for key, waiting in self.supervisor.queues().items():
            queued[ids.get(key, key)] += waiting
        budget, report = self.supervisor.budget(), self.supervisor.memory_report()
        return Gauges(
            instances=Counter(str(view.state) for view in instances),
            active=active,
            queued=queued,
            used=budget.used,
            capacity=budget.capacity,
            others=report.others,
            devices=report.devices,
            engine_version=self.engine_version(),
            peers=None if self.mesh is None else tuple(p.gauge() for p in self.mesh.peers.by_name().values()),
            drained=self.drained,
            **({} if self.builds is None else _build_gauges(self.builds)),
        )


def _build_gauges(builds: BuildsView) -> dict[str, Any]:
    summary = builds.summary()
    return {
        "builds": tuple(BuildGauge(s.name, s.current is not None, s.live_commit) for s in builds.statuses()),
        "is_building": summary.is_building,
        "last_build_error": summary.last_build_error,
        "last_build_at_wall": summary.last_build_at_wall,
    }
