"""Builds of llama.cpp in a few lines: statuses and events that the test puts in, a record of what was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from mesh.build.status import (
    Attempt,
    BuildEvent,
    BuildStatus,
    BuiltVersion,
    Comparison,
    Outcome,
    Speed,
    Stage,
    Summary,
    Trigger,
)
from mesh.config.builds import DEFAULT_BUILD
from mesh.errors import BuildBusyError, MeshError, UnknownBuildError

OLD, NEW = "a1b2c3d4e5f60718293a4b5c6d7e8f9001122334", "0f1e2d3c4b5a69788796a5b4c3d2e1f001122334"
STARTED_AT = 1_700_000_100.0
COMPARISON = Comparison("tiny model", Speed(1200.0, 45.0), Speed(1320.0, 44.0))


def attempt(id: int = 1, build: str = DEFAULT_BUILD, stage: Stage = Stage.FETCHING, **changes: Any) -> Attempt:
    return replace(Attempt(id, build, Trigger.MANUAL, STARTED_AT, stage, ref="master"), **changes)


def ended(outcome: Outcome, id: int = 1, *, seconds: float = 492.0, **changes: Any) -> Attempt:
    stage = Stage.INSTALLING if outcome is Outcome.INSTALLED else Stage.COMPILING
    return attempt(id, **{"stage": stage, "ended_at_wall": STARTED_AT + seconds, "outcome": outcome, **changes})


def version(commit: str = NEW, **changes: Any) -> BuiltVersion:
    directory = f"/opt/build-{commit[:7]}"
    found = BuiltVersion(directory, f"{directory}/bin/llama-server", commit, "master", STARTED_AT)
    return replace(found, **changes)


def status(name: str = DEFAULT_BUILD, **changes: Any) -> BuildStatus:
    found = BuildStatus(
        name, True, "https://example.org/llama.cpp", "master", f"/opt/{name}/llama-server", live_commit=OLD
    )
    return replace(found, **changes)


@dataclass(eq=False)
class FakeEvents:
    """Events as they come, until closed."""

    builds: FakeBuilds
    dropped: int = 0
    queue: asyncio.Queue[BuildEvent | None] = field(default_factory=asyncio.Queue)

    async def __aiter__(self) -> AsyncIterator[BuildEvent]:
        while (event := await self.queue.get()) is not None:
            yield event

    def close(self) -> None:
        self.builds.subscriptions.discard(self)
        self.queue.put_nowait(None)


class FakeBuilds:
    """Refuses what is unknown or busy like the real one; an attempt goes on until the test ends it."""

    def __init__(self, *statuses: BuildStatus) -> None:
        self.by_name = {found.name: found for found in statuses or (status(),)}
        self.asked: list[tuple[str, str | None, bool]] = []
        self.cancelled: list[str] = []
        self.rolled_back: list[str] = []
        self.refusal: MeshError | None = None
        self.last_error: str | None = None
        self.last_at: float | None = None
        self.subscriptions: set[FakeEvents] = set()
        self.subscribed = asyncio.Event()
        self._events = 0
        self._attempts = 0

    def statuses(self) -> tuple[BuildStatus, ...]:
        return tuple(self.by_name.values())

    def summary(self) -> Summary:
        busy = any(found.current is not None for found in self.by_name.values())
        return Summary(busy, self.last_error, self.last_at)

    def rebuild(self, name: str | None, *, ref: str | None = None, force: bool = False) -> Attempt:
        self.asked.append((name or DEFAULT_BUILD, ref, force))
        found = self._named(name or DEFAULT_BUILD)
        if self.refusal is not None:
            raise self.refusal
        if found.current is not None:
            raise BuildBusyError(f"{found.name} is being built already")
        self._attempts += 1
        begun = attempt(self._attempts, found.name, ref=ref or found.ref)
        self.by_name[found.name] = replace(found, current=begun)
        return begun

    async def rollback(self, name: str) -> BuiltVersion:
        self.rolled_back.append(name)
        self._named(name)
        if self.refusal is not None:
            raise self.refusal
        return version(OLD, live=True)

    def cancel(self, name: str) -> bool:
        self.cancelled.append(name)
        return self._named(name).current is not None

    def subscribe(self) -> FakeEvents:
        subscription = FakeEvents(self)
        self.subscriptions.add(subscription)
        self.subscribed.set()
        return subscription

    def feed(self, kind: str, **data: Any) -> None:
        self._events += 1
        for subscription in tuple(self.subscriptions):
            subscription.queue.put_nowait(BuildEvent(self._events, kind, data))

    def log(self, line: str, build: str = DEFAULT_BUILD) -> None:
        self.feed("log", build=build, attempt=1, line=line)

    def change(self, kind: str, changed: Attempt) -> None:
        """Tell of *changed* as "started", "stage" or "ended", and let the status show it."""
        over = changed.outcome is not None
        self.by_name[changed.build] = replace(
            self.by_name[changed.build],
            current=None if over else changed,
            last=changed if over else self.by_name[changed.build].last,
        )
        self.feed(kind, attempt_state=msgspec.to_builtins(changed))

    def _named(self, name: str) -> BuildStatus:
        try:
            return self.by_name[name]
        except KeyError as error:
            raise UnknownBuildError(f"there is no build '{name}'; there are: {', '.join(self.by_name)}") from error
