"""Streams the output of a model's instances as text, like ``tail -f``, also across restarts of the instance.

Where nothing runs, it says why: the last failure, with the last lines of the instance that failed.

A viewer that does not read costs the node nothing: its subscription drops lines (trap 20), and everything that belongs
to a viewer ends with it, whether the client leaves, the node drains or the task is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from starlette.types import Receive, Send

from mesh.api.context import LogRing, LogSubscription, NodeContext
from mesh.api.live_response import LiveResponse, disconnected
from mesh.tasks import spawn

_LOOK_AGAIN_S: Final = 1.0  # for instances that started since, and for the node's shutdown
_MAX_LINES_AHEAD: Final = 256  # beyond it the subscription's own bounded queue fills, and drops


class LogStream(LiveResponse):
    """See the module."""

    media_type = "text/plain"

    def __init__(self, ctx: NodeContext, key: str, *, tail: int, follow: bool) -> None:
        super().__init__()
        self._ctx = ctx
        self._key = key
        self._tail = tail
        self._follow = follow

    async def body_to(self, receive: Receive, send: Send) -> None:
        if self._follow:
            await self._stream(receive, send)
        else:
            rings = self._rings()
            text = "".join(_block(name, ring.tail(self._tail), len(rings) > 1) for name, ring in rings)
            text = text if rings else self._last_words()
            await send({"type": "http.response.body", "body": text.encode("utf-8", "replace")})

    def _rings(self) -> Sequence[tuple[str, LogRing]]:
        return self._ctx.supervisor.log_ring(self._key)

    def _last_words(self) -> str:
        """Return what is known of a model of which nothing runs."""
        failure = self._ctx.supervisor.failures().get(self._key)
        if failure is None:
            return "nothing runs and nothing failed\n"
        tail = list(failure.log_tail)[-self._tail :] if self._tail else []
        return _block("", [*tail, f"not running; last failure: {failure.reason}"], False)

    async def _stream(self, receive: Receive, send: Send) -> None:
        """Send lines until the client leaves or the node drains."""
        followers = _Followers()
        gone = spawn(disconnected(receive), f"logs {self._key}: watch client")
        try:
            if not self._rings():
                await _send_text(send, self._last_words())
            while not (gone.done() or self._ctx.draining):
                followers.follow(self._rings(), self._tail)
                await _send_text(send, await followers.lines(gone))
            if not gone.done():
                await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            await asyncio.gather(gone, followers.close(), return_exceptions=True)


class _Followers:
    """One task per instance, all feeding one bounded queue."""

    def __init__(self) -> None:
        self._lines: asyncio.Queue[tuple[str, str]] = asyncio.Queue(_MAX_LINES_AHEAD)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._subscriptions: list[LogSubscription] = []
        self._shown = ""  # the instance whose lines came last
        self._backlog: list[str] = []

    def follow(self, rings: Sequence[tuple[str, LogRing]], tail: int) -> None:
        """Add the rings that are new, each with its last lines first.

        Between ``subscribe`` and ``tail`` nothing else runs, so no line is lost or doubled.
        """
        for name, ring in rings:
            if name in self._tasks:
                continue
            subscription = ring.subscribe()
            self._subscriptions.append(subscription)
            self._backlog.append(_block(name, ring.tail(tail), bool(self._tasks) or len(rings) > 1))
            self._shown = name
            self._tasks[name] = spawn(self._pump(name, subscription), f"logs {name}")

    async def _pump(self, name: str, subscription: LogSubscription) -> None:
        told = 0
        async for line in subscription:
            if subscription.dropped > told:
                await self._lines.put(
                    (name, f"[... {subscription.dropped - told} lines dropped: the viewer is too slow]")
                )
                told = subscription.dropped
            await self._lines.put((name, line))

    async def lines(self, gone: asyncio.Task[None]) -> str:
        """Return the next lines as text; empty after a second without any, or when the client is gone."""
        if self._backlog:
            text = "".join(self._backlog)
            self._backlog.clear()
            return text
        waiting = spawn(self._first(), "logs: next line")
        try:
            await asyncio.wait((waiting, gone), timeout=_LOOK_AGAIN_S, return_when=asyncio.FIRST_COMPLETED)
            return waiting.result() if waiting.done() else ""
        finally:
            waiting.cancel()

    async def _first(self) -> str:
        text = self._show(*await self._lines.get())
        while not self._lines.empty():
            text += self._show(*self._lines.get_nowait())
        return text

    def _show(self, name: str, line: str) -> str:
        heading = "" if name == self._shown else f"==> {name} <==\n"
        self._shown = name
        return f"{heading}{line}\n"

    async def close(self) -> None:
        for subscription in self._subscriptions:
            subscription.close()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


def _block(name: str, lines: list[str], headed: bool) -> str:
    return (f"==> {name} <==\n" if headed else "") + "".join(f"{line}\n" for line in lines)


async def _send_text(send: Send, text: str) -> None:
    if text:
        await send({"type": "http.response.body", "body": text.encode("utf-8", "replace"), "more_body": True})
