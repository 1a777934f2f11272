"""``known_peers`` for a running node: what is known now, while the file is written behind and edited by others.

Memory changes at once, on the event loop; a thread writes the file. What cannot be written stays known and is tried
again. What others write is taken over if it is valid, else what was known before stays in force. A file that vanishes
or is emptied takes no refusal back (a volume that is not mounted, a tool that writes its own version): they stay known,
and go into the file with the next write. Only a line that goes while others stay is forgotten. One loop owns it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from pathlib import Path

from mesh.core.node_state import PeerKey
from mesh.errors import ConfigError
from mesh.logs import Log
from mesh.net import known_peers
from mesh.net.known_peers import Change, Entry, KnownPeers, Stamp
from mesh.tasks import in_daemon_thread, spawn

_log = Log(__name__)

#: A write that failed is tried again with the next change, and after so many looks; what may be written later is
#: written then.
_RETRY_AFTER_LOOKS = 60
_CLOSING_S = 5.0
_LOOK_S = 0.5  #: for a look; one that takes longer goes on behind


_Changes = dict[Hashable, Change]
_Outcome = tuple[KnownPeers, Stamp] | str
#: What a look found: the file's stamp, and its content or why there is none; None if nothing changed.
_Sight = tuple[Stamp, KnownPeers | str] | None


class PeerStore:
    """See the module. *on_change* is called after each change with what was known before."""

    def __init__(self, path: Path, on_change: Callable[[KnownPeers], None]) -> None:
        """Read the file; raise ``ConfigError`` if it is not valid: there is nothing to fall back on yet."""
        self.path = path
        self._on_change = on_change
        self._on_disk, self._stamp = known_peers.read(path)
        self.known = self._on_disk  #: with what is pending
        self._pending: dict[Hashable, Change] = {}  #: by what they are about, so that it cannot grow without end
        self._kept: dict[PeerKey, Entry] = {}  #: refusals that the file lost when it vanished
        self._writer: asyncio.Task[None] | None = None
        self._looker: asyncio.Task[None] | None = None
        self._writes = 0
        self._hurry = False  #: whether something is pending that does not wait
        self._hanging = False
        self._complaint: str | None = None  #: why the last write failed
        self._vanished = False
        self._looks_until_retry = 0

    @property
    def unsaved(self) -> str | None:
        """Why the file lacks something that is known; None if it does not."""
        return self._complaint if self._pending or self._kept else None

    def apply(self, about: Hashable, change: Change, *, later: bool = False) -> None:
        """Make *change* now, and write it to the file behind. One that is *about* the same replaces an earlier one.

        What may be written *later* waits for another write, or for a minute of looks.
        """
        changed = change(self.known)
        if changed is self.known:
            return
        if later and not self._pending:
            self._looks_until_retry = _RETRY_AFTER_LOOKS
        self._pending.pop(about, None)  # the order counts
        self._pending[about] = change
        self._set_known(changed)
        if not (later and _loop_runs()):
            self._hurry = True
            self._save()

    def look(self) -> None:
        """Take over the file if it changed. Blocks."""
        self._see(self._sight(self._stamp, even_if_same=self._vanished))

    async def refresh(self) -> None:
        """``look`` with the disk in a thread, one at a time: a disk that hangs holds up nobody and costs one thread."""
        if self._looker is None:
            self._looker = spawn(self._look_in_thread(), "known_peers look")
        await asyncio.wait([self._looker], timeout=_LOOK_S)
        if self._looker is not None and not self._hanging:
            self._hanging = True
            _log.warning("known_peers cannot be looked at, its disk does not answer", path=str(self.path))

    async def _look_in_thread(self) -> None:
        try:
            writes = self._writes
            job = partial(self._sight, self._stamp, even_if_same=self._vanished)
            sight = await in_daemon_thread(job, "known_peers look")
            if writes == self._writes:  # else it may be older than what was written; the next look comes soon
                self._see(sight)
        finally:
            self._looker, self._hanging = None, False

    def _sight(self, known_stamp: Stamp, *, even_if_same: bool) -> _Sight:
        """Return what is in the file, if that is not what had *known_stamp*. In any thread."""
        stamp = known_peers.stamp(self.path)
        if stamp == known_stamp and not even_if_same:
            return None
        try:
            known, stamp = known_peers.read(self.path)
        except ConfigError as error:
            return stamp, error.message
        return stamp, known

    def _see(self, sight: _Sight) -> None:
        """Take over what a look found, and write what waits for that."""
        if sight is not None:
            self._take_sight(*sight)
        if self._pending or (self._kept and self._stamp is None):  # a file that is only empty may be meant so
            self._looks_until_retry -= 1
            if self._looks_until_retry < 0:
                self._save()

    def _take_sight(self, stamp: Stamp, known: KnownPeers | str) -> None:
        self._stamp = stamp
        if isinstance(known, str):
            self._vanished = False  # one error per change
            _log.error("known_peers not reloaded, what it said before stays in force", reason=known)
            return
        if not known.entries and self._on_disk.entries and not self._vanished:
            self._vanished = True  # some editors remove or empty a file before they write it: look once more
            return
        self._vanished = False
        gone = len(self._on_disk.entries) - len(known.entries)
        self._take(known)
        if not known.entries and gone:
            _log.warning("known_peers has vanished or is empty; only its refusals stay in force", path=str(self.path),
                         count=gone, refusals=len(self._kept))  # fmt: skip
        self._looks_until_retry = 0  # what stood in the way of a write may be repaired

    def _take(self, on_disk: KnownPeers) -> None:
        """Take over what the file says; changes that are not in it yet are made again."""
        if not on_disk.entries:
            self._kept |= {entry.key: entry for entry in self._on_disk.refusals}
        self._kept = {key: entry for key, entry in self._kept.items() if key not in on_disk.by_key}
        self._on_disk = on_disk
        self._set_known(_all(on_disk.with_others(self._kept.values()), changes=self._pending.values()))

    def _set_known(self, known: KnownPeers) -> None:
        before, self.known = self.known, known
        self._on_change(before)

    def _save(self) -> None:
        """Write what is pending: in a thread if a loop runs, else here and now."""
        if not _loop_runs():
            self._finish(*self._attempt(*self._unwritten()))
        elif self._writer is None:
            self._writer = spawn(self._write_behind(), "known_peers writer")

    async def _write_behind(self) -> None:
        try:
            while self._finish(*await self._attempt_in_thread()) and self._hurry:
                pass
        finally:
            self._writer = None

    async def _attempt_in_thread(self) -> tuple[_Changes, _Outcome]:
        """``_attempt`` what is pending now; a disk that hangs keeps nobody from ending."""
        return await in_daemon_thread(partial(self._attempt, *self._unwritten()), "known_peers writer")

    def _unwritten(self) -> tuple[_Changes, tuple[Entry, ...], tuple[Entry, ...]]:
        """Return what to write: changes, the refusals that the file lacks, and those it had when last seen."""
        self._hurry = False
        return dict(self._pending), tuple(self._kept.values()), self._on_disk.refusals

    def _attempt(
        self, changes: _Changes, kept: tuple[Entry, ...], refusals: tuple[Entry, ...]
    ) -> tuple[_Changes, _Outcome]:
        """Write *changes*; return them, and the file's new content or why there is none. In any thread."""

        def change(known: KnownPeers) -> KnownPeers:
            restored = known.with_others(kept if known.entries else (*refusals, *kept))
            return _all(restored, changes=changes.values())

        try:
            return changes, known_peers.update(self.path, change)
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
        self._looks_until_retry = _RETRY_AFTER_LOOKS  # what came meanwhile, unless it hurries
        on_disk, self._stamp = result
        self._writes += 1
        self._vanished = False
        self._take(on_disk)
        return True

    async def close(self) -> None:
        """Write what is still to be written, if the disk lets us."""
        if self._looker is not None:
            self._looker.cancel()
            await asyncio.wait([self._looker])
        if self._writer is not None:
            await asyncio.wait([self._writer], timeout=_CLOSING_S)
        if self._pending and self._writer is None:
            with contextlib.suppress(TimeoutError):
                self._finish(*await asyncio.wait_for(self._attempt_in_thread(), _CLOSING_S))


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _all(known: KnownPeers, *, changes: Iterable[Change]) -> KnownPeers:
    for change in changes:
        known = change(known)
    return known
