"""Ask llama-server whether it accepts a profile's arguments, before anybody is evicted for it. Loads nothing.

llama.cpp reads its arguments in order and refuses the first bad one; ``--version``, put last, makes it print its
version and exit when all before it are good. What it only finds out while it loads (a missing file, a combination that
does not work) is not seen here. Measured with b11549: 40 ms.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Final

from mesh.config.profile import Profile
from mesh.core.exits import Cause, classify, first_complaint
from mesh.engine import llama
from mesh.engine.locate import EngineBinary
from mesh.host.logring import LogRing
from mesh.host.process import Process
from mesh.host.warden import Warden

#: a binary that takes longer is doing something else
LIMIT_S: Final = 10.0
_VERSION_FLAG: Final = "--version"


async def complaint(profile: Profile, engine: EngineBinary, warden: Warden | None = None) -> str | None:
    """Return the line in which *engine* refuses *profile*'s arguments; None if it accepts them or cannot say.

    Raise a ``MeshError`` if it cannot even be started. When it is cancelled the process is killed.
    """
    command = llama.command(profile, engine, llama.fixed_port(profile) or 1)
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def on_exit(returncode: int) -> None:
        if not ended.done():
            ended.set_result(returncode)

    process = Process.start(
        (*command.argv, _VERSION_FLAG), env=command.env, on_exit=on_exit, ring=LogRing(), warden=warden
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            returncode = await ended
    except TimeoutError:
        return None
    finally:
        process.signal_group(signal.SIGKILL)
    return _verdict(returncode, process.ring.tail())


def _verdict(returncode: int, output: list[str]) -> str | None:
    """Only a clear refusal counts: an engine of another kind may not know ``--version`` and fail for that."""
    if returncode == 0 or classify(returncode, output) is not Cause.USAGE:
        return None
    line = first_complaint(output)
    return None if line is None or _VERSION_FLAG in line else line
