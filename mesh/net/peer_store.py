"""``known_peers`` for a running node: what is known now, while the file is written behind and edited by others.

Memory changes at once, on the event loop; a thread writes the file. What cannot be written stays known and is tried
again. What others write is taken over if it is valid, else what was known before stays in force. One loop owns it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from pathlib import Path

from mesh.errors import ConfigError
from mesh.logs import Log
from mesh.net import known_peers
from mesh.net.known_peers import Change, KnownPeers, Stamp
from mesh.tasks import in_daemon_thread, spawn

_log = Log(__name__)

#: A write that failed is tried again with the next change, and after so many looks.
_RETRY_AFTER_LOOKS = 60
_CLOSING_S = 5.0


_Changes = dict[Hashable, Change]
_Outcome = tuple[KnownPeers, Stamp] | str


class PeerStore:
    """See the module. *on_change* is called after each change with what was known before."""

    def __init__(self, path: Path, on_change: Callable[[KnownPeers], None]) -> None:
        """Read the file; raise ``ConfigError`` if it is not valid: there is nothing to fall back on yet."""
        self.path = path
        self._on_change = on_change
        self._on_disk, self._stamp = known_peers.read(path)
        self.known = self._on_disk  #: with what is pending
        self._pending: dict[Hashable, Change] = {}  #: by what they are about, so that it cannot grow without end
        self._writer: asyncio.Task[None] | None = None
        self._complaint: str | None = None  #: why the last write failed
        self._vanished = False
        self._looks_until_retry = 0

    @property
    def unsaved(self) -> str | None:
        """Why the file lacks something that is known; None if it does not."""
        return self._complaint if self._pending else None

    def apply(self, about: Hashable, change: Change) -> None:
        """Make *change* now, and write it to the file behind. One that is *about* the same replaces an earlier one."""
        changed = change(self.known)
        if changed is not self.known:
            self._pending.pop(about, None)  # the order counts
            self._pending[about] = change
            self._set_known(changed)
            self._save()

    def look(self) -> None:
        """Take over the file if it changed. Cheap while it does not."""
        self._look()
        if self._pending:
            self._looks_until_retry -= 1
            if self._looks_until_retry < 0:
                self._save()

    def _look(self) -> None:
        stamp = known_peers.stamp(self.path)
        if stamp == self._stamp and not self._vanished:
            return
        try:
            known, self._stamp = known_peers.read(self.path)
        except ConfigError as error:
            self._stamp, self._vanished = stamp, False  # one error per change
            _log.error("known_peers not reloaded, what it said before stays in force", reason=error.message)
            return
        if not known.entries and self._on_disk.entries and not self._vanished:
            self._vanished = True  # some editors remove or empty a file before they write it: look once more
            return
        self._vanished = False
        gone = len(self._on_disk.entries) - len(known.entries)
        if not known.entries and gone:
            _log.warning("all known peers were removed, revocations too", path=str(self.path), count=gone)
        self._take(known)
        self._looks_until_retry = 0  # what stood in the way of a write may be repaired

    def _take(self, on_disk: KnownPeers) -> None:
        """Take over what the file says; changes that are not in it yet are made again."""
        self._on_disk = on_disk
        self._set_known(_all(on_disk, changes=self._pending.values()))

    def _set_known(self, known: KnownPeers) -> None:
        before, self.known = self.known, known
        self._on_change(before)

    def _save(self) -> None:
        """Write what is pending: in a thread if a loop runs, else here and now."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._finish(*self._attempt(dict(self._pending)))
            return
        if self._writer is None:
            self._writer = spawn(self._write_behind(), "known_peers writer")

    async def _write_behind(self) -> None:
        try:
            going_on = True
            while self._pending and going_on:
                going_on = self._finish(*await self._attempt_in_thread())
        finally:
            self._writer = None

    async def _attempt_in_thread(self) -> tuple[_Changes, _Outcome]:
        """``_attempt`` what is pending now; a disk that hangs keeps nobody from ending."""
        return await in_daemon_thread(partial(self._attempt, dict(self._pending)), "known_peers writer")

    def _attempt(self, changes: _Changes) -> tuple[_Changes, _Outcome]:
        """Write *changes*; return them, and the file's new content or why there is none. In any thread."""
        try:
            return changes, known_peers.update(self.path, partial(_all, changes=changes.values()))
        except ConfigError as error:
            return changes, error.message
        except OSError as error:
            return changes, f"{error.filename or self.path}: {error.strerror}"

    def _finish(self, changes: _Changes, result: _Outcome) -> bool:
        """Note how a write ended; return whether it worked."""
        if isinstance(result, str):
            self._looks_until_retry = _RETRY_AFTER_LOOKS
            if result != self._complaint:
                self._complaint = result
                _log.warning("known_peers cannot be written; new keys are known until the next start", reason=result)
            return False
        if self._complaint is not None:
            self._complaint = None
            _log.info("known_peers is written again", path=str(self.path))
        for about, change in changes.items():
            if self._pending.get(about) is change:
                del self._pending[about]
        on_disk, self._stamp = result
        self._vanished = False
        self._take(on_disk)
        return True

    async def close(self) -> None:
        """Write what is still to be written, if the disk lets us."""
        if self._writer is not None:
            await asyncio.wait([self._writer], timeout=_CLOSING_S)
        if self._pending and self._writer is None:
            with contextlib.suppress(TimeoutError):
                self._finish(*await asyncio.wait_for(self._attempt_in_thread(), _CLOSING_S))


def _all(known: KnownPeers, *, changes: Iterable[Change]) -> KnownPeers:
    for change in changes:
        known = change(known)
    return known
