"""What an instance needs while it serves: that nothing of its requests stays on the disk, and that its port is its own.

Both are for engines like whisper-server. With ``convert`` it writes each upload to a file, and leaves that where it is
if ffmpeg fails. And it shares its port with whoever asks for that: from then on the kernel gives the other one a part
of the requests, whose answers would be another model's. That nobody listens there is known when an instance becomes
ready; here it is looked at again and again (Linux only: elsewhere it cannot be known). Decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from mesh import tasks
from mesh.host.listeners import holders, is_crowded, other_sockets
from mesh.host.memory import tree_pids
from mesh.host.scratch import Leftovers
from mesh.logs import Log

_log: Final = Log(__name__)

#: between two looks at the port, and at what requests left there that were over before the instance was done with them
LOOK_EVERY_S: Final = 5.0
#: another node's instance that comes to listen on the port sees this one, and leaves sooner than that
CONFIRM_S: Final = 1.0


class Upkeep:
    """That of one instance. *leftovers*: None if its engine leaves nothing."""

    def __init__(self, instance_id: str, leftovers: Leftovers | None) -> None:
        self._instance_id = instance_id
        self._leftovers = leftovers
        self._ended = asyncio.Event()  #: a request, since it was last looked

    def begin_upload(self) -> Callable[[], None]:
        """A form is about to be sent there; return what to call when that request is over."""
        leftovers = self._leftovers
        assert leftovers is not None, "an engine that leaves nothing is told of no upload"
        number = leftovers.begin()

        def over() -> None:
            leftovers.end(number)
            self._ended.set()

        return over

    async def keep(self, port: int | None, pid: int, condemn: Callable[[str], None]) -> None:
        """Go on until cancelled. *condemn* is told why it must not go on, if others come to listen on *port*, which is
        None where they cannot."""
        chores = list[Coroutine[Any, Any, None]]()
        if self._leftovers is not None:
            clear = partial(self._clear, self._leftovers)
            chores.append(tasks.forever(clear, every_s=0, name=f"leftovers of {self._instance_id}"))
        if port is not None:
            watch = _PortWatch(self._instance_id, port, pid, condemn)
            chores.append(tasks.forever(watch.look, every_s=LOOK_EVERY_S, name=f"port of {self._instance_id}"))
        await asyncio.gather(*chores)

    async def _clear(self, leftovers: Leftovers) -> None:
        """Wait for the end of a request, but not for long, and remove what is left."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_EVERY_S):
                await self._ended.wait()
        self._ended.clear()
        await asyncio.to_thread(leftovers.clear)


class _PortWatch:
    def __init__(self, instance_id: str, port: int, pid: int, condemn: Callable[[str], None]) -> None:
        self._instance_id = instance_id
        self._port = port
        self._pid = pid
        self._condemn = condemn

    async def look(self) -> None:
        if not await asyncio.to_thread(self._others):
            return
        await asyncio.sleep(CONFIRM_S)
        if not (sockets := await asyncio.to_thread(self._others)):
            return
        pids = await asyncio.to_thread(holders, sockets)
        _log.error("another program listens on the port of an instance, and gets a part of its requests; it is ended",
                   instance=self._instance_id, port=self._port, other_pids=list(pids))  # fmt: skip
        known = f" (pid {', '.join(map(str, pids))})" if pids else ""
        self._condemn(f"port {self._port} is used by another program, too{known}")

    def _others(self) -> frozenset[str]:
        if not is_crowded(self._port):
            return frozenset()
        return strangers_on(self._port, self._pid)


def strangers_on(port: int, pid: int) -> frozenset[str]:
    """Return the sockets of others who listen on *port* where *pid* and its descendants do; none once it is gone.

    Blocks.
    """
    pids = tree_pids([pid]).get(pid, ())
    return other_sockets(port, pids) if pids else frozenset()
