"""Files that are replaced whole (trap 97), and files that nobody else may read (trap 103). Everything here blocks."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mesh.errors import ConfigError

PRIVATE = 0o600

#: Keys, tokens and lists of peers are much smaller; what is larger was put there by mistake.
_LARGEST = 8 * 1024**2


def replace_file(path: Path, content: bytes, *, mode: int | None = None) -> os.stat_result:
    """Put *content* in the place of *path*; a crash leaves the old file or the new one, never half of one.

    With a *mode* the file has exactly that, whatever the umask, and nobody can read it sooner. Two processes must not
    replace one file at once (see ``locked``). Raise ``OSError`` if it cannot be written; then nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.tmp")
    try:
        if mode is not None:
            scratch.unlink(missing_ok=True)  # whoever has an old one open must not see what comes now
        with scratch.open("wb") if mode is None else _new_private(scratch) as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
                _give_to_owner(file.fileno(), path)
            written = _write(file, content)
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    if mode is not None:
        _sync_directory(path.parent)
    return written


def create_file(path: Path, content: bytes, *, mode: int = PRIVATE) -> bool:
    """Make *path* with *content* and exactly *mode*, unless it is there: then return False and touch nothing.

    The name appears together with the whole content, for one of several processes that try at once.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # with mode 0600
    scratch = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            _give_to_owner(descriptor, path)
            _write(file, content)
        created = _take_name(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    if created:
        _sync_directory(path.parent)
    return created


def _take_name(scratch: Path, path: Path) -> bool:
    """Give *scratch* the name *path*, unless it is taken: ``rename`` would overwrite, ``link`` does not."""
    try:
        os.link(scratch, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        with locked(path):  # no hard links here (FAT, some network shares)
            if os.path.lexists(path):
                return False
            scratch.replace(path)
    return True


def private_directory(path: Path) -> None:
    """Make *path*, and what is missing above it, for this user alone; one that is there is left as it is."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    for directory in reversed(missing):
        directory.mkdir(mode=0o700, exist_ok=True)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep out everybody else who changes *path* in this way, in other processes and threads.

    The lock file stays: if it were removed, two could hold locks on two files of the same name.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path.with_name(f"{path.name}.lock"), flags, PRIVATE)
    try:
        _give_to_owner(descriptor, path)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def read_file(path: Path, *, largest: int = _LARGEST) -> tuple[bytes, os.stat_result]:
    """Return what is in *path* and its status at that time; never wait for a pipe, never swallow a disk image."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(largest + 1)
    finally:
        os.close(descriptor)
    if len(content) > largest:
        raise OSError(errno.EFBIG, f"larger than {largest} bytes", str(path))
    return content, status


def read_private(path: Path) -> bytes:
    """Return what is in *path*. Raise ``ConfigError`` if others may access it or it cannot be read.

    ``FileNotFoundError`` passes: whether the file must exist, the caller knows.
    """
    try:
        content, status = read_file(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise ConfigError(f"{path}: other users may access this file (mode {mode:04o}); run: chmod 600 {path}")
    return content


def _new_private(path: Path) -> BinaryIO:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE)
    return os.fdopen(descriptor, "wb")


def _write(file: BinaryIO, content: bytes) -> os.stat_result:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
    return os.fstat(file.fileno())


def _give_to_owner(descriptor: int, path: Path) -> None:
    """Let what root makes belong to the owner of the file that it replaces, or of the directory: the node's user."""
    if os.geteuid() != 0:
        return
    known = path if path.exists() else path.parent
    owner = known.stat()
    os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _sync_directory(directory: Path) -> None:
    """Make sure that a name survives a power cut, too."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_dir(environ: Mapping[str, str]) -> Path:
    """Return where downloads are kept: $LLAMA_MESH_CACHE, else llama-mesh in the user's cache directory."""
    if chosen := environ.get("LLAMA_MESH_CACHE"):
        return Path(chosen).expanduser()
    home_cache = environ.get("XDG_CACHE_HOME")
    return (Path(home_cache) if home_cache else Path.home() / ".cache") / "llama-mesh"
