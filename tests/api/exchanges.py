"""A request that has just been served, as far as what is learned of it and where it goes matter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from mesh.api.exchange import Exchange
from mesh.api.routes import BY_PATH, Route
from mesh.config.profile import Profile
from tests.api.node import SMOL


@dataclass
class _Served:
    profile: Profile = SMOL
    watched: bool = True
    since: float = 100.0
    admitted_at: float = 101.0
    first_byte_at: float | None = 103.0
    bytes_in: int = 4000
    route: Route = field(default_factory=lambda: BY_PATH[b"/v1/chat/completions"][b"POST"])
    told: Any = None

    def timings(self) -> Any:
        return self.told


def served(**changes: Any) -> Exchange:
    """Return one that waited from 100 to 101, and whose first byte came at 103."""
    return cast(Exchange, _Served(**changes))
