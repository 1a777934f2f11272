"""Tells when the cookbook may have changed. Never reads it, never decides what a change means, never ends by itself.

Level-triggered: the state of the path is compared before each wait, so that nothing between two waits is lost, and
every few seconds, so that file systems without notifications (NFS, FUSE, some bind mounts) work too. Directory and
file are watched both: an atomic rename is seen in the directory only, a write through a bind mount in the file only.
The watch is set up anew after every change, because the file may be another one by then (trap 81).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

from watchfiles import awatch

_log = logging.getLogger("mesh.config.watch")

#: Several writes of one save arrive as one change once nothing happened for this long ...
_QUIET_MS = 100
#: ... but no later than this.
_LATEST_MS = 500
_COMPARE_EVERY_MS = 2000
_RETRY_S = 2.0
_MAX_LINKS = 16

_State = tuple[object, ...]


async def watch_cookbook(path: Path, on_change: Callable[[], Awaitable[None]]) -> None:
    """Call *on_change* after every change of what *path* leads to, until cancelled.

    Also when the file disappears or becomes unreadable. A failing *on_change* is logged and does not end the watch.
    """
    # It reports each change at INFO with its own words; what matters is logged by who reloads.
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    seen = _state(path)
    while True:
        try:
            await _wait(path, seen)
            seen = _state(path)  # before the call: a change during it starts another
            await on_change()
        except Exception:
            _log.exception("watching %s failed; trying again in %.0f s", path, _RETRY_S)
            await asyncio.sleep(_RETRY_S)


async def _wait(path: Path, seen: _State) -> None:
    """Return once *path* is no longer as *seen*, or something was reported for it."""
    if _state(path) != seen:
        return
    names = {str(link) for link in _links(path)}
    watch = awatch(
        *_watched(path),
        watch_filter=None,
        recursive=False,
        step=_QUIET_MS,
        debounce=_LATEST_MS,
        rust_timeout=_COMPARE_EVERY_MS,
        yield_on_timeout=True,
    )
    async with aclosing(watch) as batches:
        async for changes in batches:
            if any(name in names for _, name in changes) or _state(path) != seen:
                return


def _links(path: Path) -> Iterator[Path]:
    """Yield *path* and every link between it and the file: k8s mounts lead through ``..data``, which is swapped."""
    current = path.absolute()
    for _ in range(_MAX_LINKS):
        yield current
        link = next((p for p in (current, *current.parents) if p.is_symlink()), None)
        if link is None:
            return
        if link != current:
            yield link
        target = link.parent / os.readlink(link)
        current = Path(os.path.normpath(target / current.relative_to(link)))


def _watched(path: Path) -> list[Path]:
    """Return the directories in which a step on the way to the file can be exchanged, and the file."""
    steps = list(_links(path))
    directories = [next(parent for parent in step.parents if parent.is_dir()) for step in steps]
    files = [path.absolute()] if path.is_file() else []
    return list(dict.fromkeys([*directories, *files]))


def _state(path: Path) -> _State:
    """Return what identifies the content that *path* leads to now, without reading it."""
    links = []
    for step in _links(path):
        try:
            links.append(os.readlink(step))
        except OSError:
            links.append("")
    try:
        info = path.stat()
    except OSError as error:
        return (*links, error.errno)
    return (*links, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
