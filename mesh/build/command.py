"""One command of a build: started, read line by line, ended with everything that it started.

Whoever waits for it may be cancelled, and may be killed: nothing of its process group is left either way
(``mesh.host.process``, ``leash``, ``warden``).
"""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mesh.build import child
from mesh.core.build_progress import is_transient
from mesh.errors import BuildError, InstanceError
from mesh.host.logring import LogRing
from mesh.host.process import Process
from mesh.host.warden import Warden
from mesh.logs import Log
from mesh.tasks import spawn

#: how long SIGTERM may take before SIGKILL
TERM_GRACE_S = 5.0
#: how long SIGKILL may take: one that waits for a disk in the kernel is ended by nobody, and must not hold up the node
KILL_LIMIT_S = 10.0
#: llamesh's: so much of the output goes into an error
TAIL_LINES = 40
MAX_LINE_CHARACTERS = 400
#: llama-server's neighbours are being asked questions while this runs
_NICENESS = "19"
#: git's own hooks set these; then every git, also one that cmake runs, would work in that repository instead
_MISLEADING = frozenset(
    f"GIT_{name}"
    for name in (
        *("DIR", "WORK_TREE", "COMMON_DIR", "INDEX_FILE", "NAMESPACE", "PREFIX"),
        *("OBJECT_DIRECTORY", "ALTERNATE_OBJECT_DIRECTORIES"),
    )
)
#: what a terminal would obey: titles and links, then colours and cursors, then the rest, then what is left of them
_FOR_TERMINALS = re.compile(
    r"\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b\[[0-?]*[ -/]*[@-~]?|\x1b[ -/]*[0-~]?|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
#: a password with a slash in it reads like a port and a path; then what is before the last @ goes
_URL_PASSWORD = re.compile(r"""(?<=://)(?:[^/@\s:]*:[^\s"'<>]*@|[^/@\s]+@)""")
_SECRET = r"token|passw|secret|key|auth|credential|signature"
_URL_SECRET = re.compile(rf"([?&][^=&\s]*(?:{_SECRET})[^=&\s]*=)[^&#\s\"'<>]+", re.IGNORECASE)

_log = Log(__name__)


class CommandError(BuildError):
    """A command ended with another status than 0."""


class HangsError(BuildError):
    """A command said nothing for too long, or took too long, and was ended."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every command of a build gets."""

    environ: Callable[[], Mapping[str, str]]
    warden: Warden | None = None


@dataclass(frozen=True, slots=True)
class Command:
    argv: tuple[str, ...]
    cwd: Path | None = None
    extra_env: Mapping[str, str] = field(default_factory=dict)
    max_silence_s: float | None = None  #: without output for so long, it hangs and is ended
    limit_s: float | None = None  #: in all
    nice: bool = True


class _LineRing(LogRing):
    """A ring that takes a carriage return for the end of a line: git paints its progress over and over."""

    def feed(self, data: bytes) -> None:
        super().feed(data.replace(b"\r", b"\n"))


async def run(command: Command, around: Surroundings, say: Callable[[str], None]) -> None:
    """Run *command* to its end and *say* each line of its output.

    Raise ``CommandError`` with exit status and the last lines if it fails, ``HangsError`` if it hangs, ``BuildError``
    if it cannot be started. When cancelled, return only after the whole process group is gone, or cannot be killed.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()
    ring = _LineRing()
    env = {name: value for name, value in around.environ().items() if name not in _MISLEADING} | dict(command.extra_env)
    argv = _niced(command.argv, env) if command.nice else command.argv
    try:
        process = child.start(argv, env=env, cwd=command.cwd, on_exit=ended.set_result, ring=ring, warden=around.warden)
    except InstanceError as error:
        raise BuildError(error.message) from error
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    watch = spawn(_watch(process, command), f"watch {command.argv[0]}")
    try:
        async for raw in ring.subscribe(max_lines=100_000):
            if line := clean(raw):
                if not is_transient(line):
                    tail.append(line)
                say(line)
        status = ended.result() if ended.done() else None  # the ring is closed when it ends, or cannot be killed
    finally:
        watch.cancel()
        await stop(process, ended)
    if watch.done() and not watch.cancelled() and (why := watch.result()):
        raise HangsError(f"{shown(command.argv)} {why}", exit_status=status, log_tail=tuple(tail))
    assert status is not None, "only the watch closes the ring before the end"
    if status != 0:
        raise CommandError(failure_text(command.argv, status), exit_status=status, log_tail=tuple(tail))


async def _watch(process: Process, command: Command) -> str:
    """Wait until the command hangs; then end it, and return what is to be said of it."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    while True:
        quiet_until = process.last_output_at + (command.max_silence_s or float("inf"))
        over_at = min(quiet_until, started + (command.limit_s or float("inf")))
        if over_at == float("inf"):
            await asyncio.Event().wait()  # until it is cancelled
        if (rest_s := over_at - loop.time()) > 0:
            await asyncio.sleep(rest_s)
            continue
        process.signal_group(signal.SIGTERM)
        loop.call_later(TERM_GRACE_S, process.signal_group, signal.SIGKILL)
        loop.call_later(TERM_GRACE_S + KILL_LIMIT_S, process.ring.close)  # nobody waits any longer
        silent = over_at == quiet_until
        return f"said nothing for {command.max_silence_s:g} s" if silent else f"took more than {command.limit_s:g} s"


async def stop(process: Process, ended: asyncio.Future[int]) -> None:
    """End the process group, kindly at first, and wait until it is gone. Nothing is done if it ended already.

    What cannot be killed is left alone: it is reaped if it ends after all, and the warden has its number.
    """
    try:
        if not ended.done():
            process.signal_group(signal.SIGTERM)
            await asyncio.wait({ended}, timeout=TERM_GRACE_S)
        if not ended.done():
            process.signal_group(signal.SIGKILL)
            await asyncio.wait({ended}, timeout=KILL_LIMIT_S)
        if not ended.done():
            _log.warning("a process cannot be killed; it waits for a disk, perhaps", pid=process.pid)
    finally:
        process.signal_group(signal.SIGKILL)  # cancelled once more: no patience is left


def clean(line: str) -> str:
    """Return *line* as it may be shown: without passwords and what only terminals understand, and cut."""
    text = without_passwords(_FOR_TERMINALS.sub("", line)).rstrip()
    return text if len(text) <= MAX_LINE_CHARACTERS else f"{text[: MAX_LINE_CHARACTERS - 1]}…"


def without_passwords(text: str) -> str:
    """Return *text* with what is secret in URLs taken out: before the ``@``, often a token, and ``?private_token=``."""
    return _URL_SECRET.sub(r"\1…", _URL_PASSWORD.sub("", text))


def shown(argv: Sequence[str]) -> str:
    """Return *argv* as it would be typed, without passwords."""
    return without_passwords(shlex.join(argv))


def failure_text(argv: Sequence[str], status: int) -> str:
    if status >= 0:
        return f"command failed (exit status: {status}): {shown(argv)}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = "; if nobody did that on purpose, the system ran out of memory" if status == -signal.SIGKILL else ""
    return f"command failed (killed by {name}{hint}): {shown(argv)}"


def _niced(argv: Sequence[str], env: Mapping[str, str]) -> tuple[str, ...]:
    nice, program = (shutil.which(name, path=env.get("PATH")) for name in ("nice", argv[0]))
    return (nice, "-n", _NICENESS, *argv) if nice and program else tuple(argv)
