"""What a supervisor is given by its node: limits, and whom to tell and to ask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from mesh.config.profile import Profile
from mesh.core.budget import BudgetLimits


class GoBack(Protocol):
    """Whoever puts engines in force."""

    def __call__(self, profile: Profile, engine: str, reason: str, *, in_force: bool) -> bool:
        """*profile*, whose old instance made room, cannot be loaded with *engine*, an identity: will it get another?

        Not *in_force*: it would be started with another one by now. Yes is a promise that
        ``Supervisor.engines_changed`` or else ``Supervisor.no_way_back`` will be called, later than this returns.
        """


class TelemetryLike(Protocol):
    """What is asked of ``mesh.engine.telemetry.Telemetry``."""

    def hurry(self) -> None: ...
    def set_busy(self, busy: bool, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """The node's limits."""

    budget: BudgetLimits = field(default_factory=BudgetLimits)
    max_total_queue: int = 0  #: waiting requests on the node; 0 = unlimited
    kill_grace_s: float = 10.0  #: from SIGTERM to SIGKILL
