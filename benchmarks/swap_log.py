"""What the node's own log tells of a run: the lives of its instances and the requests that they served. Reads only.

All moments are wall-clock seconds, as in the log.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

CHAT_PATH = "/v1/chat/completions"


@dataclass(slots=True)
class Life:
    """One instance. A moment that the log does not have is None."""

    instance: str
    model: str
    started_at: float
    ready_at: float | None = None
    draining_at: float | None = None  #: when it was told to end
    stopped_at: float | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """One chat request that an instance answered."""

    model: str
    instance: str
    arrived_at: float
    admitted_at: float
    ended_at: float

    @property
    def wait_s(self) -> float:
        """How long it queued, loading included."""
        return self.admitted_at - self.arrived_at

    @property
    def service_s(self) -> float:
        return self.ended_at - self.admitted_at


@dataclass(frozen=True, slots=True)
class Story:
    """Everything of a run: lives by their start, requests by their admission."""

    lives: tuple[Life, ...]
    served: tuple[Served, ...]

    def served_by(self, instance: str) -> list[Served]:
        return [request for request in self.served if request.instance == instance]

    def since(self, wall_s: float) -> Story:
        """Return what began after *wall_s*."""
        lives = tuple(life for life in self.lives if life.started_at >= wall_s)
        return Story(lives, tuple(request for request in self.served if request.arrived_at >= wall_s))


def read(lines: Iterable[str]) -> Story:
    """Read the log; lines that are none of ours are passed over."""
    lives: dict[str, Life] = {}
    served: list[Served] = []
    for at, fields in _entries(lines):
        message, instance = fields.get("message"), str(fields.get("instance"))
        if message == "instance started":
            lives[instance] = Life(instance, fields["model"], at)
        elif message == "request" and fields.get("path") == CHAT_PATH and "instance" in fields:
            served.append(_served(at, fields))
        elif (life := lives.get(instance)) is not None:
            _note(life, message, at)
    return Story(tuple(lives.values()), tuple(sorted(served, key=lambda request: request.admitted_at)))


def _entries(lines: Iterable[str]) -> Iterator[tuple[float, dict[str, Any]]]:
    for line in lines:
        try:
            entry = json.loads(line)
            yield datetime.fromisoformat(entry["timestamp"]).timestamp(), entry["fields"]
        except (ValueError, KeyError, TypeError):
            continue  # what a library printed


def _note(life: Life, message: str | None, at: float) -> None:
    if message == "instance ready":
        life.ready_at = at
    elif message == "draining":
        life.draining_at = at
    elif message == "instance stopped":
        life.stopped_at = at


def _served(at: float, fields: dict[str, Any]) -> Served:
    arrived_at = at - fields["duration_ms"] / 1000
    admitted_at = arrived_at + (fields.get("queue_ms") or 0.0) / 1000
    return Served(fields["model"], fields["instance"], arrived_at, admitted_at, at)


def swap_parts(story: Story, sent_at: float, first_token_at: float) -> dict[str, float]:
    """Return what the time between a request and its first token was spent on; empty if the log does not show it.

    *decide*: until the incumbent was told to go; *stop*: until it had exited; *start*: until its successor was started;
    *load*: until that was ready; *answer*: until the first token.
    """
    inside = [life for life in story.lives if sent_at <= life.started_at <= first_token_at]
    gone = [life for life in story.lives if sent_at <= (life.stopped_at or 0.0) <= first_token_at]
    if len(inside) != 1 or len(gone) != 1:
        return {}
    old, new = gone[0], inside[0]
    moments = (sent_at, old.draining_at, old.stopped_at, new.started_at, new.ready_at, first_token_at)
    names = ("decide", "stop", "start", "load", "answer")
    known = [moment for moment in moments if moment is not None]
    if len(known) < len(moments):
        return {}
    return {name: end - start for name, (start, end) in zip(names, pairwise(known), strict=True)}
