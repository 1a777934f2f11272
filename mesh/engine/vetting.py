"""Ask an engine whether it accepts a profile's arguments, before anybody is evicted for it. Loads nothing.

llama.cpp reads its arguments in order and refuses the first bad one; ``--version``, put last, makes it print its
version and exit when all before it are good. What it only finds out while it loads (a missing file, a combination that
does not work) is not seen here. Measured with b11549: 40 ms. whisper-server does the same with ``--help``.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from typing import Final

from mesh.config.profile import Profile
from mesh.core.exits import Cause, classify, describe_exit, first_complaint
from mesh.engine import flags
from mesh.engine.children import fixed_port
from mesh.engine.kind import EngineKind
from mesh.engine.kinds import kind_of
from mesh.engine.locate import EngineBinary
from mesh.host.logring import LogRing
from mesh.host.process import Process
from mesh.host.warden import Warden

#: a binary that takes longer is doing something else
LIMIT_S: Final = 10.0
#: how no program ends because it does not know a flag
_CRASHES: Final = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGSYS)
_NOT_EXECUTED: Final = (126, 127)
_NO_LIBRARY: Final = "error while loading shared libraries"


async def complaint(profile: Profile, engine: EngineBinary, warden: Warden | None = None) -> str | None:
    """Return the line in which *engine* refuses *profile*'s arguments; None if it accepts them or cannot say.

    Raise a ``MeshError`` if it cannot even be started. When it is cancelled the process is killed.
    """
    kind = kind_of(profile)
    command = kind.command(profile, engine, fixed_port(profile) or 1)
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def on_exit(returncode: int) -> None:
        if not ended.done():
            ended.set_result(returncode)

    process = Process.start(
        (*command.argv, kind.check_flag),
        env=command.env,
        cwd=flags.directory_of(kind),
        on_exit=on_exit,
        ring=LogRing(),
        warden=warden,
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            returncode = await ended
    except TimeoutError:
        return None
    finally:
        process.signal_group(signal.SIGKILL)
    words = kind.last_words(process.ring.tail())
    if _cannot_run(returncode, words):
        return describe_exit(returncode, words, program=engine.program)
    return _verdict(returncode, words, kind)


def _cannot_run(returncode: int, output: Sequence[str]) -> bool:
    """Whether the program is broken: half copied, made for another machine, without its libraries."""
    crashed = any(returncode in (-number, 128 + number) for number in _CRASHES)
    return crashed or returncode in _NOT_EXECUTED or any(_NO_LIBRARY in line for line in output)


def _verdict(returncode: int, output: Sequence[str], kind: EngineKind) -> str | None:
    """Only a clear refusal counts: an engine of another kind may not know ``--version`` and fail for that."""
    if (returncode == 0 and 0 not in kind.usage_statuses) or classify(returncode, output) is not Cause.USAGE:
        return None
    line = first_complaint(output)
    return None if line is None or kind.check_flag in line else line
