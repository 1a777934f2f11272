"""One timer for the next moment at which time alone changes the plan."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Alarm:
    """Rings at the earliest moment asked for since it was last reset. Ringing early is harmless; late is not."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._at: float | None = None
        self._handle: asyncio.TimerHandle | None = None

    def at(self, when: float) -> None:
        """Ring at *when* (loop time) at the latest."""
        if self._at is None or when < self._at:
            self.reset(when)

    def reset(self, when: float | None) -> None:
        """Forget what was asked for, and ring at *when* (never, if None)."""
        if self._handle is not None:
            self._handle.cancel()
        self._at = when
        self._handle = None if when is None else self._loop.call_at(when, self._rung)

    def _rung(self) -> None:
        self._at = self._handle = None
        self._ring()
