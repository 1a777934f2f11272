"""The cache of downloads and of what is made of them: where it is, who may fill it, which files in it are intact."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from mesh.cli.failure import CliError
from mesh.cli.package_index import Index, PinnedFile, sha256_of
from mesh.files import cache_dir as cache_dir  # it belongs to this module's vocabulary

ROOM_FIX = "Free some space, or set LLAMA_MESH_CACHE to a directory on a larger disk."


@contextmanager
def locked(directory: Path, console: Console) -> Iterator[None]:
    """Let one process at a time fill the cache; the kernel drops the lock when its holder dies."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise CliError(
            f"cannot write to the cache {directory}: {error.strerror}",
            fix="Set LLAMA_MESH_CACHE to a directory that you may write to.",
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"[dim]another process is using {directory}; waiting for it[/]")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_intact(path: Path, file: PinnedFile) -> bool:
    """A file of another size or content (a full disk, a curious editor) has to be fetched again."""
    return path.is_file() and path.stat().st_size == file.size_bytes and sha256_of(path) == file.sha256


def fetch(index: Index, file: PinnedFile, directory: Path, console: Console, name: str) -> Path:
    """Return the path of *file* in *directory*, fetched with a progress bar that says *name*."""
    target = directory / file.filename
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=file.size_bytes)
        index.fetch(file, target, lambda done, total: progress.update(task, completed=done))
    return target


def keep(source: IO[bytes], target: Path, file: PinnedFile, *, origin: Path) -> None:
    """Put what *source* holds at *target*, whole or not at all. Raise ``CliError`` if it is not *file*."""
    partial = target.with_name(target.name + ".part")
    try:
        with partial.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CliError(f"cannot write {partial}: {error.strerror}", fix=ROOM_FIX) from error
    if not is_intact(partial, file):
        partial.unlink()
        raise CliError(
            f"{origin.name} does not hold the expected {file.filename}", fix=f"Delete {origin.parent} and try again."
        )
    partial.replace(target)
