"""One builder per directory, across processes: ``flock`` on a file beside it.

The kernel lets go when the process dies, however it dies; children do not inherit it. The file stays: if it were
removed, two could hold locks on two files of the same name.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from pathlib import Path

from mesh.errors import BuildError

#: how often somebody who waits looks; the kernel offers no other way that can be cancelled
POLL_S = 1.0
_PRIVATE = 0o600


class BuildLock:
    """A lock that is held. Use ``BuildLock.take`` or ``BuildLock.wait``."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def take(cls, path: Path) -> BuildLock | None:
        """Return the lock on *path*, or None if somebody else has it. Raise ``BuildError`` if there cannot be one."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _PRIVATE)
        except OSError as error:
            raise BuildError(f"cannot lock {path}: {error.strerror}; let this user write there") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise BuildError(f"cannot lock {path}: {error.strerror}; put build_path on a local disk") from error
        lock = cls(descriptor)
        lock._sign()
        return lock

    @classmethod
    async def taken(cls, path: Path) -> BuildLock | None:
        """As ``take``, off the loop: a network mount may hang. If the caller is cancelled, the lock is let go."""
        taking = asyncio.get_running_loop().run_in_executor(None, cls.take, path)
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(_let_go)
            raise

    @classmethod
    async def wait(cls, path: Path) -> BuildLock:
        """Return the lock on *path* as soon as it is free."""
        while True:
            if (lock := await cls.taken(path)) is not None:
                return lock
            await asyncio.sleep(POLL_S)

    def release(self) -> None:
        """Let the next one in. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def _sign(self) -> None:
        """Say who has it, for a message only; on a full disk nobody is named."""
        assert self._descriptor is not None
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            pass


def _let_go(taking: asyncio.Future[BuildLock | None]) -> None:
    if not taking.cancelled() and taking.exception() is None and (lock := taking.result()) is not None:
        lock.release()


def holder(path: Path) -> str:
    """Return who holds the lock on *path*, as a phrase: "process 4711"; the file may lag behind."""
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError):
        text = ""
    return f"process {text.strip()}" if text.strip().isdigit() else "another process"
