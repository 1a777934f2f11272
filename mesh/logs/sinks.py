"""Where log lines end: a descriptor, and a file that rotates daily.

A sink that fails says so once on stderr and is tried again with later lines; it never raises, because there is nobody
left to tell. Only the writer thread calls sinks, so none of this can hold up a request.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, date, datetime
from pathlib import Path
from select import select
from typing import Protocol


class Sink(Protocol):
    """Where lines end. Called by the writer thread only."""

    def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...


class FdSink:
    """stdout, or any descriptor. Not owned: never closed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._broken = False

    def write(self, data: bytes) -> None:
        try:
            _write_all(self._fd, b"\n" + data if self._broken else data)  # the last line may be there in part
            self._broken = False
        except OSError as error:  # the reader is gone, or stdout is a file on a full disk
            if not self._broken:
                complain(f"cannot write logs to descriptor {self._fd}: {error}")
            self._broken = True

    def close(self) -> None:
        """Nothing to do: the descriptor belongs to the process."""


class FileSink:
    """``directory/filename`` for today; earlier days as ``filename.YYYY-MM-DD[.gz]``, the newest of them kept."""

    def __init__(
        self,
        path: Path,
        *,
        max_keep_files: int,
        compress: bool,
        today: Callable[[], date] = lambda: datetime.now(UTC).date(),
    ) -> None:
        self._path = path
        self._max_keep_files = max_keep_files
        self._compress = compress
        self._today = today
        self._fd = -1
        self._day = today()
        self._inode = 0
        self._torn = False  # the last line was written in part
        self._broken = False
        self._tidying: threading.Thread | None = None

    def write(self, data: bytes) -> None:
        try:
            self._open_for_today()
            _write_all(self._fd, b"\n" + data if self._torn else data)
            self._torn = self._broken = False
        except OSError as error:
            self._torn = self._fd >= 0
            if not self._broken:
                complain(f"cannot write the log file {self._path}: {error}; logging goes on without it")
            self._broken = True

    def close(self) -> None:
        self._close_fd()
        if self._tidying is not None:
            self._tidying.join()

    def _open_for_today(self) -> None:
        today = self._today()
        if self._fd >= 0 and today == self._day and self._still_there():
            return
        self._close_fd()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rotated = self._rotate(today)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        starting, self._inode = self._inode == 0, os.fstat(self._fd).st_ino
        self._day = today
        if starting or rotated:
            self._tidy()

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _still_there(self) -> bool:
        """Whether the path still names our open file; somebody's logrotate may have moved it."""
        try:
            return self._path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    def _rotate(self, today: date) -> bool:
        """Move the file of an earlier day aside, also one that an earlier run of the node left.

        Only a file has earlier days: a device or a pipe that the name leads to is older than any of its lines.
        """
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(found.st_mode):
            return False
        ours = found.st_ino == self._inode  # or another process has already put a new one there
        day = self._day if ours else datetime.fromtimestamp(found.st_mtime, UTC).date()
        if day >= today:
            return False
        self._path.replace(_free_name(self._path.with_name(f"{self._path.name}.{day}")))
        return True

    def _tidy(self) -> None:
        if self._tidying is not None:
            self._tidying.join()
        self._tidying = threading.Thread(target=self._compress_and_prune, name="log-tidy", daemon=True)
        self._tidying.start()

    def _compress_and_prune(self) -> None:
        try:
            compress_and_prune(self._path, max_keep_files=self._max_keep_files, compress=self._compress)
        except OSError as error:
            complain(f"cannot tidy up old log files beside {self._path}: {error}")


def _free_name(wanted: Path) -> Path:
    """Return *wanted*, or with a number if that day has a file already: a log is never overwritten."""
    taken = {path.name.removesuffix(".gz") for path in wanted.parent.iterdir()}
    numbered = (wanted.with_name(f"{wanted.name}.{n}") for n in range(1, len(taken) + 2))
    return next(path for path in (wanted, *numbered) if path.name not in taken)


def compress_and_prune(path: Path, *, max_keep_files: int, compress: bool) -> None:
    """gzip the rotated files of *path* and delete all but the newest. Idempotent, and repairs an interrupted run."""
    pattern = re.compile(re.escape(path.name) + r"\.\d{4}-\d\d-\d\d(\.\d+)?(\.gz)?(\.tmp)?")
    found = sorted((p for p in path.parent.iterdir() if pattern.fullmatch(p.name)), key=lambda p: p.name, reverse=True)
    for unfinished in (p for p in found if p.suffix == ".tmp"):
        unfinished.unlink()
    rotated = [p for p in found if p.suffix != ".tmp"]
    for old in rotated[max_keep_files:]:
        old.unlink()
    for plain in rotated[:max_keep_files]:
        if compress and plain.suffix != ".gz":
            _gzip(plain)


def _gzip(plain: Path) -> None:
    target = plain.with_name(f"{plain.name}.gz")
    scratch = plain.with_name(f"{plain.name}.gz.tmp")
    try:
        with plain.open("rb") as source, gzip.open(scratch, "wb") as packed:
            shutil.copyfileobj(source, packed, 1 << 20)
        scratch.replace(target)
        plain.unlink()
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # somebody made the shared descriptor non-blocking
            select([], [fd], [], 1.0)


def complain(text: str) -> None:
    """Say it on stderr, which is all that is left when logging itself fails."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(f"llama-mesh: {text}", file=sys.stderr, flush=True)
