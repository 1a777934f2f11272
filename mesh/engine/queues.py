"""Who waits: one queue per profile, first come first served, each place with its own deadline."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from mesh.core.world import Demand
from mesh.engine.lease import Waiter


@dataclass(slots=True, eq=False)
class Place:
    """One waiting request: the ``Ticket`` of the lease module."""

    key: str
    waiter: Waiter
    since: float
    needs_slot: bool
    on_cancel: Callable[[Place], None]
    deadline: float | None = None
    timer: asyncio.TimerHandle | None = None
    open: bool = True  #: until it was admitted, refused or cancelled

    def close(self) -> bool:
        """Take the place out of play; return False if it was already."""
        was, self.open = self.open, False
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        return was

    def cancel(self) -> None:
        if self.close():
            self.on_cancel(self)


class _Admitted:
    """The ticket of a request that did not have to queue: there is nothing to give up."""

    def cancel(self) -> None: ...


ADMITTED = _Admitted()


@dataclass(slots=True)
class Line:
    """The waiting requests of one profile: those that take a slot and those that do not, each in order of arrival."""

    slotted: OrderedDict[Place, None] = field(default_factory=OrderedDict)
    free: OrderedDict[Place, None] = field(default_factory=OrderedDict)

    def of(self, place: Place) -> OrderedDict[Place, None]:
        return self.slotted if place.needs_slot else self.free

    def add(self, place: Place) -> None:
        """Queue *place* by its arrival. One that is sent again after a crash is older than those behind it."""
        line = self.of(place)
        younger = list(takewhile(lambda p: p.since > place.since, reversed(line)))
        line[place] = None
        for p in reversed(younger):
            line.move_to_end(p)

    def __len__(self) -> int:
        return len(self.slotted) + len(self.free)

    def __iter__(self) -> Iterator[Place]:
        yield from self.slotted
        yield from self.free


class Queues:
    """All lines. Holds only open places; an empty line does not exist."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}  #: by profile key; read only, elsewhere
        self.total = 0

    def add(self, place: Place) -> None:
        self.lines.setdefault(place.key, Line()).add(place)
        self.total += 1

    def remove(self, place: Place) -> None:
        line = self.lines.get(place.key)
        if line is not None and place in line.of(place):
            del line.of(place)[place]
            self._shrunk(place.key, line)

    def pop(self, key: str, *, needs_slot: bool) -> Place | None:
        """Take the oldest place of its kind, or return None."""
        line = self.lines.get(key)
        if line is None or not (kind := line.slotted if needs_slot else line.free):
            return None
        place, _ = kind.popitem(last=False)
        self._shrunk(key, line)
        return place

    def pop_all(self, key: str) -> list[Place]:
        """Take every place of *key*."""
        line = self.lines.pop(key, None)
        places = list(line) if line is not None else []
        self.total -= len(places)
        return places

    def places(self) -> list[Place]:
        """Return every place; a copy."""
        return [place for line in self.lines.values() for place in line]

    @property
    def keys(self) -> list[str]:
        """The profiles that somebody waits for; a copy."""
        return list(self.lines)

    def slotted(self, key: str) -> int:
        """Return how many requests that need a slot wait for *key*."""
        return len(self.lines[key].slotted) if key in self.lines else 0

    def length(self, key: str) -> int:
        return len(self.lines[key]) if key in self.lines else 0

    def demands(self) -> list[Demand]:
        """Return what the scheduler sees of the queues."""
        return [
            Demand(key, min(next(iter(k)).since for k in (n.slotted, n.free) if k), len(n.slotted), len(n.free))
            for key, n in self.lines.items()
        ]

    def _shrunk(self, key: str, line: Line) -> None:
        self.total -= 1
        if not line:
            del self.lines[key]
