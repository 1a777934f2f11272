"""Streams what happens to builds as server-sent events: first a picture of what is, then each thing as it happens.

A viewer that does not read costs the node nothing: its subscription drops log lines and progress, and says how many
(trap 20). Everything that belongs to a viewer ends with it, whether the client leaves or the node drains.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

from starlette.types import Receive, Send

from mesh.api.context import BuildSubscription, NodeContext
from mesh.api.live_response import LiveResponse, disconnected
from mesh.build.status import BuildEvent
from mesh.tasks import spawn

_LOOK_AGAIN_S: Final = 1.0  # for the node's shutdown
#: Often enough for proxies that close what is silent, and for viewers to find out that a connection is dead.
_PING_S: Final = 15.0
_PING: Final = b": ping\n\n"

Snapshot = Callable[[], Mapping[str, Any]]


class BuildStream(LiveResponse):
    """See the module."""

    media_type = "text/event-stream"

    def __init__(self, ctx: NodeContext, build: str | None, snapshot: Snapshot, *, follow: bool) -> None:
        """*build* is the only one to tell of, None for all; without *follow* only the headers are sent."""
        super().__init__()
        self._ctx = ctx
        self._build = build
        self._snapshot = snapshot
        self._follow = follow

    async def body_to(self, receive: Receive, send: Send) -> None:
        if self._follow:
            await self._stream(receive, send)
        else:
            await send({"type": "http.response.body", "body": b""})

    async def _stream(self, receive: Receive, send: Send) -> None:
        """Send events until the client leaves, the node drains or there is nothing to come.

        Between ``subscribe`` and the snapshot nothing else runs, so nothing is lost in between.
        """
        subscription = None if self._ctx.builds is None else self._ctx.builds.subscribe()
        text = _event("snapshot", self._snapshot())
        gone = spawn(disconnected(receive), "build events: watch client")
        source = _Source(subscription)
        try:
            await _send(send, text)
            while not (gone.done() or self._ctx.draining or source.ended):
                await _send(send, await self._next(source, gone))
            if not gone.done():
                await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            await asyncio.gather(gone, source.close(), return_exceptions=True)

    async def _next(self, source: _Source, gone: asyncio.Task[None]) -> bytes:
        """Return what there is to send now: an event, a ping, or nothing after a second without either."""
        event = await source.next(gone)
        text = b"" if (missed := source.missed()) == 0 else _event("dropped", {"count": missed})
        if event is not None and self._build in (None, build_of(event)):
            text += _event(event.kind, event.data, event.id)
        if text:
            source.spoke()
        elif source.silent_for(_PING_S):
            source.spoke()
            text = _PING
        return text


class _Source:
    """The subscription, read by one task at a time, and how long ago anything was sent."""

    def __init__(self, subscription: BuildSubscription | None) -> None:
        self._subscription = subscription
        self._events: AsyncIterator[BuildEvent] = _never() if subscription is None else aiter(subscription)
        self._reading: asyncio.Task[BuildEvent | None] | None = None
        self._told = 0
        self._loop = asyncio.get_running_loop()
        self._spoke_at = self._loop.time()
        self.ended = False

    async def next(self, gone: asyncio.Task[None]) -> BuildEvent | None:
        """Return the next event; None after a second without one, when the client is gone or all is over."""
        if self._reading is None:
            self._reading = spawn(self._read(), "build events: next")
        reading = self._reading
        await asyncio.wait((reading, gone), timeout=_LOOK_AGAIN_S, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            return None
        self._reading = None
        event = reading.result()
        self.ended = event is None
        return event

    async def _read(self) -> BuildEvent | None:
        return await anext(self._events, None)

    def missed(self) -> int:
        """Return how many events were dropped since the last time."""
        dropped = 0 if self._subscription is None else self._subscription.dropped
        missed, self._told = dropped - self._told, dropped
        return missed

    def spoke(self) -> None:
        self._spoke_at = self._loop.time()

    def silent_for(self, seconds: float) -> bool:
        return self._loop.time() - self._spoke_at >= seconds

    async def close(self) -> None:
        if self._subscription is not None:
            self._subscription.close()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)


async def _never() -> AsyncIterator[BuildEvent]:
    await asyncio.Event().wait()
    raise AssertionError("nothing sets it")
    yield  # what makes it a generator


def build_of(event: BuildEvent) -> object:
    """Return the name of the build that *event* is about."""
    attempt = event.data.get("attempt_state")
    return attempt.get("build") if isinstance(attempt, Mapping) else event.data.get("build")


def _event(kind: str, data: Mapping[str, Any], number: int | None = None) -> bytes:
    """Return one event. ASCII only: whatever bytes a compiler printed, a line of them is no error (trap 7)."""
    head = f"event: {kind}\n" if number is None else f"id: {number}\nevent: {kind}\n"
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


async def _send(send: Send, text: bytes) -> None:
    if text:
        await send({"type": "http.response.body", "body": text, "more_body": True})
