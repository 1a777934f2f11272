"""Which TCP ports of 127.0.0.1 children listen on.

Owns the set of ports in use by this node's instances and the time each was given back. A port that was given back rests
for a minute, because a late connection to the old instance must not reach a new one (trap 26). Does not open listening
sockets beyond the bind that tests whether a port is free.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from mesh.errors import CapacityError, ConfigError

#: without configured ports: below Linux's ephemeral range (32768-60999), where any outgoing connection may hold a port
DEFAULT_PORTS: Final = range(10000, 20000)
COOL_DOWN_S: Final = 60.0


def is_free(port: int, *, reuses: bool = True) -> bool:
    """Whether a server could listen on 127.0.0.1:*port* now.

    Connections in TIME_WAIT do not hold it if the server *reuses* addresses, as nearly all do (SO_REUSEADDR).
    """
    with socket.socket() as probe:
        if reuses:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            # a listener without SO_REUSEPORT is only seen by listen() on some systems
            probe.listen(1)
        except OSError:
            return False
        return True


class PortAllocator:
    """Hands out ports: configured ones in their order, else any of ``DEFAULT_PORTS`` from a random start."""

    def __init__(
        self,
        configured: Sequence[int] | None = None,
        *,
        is_free: Callable[..., bool] = is_free,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._configured = tuple(dict.fromkeys(configured)) if configured is not None else None
        self._is_free = is_free
        self._clock = clock
        self._used: set[int] = set()
        self._released_at: dict[int, float] = {}  # only ports that rest

    def reserve(self, *, reuses: bool = True) -> int:
        """Take a port for a server that *reuses* addresses or does not; raise ``CapacityError`` if every one is taken.

        Of configured ports, one that still rests is better than none: a node with a single port could otherwise not
        change models for a minute. Then it is the one that has rested longest; and one that old connections may hold.
        """
        self._forget_rested()
        resting = sorted(self._released_at, key=self._released_at.__getitem__) if self._configured is not None else []
        for how in (reuses, True) if self._configured is not None else (reuses,):
            for port in (*self._candidates(), *resting):
                if port not in self._used and self._is_free(port, reuses=how):
                    return self._take(port)
        raise CapacityError(
            "No available ports: every port of llama_cpp_ports is in use; add ports or lower max_instances_per_node"
            if self._configured is not None
            else "No available ports in 10000-19999; configure llama_cpp_ports"
        )

    def reserve_fixed(self, port: int) -> int:
        """Take the port that a profile's own ``--port`` names; rested or not, the operator asked for it.

        Raise ``ConfigError`` if it is no port, ``CapacityError`` if an instance or a foreign process has it.
        """
        if not 0 < port < 65536:
            raise ConfigError(f"--port {port} is not a port; use 1-65535, or leave --port out")
        if port in self._used:
            raise CapacityError(f"Port {port} already in use by another instance; leave --port out of the arguments")
        if not self._is_free(port, reuses=True):
            raise CapacityError(f"Port {port} already in use by another process; leave --port out of the arguments")
        return self._take(port)

    def release(self, port: int, *, rest: bool = True) -> None:
        """Give *port* back. Without *rest* (nobody ever listened on it) it may be handed out again at once."""
        if port in self._used:
            self._used.discard(port)
            if rest:
                self._released_at[port] = self._clock()

    def _take(self, port: int) -> int:
        self._used.add(port)
        self._released_at.pop(port, None)
        return port

    def _candidates(self) -> Iterable[int]:
        if self._configured is not None:
            ports: Iterable[int] = self._configured
        else:
            first = secrets.randbelow(len(DEFAULT_PORTS))
            ports = (*DEFAULT_PORTS[first:], *DEFAULT_PORTS[:first])
        return (port for port in ports if port not in self._released_at)

    def _forget_rested(self) -> None:
        since = self._clock() - COOL_DOWN_S
        for port in [port for port, released in self._released_at.items() if released <= since]:
            del self._released_at[port]
