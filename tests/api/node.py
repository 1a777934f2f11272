"""A NodeContext over the fake supervisor, as ``mesh.app`` builds it over the real one."""

from __future__ import annotations

import inspect
from typing import Any

from starlette.applications import Starlette

from mesh.api.auth import Authenticator
from mesh.api.context import NodeContext
from mesh.api.server import build_app
from mesh.config.profile import Profile
from mesh.config.settings import Settings
from mesh.logs import AccessLog
from mesh.metrics import Metrics
from tests.fakes_supervisor import FakeSupervisor

STARTED_AT = 1_700_000_000.75
SMOL = Profile(
    key="smol:default",
    id="Smol",
    model="Smol",
    profile="default",
    args=("-ngl", "0"),
    args_hash="a1",
    aliases=("gpt-4o", "Tiny"),
    description="fast",
    model_description="SmolLM2",
)
SLASHED = Profile(
    key="org/big model:long", id="org/Big Model:long", model="org/Big Model", profile="long", args=(), args_hash="b2"
)


class RecordingAccessLog(AccessLog):
    """Keeps the lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []

    def write(self, *values: Any, **fields: Any) -> None:
        bound = inspect.signature(AccessLog.write).bind(self, *values, **fields)
        self.lines.append({name: value for name, value in bound.arguments.items() if name != "self"})


class Node:
    """The context, its fakes and the app."""

    def __init__(self, *profiles: Profile, engine_problem: str | None = None, **settings: Any) -> None:
        self.settings = Settings.model_validate({"node_id": "node-a", **settings})
        self.supervisor = FakeSupervisor(*(profiles or (SMOL, SLASHED)))
        self.access_log = RecordingAccessLog()
        self.engine_problem = engine_problem
        self.ctx = NodeContext(
            settings=self.settings,
            supervisor=self.supervisor,
            metrics=Metrics("node-a", STARTED_AT),
            access_log=self.access_log,
            authenticator=Authenticator(self.settings.auth),
            node_id="node-a",
            started_at_wall=STARTED_AT,
            engine_version=lambda: "b123",
            engine_problem=lambda: self.engine_problem,
        )
        self.app: Starlette = build_app(self.ctx)


AUTH = {"enabled": True, "required_header": "X-Api-Key", "allowed_keys": ["user-key"], "admin_keys": ["admin-key"]}
