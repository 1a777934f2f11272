"""Looks at the first bytes of an accepted connection until they say who it is for. Consumes none of them."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable

from mesh.core.sniff import MAX_PREFIX, NEED_MORE, Protocol, sniff

_FIRST_PEEK_S = 0.005  # between looks at a prefix that does not decide yet; doubles up to _LAST_PEEK_S
_LAST_PEEK_S = 0.2


class Sniffing:
    """Peeks at one connection until its protocol is known or its time is over; then calls *decided* once.

    The protocol is None if the connection ended, or said nothing that is known in *timeout_s*. After ``stop`` nothing
    is called; the socket stays the caller's.
    """

    __slots__ = ("_deadline", "_decided", "_loop", "_peek_s", "_timer", "_watching", "sock")

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        timeout_s: float,
        decided: Callable[[Sniffing, Protocol | None], None],
    ) -> None:
        self.sock = sock
        self._loop = loop
        self._deadline = loop.time() + timeout_s
        self._decided = decided
        self._peek_s = _FIRST_PEEK_S
        self._timer: asyncio.TimerHandle | None = None
        self._watching = False

    def look(self) -> None:
        """Peek; the first bytes are often there already."""
        self.stop()
        try:
            prefix = self.sock.recv(MAX_PREFIX, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            self._wait()
            return
        except OSError:
            self._decided(self, None)
            return
        verdict = sniff(prefix)
        if isinstance(verdict, Protocol):
            self._decided(self, verdict)
        elif verdict is NEED_MORE and prefix and self._loop.time() < self._deadline and not _ended(self.sock):
            # The socket stays readable while these bytes are unread, so waiting for that would spin.
            self._timer = self._loop.call_later(self._peek_s, self.look)
            self._peek_s = min(self._peek_s * 2, _LAST_PEEK_S)
        else:
            self._decided(self, None)

    def _wait(self) -> None:
        if self._loop.time() >= self._deadline:
            self._decided(self, None)
            return
        self._watching = True
        self._loop.add_reader(self.sock, self.look)
        self._timer = self._loop.call_at(self._deadline, self.look)

    def stop(self) -> None:
        if self._watching:
            self._watching = False
            self._loop.remove_reader(self.sock)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _ended(sock: socket.socket) -> bool:
    """Whether the client closed its side, behind bytes that are still unread; not known everywhere."""
    if not hasattr(select, "POLLRDHUP"):  # macOS: it keeps its descriptor until the timeout
        return False
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))
