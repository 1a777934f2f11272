"""Runners over real processes, for tests: the fake server or the embedded llama-server, and what they report."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh.config.profile import Profile
from mesh.engine import embedded
from mesh.engine.locate import EngineBinary
from mesh.engine.runner import Exited, Healthy, Host, Report, Runner, Stalled
from mesh.host.ports import PortAllocator

FAKE = EngineBinary(
    (sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "fake_llama_server.py")), None, "configured"
)
REAL = EngineBinary((sys.executable, "-I", "-S", embedded.__file__), "b11549", "embedded")


def make_profile(*args: str, model_path: str | None = "fake.gguf", **fields: Any) -> Profile:
    return Profile(key="m:default", id="m", model="m", profile="default", args=args, model_path=model_path, **fields)


class Reports:
    """What a runner reported, in order, and a way to wait for the next."""

    def __init__(self) -> None:
        self.all: list[Report] = []
        self._new: asyncio.Queue[Report] = asyncio.Queue()

    def __call__(self, report: Report) -> None:
        self.all.append(report)
        self._new.put_nowait(report)

    async def next(self) -> Report:
        return await asyncio.wait_for(self._new.get(), 20)

    async def healthy(self) -> Healthy:
        report = await self.next()
        assert isinstance(report, Healthy), report
        return report

    async def stalled(self) -> Stalled:
        report = await self.next()
        assert isinstance(report, Stalled), report
        return report

    async def exited(self) -> Exited:
        report = await self.next()
        assert isinstance(report, Exited), report
        return report


class Node:
    """Starts runners and ends them all: ``async with Node(FAKE) as node``."""

    def __init__(self, engine: EngineBinary, ports: PortAllocator | None = None) -> None:
        self.ports = ports or PortAllocator()
        self.host = Host(self.ports, lambda profile: engine)
        self.started: list[tuple[Runner, Reports]] = []

    async def __aenter__(self) -> Node:
        return self

    async def __aexit__(self, *_: object) -> None:
        for runner, reports in self.started:
            runner.kill()
            while not any(isinstance(report, Exited) for report in reports.all):
                await reports.next()
        self.host.warden.close()

    def start(self, *args: str, model_path: str | None = "fake.gguf", **fields: Any) -> tuple[Runner, Reports]:
        reports = Reports()
        profile = make_profile(*args, model_path=model_path, **fields)
        runner = Runner(f"m-{len(self.started)}", profile, reports, host=self.host)
        runner.start()
        self.started.append((runner, reports))
        return runner, reports

    async def fake_state(self, runner: Runner, path: str = "/fake/state") -> Any:
        return await self.host.prober._json(runner.endpoint, path)


async def line_of(runner: Runner, text: str) -> str:
    """Wait for a line of the child's log that contains *text*."""
    subscription = runner.ring.subscribe()
    for line in runner.ring.tail():
        if text in line:
            return line
    async with asyncio.timeout(20):
        async for line in subscription:
            if text in line:
                return line
    raise AssertionError(f"the child ended without {text!r}: {runner.ring.tail(5)}")


def faults(**switches: object) -> Mapping[str, str]:
    """Return the environment that makes the fake server misbehave."""
    return {f"FAKE_{name.upper()}": str(value) for name, value in switches.items()}
