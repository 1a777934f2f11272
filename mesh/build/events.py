"""What happens to builds, as it happens, to whoever watches. Nobody who is slow holds anybody up (trap 20).

A watcher that does not keep up loses lines of the log and steps of the progress, and is told how many; never that an
attempt started, went on to the next stage or ended, which are a dozen per attempt.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Final

from mesh.build.status import BuildEvent

_DISPENSABLE: Final = frozenset({"log", "progress"})


class Events:
    """Numbers events and hands them out."""

    def __init__(self) -> None:
        self._last_id = 0
        self._subscriptions: set[Subscription] = set()

    def publish(self, kind: str, data: Mapping[str, object]) -> None:
        """Tell everybody; never waits."""
        self._last_id += 1
        event = BuildEvent(self._last_id, kind, data)
        for subscription in self._subscriptions:
            subscription.put(event)

    @property
    def watched(self) -> bool:
        return bool(self._subscriptions)

    def subscribe(self, max_events: int = 1000) -> Subscription:
        """Return the events from now on, to be iterated with ``async for`` until closed."""
        subscription = Subscription(self, max_events)
        self._subscriptions.add(subscription)
        return subscription

    def close(self) -> None:
        """End every subscription once it has been read."""
        for subscription in tuple(self._subscriptions):
            subscription.close()

    def forget(self, subscription: Subscription) -> None:
        """Hand out nothing more to *subscription*."""
        self._subscriptions.discard(subscription)


class Subscription:
    """The events for one watcher. ``dropped`` counts those that it was too slow for."""

    def __init__(self, events: Events, max_events: int) -> None:
        self._events = events
        self._lasting: deque[BuildEvent] = deque()
        self._dispensable: deque[BuildEvent] = deque()
        self._max_events = max_events
        self._wake = asyncio.Event()
        self._closed = False
        self.dropped = 0

    def put(self, event: BuildEvent) -> None:
        """Queue *event*, at the price of the oldest dispensable one."""
        if event.kind not in _DISPENSABLE:
            self._lasting.append(event)
        else:
            if len(self._dispensable) >= self._max_events:
                self._dispensable.popleft()
                self.dropped += 1
            self._dispensable.append(event)
        self._wake.set()

    def close(self) -> None:
        """End the iteration after what is queued. Idempotent."""
        self._closed = True
        self._events.forget(self)
        self._wake.set()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> BuildEvent:
        while not self._lasting and not self._dispensable:
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._next()

    def _next(self) -> BuildEvent:
        """Take the oldest of both."""
        if not self._dispensable:
            return self._lasting.popleft()
        if not self._lasting or self._dispensable[0].id < self._lasting[0].id:
            return self._dispensable.popleft()
        return self._lasting.popleft()
