"""Requests that no node can take now, one line per profile, the oldest first.

Everybody who has the model is full, or out of reach for a moment. Each round lets the oldest try again: one, and twice
as many each time that nobody was turned away since. So full nodes are asked about once a second whatever waits here, a
node that has room again is filled within a few rounds, and who came first goes first.

The line outlives its last request until a round finds it empty: one that was let go and is turned away comes back to
the same pause.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from heapq import nsmallest
from typing import Final, Protocol

FIRST_PAUSE_S: Final = 0.1
LAST_PAUSE_S: Final = 1.0
#: More than come in a pause, at any rate that a node can carry: else a line that formed once would never end.
_MOST_AT_ONCE: Final = 1024


class Waiting(Protocol):
    """A request in the line. It is out of the line when one of the two is called."""

    @property
    def place(self) -> int:
        """Who has the smaller one came first."""

    @property
    def ends_at(self) -> float:
        """When its wait is over, by the loop's clock; it is noticed with the next round."""

    def retry(self) -> None: ...
    def expired(self) -> None: ...


class WaitingLine:
    """One line. Of one event loop; *emptied* is called when nobody has waited for a round, and ends it."""

    def __init__(self, emptied: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._emptied = emptied
        self._waiting: dict[int, Waiting] = {}  #: by place
        self._timer: asyncio.TimerHandle | None = None
        self._pause_s = FIRST_PAUSE_S
        self._at_once = 0
        self._turned_away = False  # somebody came back since the last round

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, waiting: Waiting, *, again: bool) -> None:
        """Wait for the next rounds; one that was let go and turned away (*again*) has its old place."""
        self._waiting[waiting.place] = waiting
        if again:
            self._turned_away = True
        if self._timer is None:
            self._arm()

    def leave(self, waiting: Waiting) -> None:
        """Its client left. Idempotent."""
        self._waiting.pop(waiting.place, None)

    def _arm(self) -> None:
        self._timer = self._loop.call_later(self._pause_s * random.uniform(0.5, 1.0), self._round)

    def _round(self) -> None:
        self._timer = None
        if not self._waiting:
            self._emptied()
            return
        if self._turned_away:
            self._pause_s, self._at_once = min(2 * self._pause_s, LAST_PAUSE_S), 1
        else:
            self._pause_s, self._at_once = FIRST_PAUSE_S, min(max(1, 2 * self._at_once), _MOST_AT_ONCE)
        self._turned_away = False
        self._arm()  # before anybody is called: whatever goes wrong with one, the others have their round
        now = self._loop.time()
        over = sorted(place for place, waiting in self._waiting.items() if waiting.ends_at <= now)
        due = nsmallest(self._at_once + len(over), self._waiting)
        for place in over:
            if (waiting := self._waiting.pop(place, None)) is not None:
                waiting.expired()
        for place in [place for place in due if place in self._waiting][: self._at_once]:
            if (waiting := self._waiting.pop(place, None)) is not None:  # else the last one's end was its end, too
                waiting.retry()
