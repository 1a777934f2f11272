"""The last output of one child process, in bounded memory, and live copies of it for whoever watches.

Fed by ``mesh.host.process`` on the event loop. Feeding never waits: a watcher that is too slow loses lines and is told
how many (trap 20). The ring never writes anywhere.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

#: a longer line is cut; what matters of a log line is at its beginning
MAX_LINE_BYTES: Final = 8192
_CUT_MARK = b" [... line cut]"


class LogRing:
    """The newest lines, at most ``max_lines`` of them and about ``max_bytes``."""

    def __init__(self, max_lines: int = 1000, max_bytes: int = 256 * 1024) -> None:
        self._lines: deque[str] = deque()
        self._max_lines = max_lines
        self._max_bytes = max_bytes
        self._bytes = 0
        self._ended = 0
        self._partial = bytearray()  # the line that has no end yet, at most MAX_LINE_BYTES + 1 of it
        self._subscriptions: set[Subscription] = set()
        self.closed = False

    def feed(self, data: bytes) -> None:
        """Take output as it came: any bytes, lines cut anywhere."""
        *complete, rest = data.split(b"\n")
        for line in complete:
            self._extend(line)
            self._end_line()
        self._extend(rest)

    def tail(self, count: int | None = None) -> list[str]:
        """Return the newest *count* lines (all without a count), an unfinished last one included."""
        lines = [*self._lines, _text(self._partial)] if self._partial else list(self._lines)
        return lines if count is None else lines[max(0, len(lines) - count) :]

    @property
    def count(self) -> int:
        """How many lines there were so far, with those that are forgotten and one that is unfinished."""
        return self._ended + bool(self._partial)

    def subscribe(self, max_lines: int = 1000) -> Subscription:
        """Return the lines from now on, to be iterated with ``async for`` until the ring or the subscription closes."""
        subscription = Subscription(self, max_lines)
        if self.closed:
            subscription.close()
        else:
            self._subscriptions.add(subscription)
        return subscription

    def close(self) -> None:
        """The process is gone: finish the last line and end every subscription once it has been read. Idempotent."""
        if self._partial:
            self._end_line()
        self.closed = True
        for subscription in tuple(self._subscriptions):
            subscription.close()

    def _extend(self, piece: bytes) -> None:
        self._partial += piece[: MAX_LINE_BYTES + 1 - len(self._partial)]

    def _end_line(self) -> None:
        line = _text(self._partial)
        self._partial.clear()
        self._lines.append(line)
        self._bytes += len(line)
        self._ended += 1
        while len(self._lines) > self._max_lines or (self._bytes > self._max_bytes and len(self._lines) > 1):
            self._bytes -= len(self._lines.popleft())
        for subscription in self._subscriptions:
            subscription.put(line)

    def forget(self, subscription: Subscription) -> None:
        """Stop feeding *subscription*."""
        self._subscriptions.discard(subscription)


class Subscription:
    """A bounded queue of lines for one watcher. ``dropped`` counts the lines it was too slow for."""

    def __init__(self, ring: LogRing, max_lines: int) -> None:
        self._ring = ring
        self._queue: deque[str] = deque()
        self._max_lines = max_lines
        self._wake = asyncio.Event()
        self._closed = False
        self.dropped = 0

    def put(self, line: str) -> None:
        """Queue *line*, at the price of the oldest one if the watcher is too slow."""
        if len(self._queue) >= self._max_lines:
            self._queue.popleft()
            self.dropped += 1
        self._queue.append(line)
        self._wake.set()

    def close(self) -> None:
        """End the iteration after what is queued. Idempotent."""
        self._closed = True
        self._ring.forget(self)
        self._wake.set()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> str:
        while not self._queue:
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._queue.popleft()


def _text(line: bytes | bytearray) -> str:
    cut = line[:MAX_LINE_BYTES] + _CUT_MARK if len(line) > MAX_LINE_BYTES else line
    return cut.rstrip(b"\r").decode("utf-8", "replace")
