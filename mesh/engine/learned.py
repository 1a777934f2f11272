"""What instances were seen to use, kept over restarts in one JSON file.

Keys are opaque here: whoever learns makes them so that a figure holds for exactly what it was measured on. The file is
replaced whole, only when something changed; one that cannot be read costs its content, never the start (trap 97).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from mesh.core.footprint import Learned
from mesh.files import replace_file

_log = logging.getLogger(__name__)
_VERSION = 1
#: the longest unchanged ones are forgotten first: of engines and files that are gone
_MOST = 1000


class _Record(msgspec.Struct, frozen=True):
    model: str  #: for people
    ready_ram_mib: int
    peak_ram_mib: int
    gpu_mib: int = 0
    gpus: int = 0
    samples: int = 0


class _File(msgspec.Struct, frozen=True):
    version: int
    launches: dict[str, _Record]


class LearnedFigures:
    """Belongs to the event loop's thread; ``path`` None keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._by_key: dict[str, tuple[str, Learned]] = {}
        self._changes = 0
        self._saved_changes = 0
        self._saving = asyncio.Lock()
        self._failing = False

    def get(self, key: str) -> Learned | None:
        found = self._by_key.get(key)
        return found[1] if found is not None else None

    def add(self, key: str, model: str, ram_mib: int, gpu_mib: Mapping[str, int] | None, *, first: bool) -> None:
        """Take in one sample; *first* of its instance, whose prompt cache is still empty."""
        old = self.get(key) or Learned(0, 0)
        used = [mib for mib in (gpu_mib or {}).values() if mib > 0]
        more = sum(used) > old.gpu_mib
        new = Learned(
            ready_ram_mib=_least(old.ready_ram_mib, ram_mib) if first else old.ready_ram_mib,
            peak_ram_mib=max(old.peak_ram_mib, ram_mib),
            gpu_mib=sum(used) if more else old.gpu_mib,
            gpus=len(used) if more else old.gpus,
            samples=old.samples + first,
        )
        if new != old:
            self._by_key.pop(key, None)
            self._by_key[key] = (model, new)
            self._changes += 1
            while len(self._by_key) > _MOST:
                del self._by_key[next(iter(self._by_key))]

    def restore(self) -> None:
        """Continue from the file; blocks."""
        if self._path is None:
            return
        try:
            file = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            _log.warning("memory use is learned anew: %s cannot be read: %s", self._path, error)
            return
        if file.version != _VERSION:
            _log.warning("memory use is learned anew: %s has version %d, not %d", self._path, file.version, _VERSION)
            return
        for key, r in file.launches.items():
            amounts = (r.ready_ram_mib, r.peak_ram_mib, r.gpu_mib, r.gpus, r.samples)
            if min(amounts) >= 0:
                self._by_key[key] = (r.model, Learned(*amounts))

    async def save(self) -> bool:
        """Write what changed since the last time, off the loop; False if it could not be written."""
        async with self._saving:
            changes = self._changes
            if self._path is None or changes == self._saved_changes:
                return True
            launches = {
                key: _Record(model, of.ready_ram_mib, of.peak_ram_mib, of.gpu_mib, of.gpus, of.samples)
                for key, (model, of) in self._by_key.items()
            }
            try:
                await asyncio.to_thread(_replace, self._path, _File(_VERSION, launches))
            except OSError as error:
                if not self._failing:  # edge-triggered: a full disk is one line a day, not thousands
                    _log.warning("learned memory use is kept in memory only: cannot write %s: %s", self._path, error)
                self._failing = True
                return False
            self._saved_changes, self._failing = changes, False
            return True


def _least(old_mib: int, new_mib: int) -> int:
    """An instance that was seen late has prompts cached already; the least is nearest to one that has none."""
    return min(old_mib, new_mib) if old_mib else new_mib


def _replace(path: Path, file: _File) -> None:
    replace_file(path, msgspec.json.format(msgspec.json.encode(file), indent=2))
