"""Where the bytes of an upload wait: in memory up to a size, past it in a file that has no name.

The file is in a directory of this user's own and is unlinked before the first byte is written (where the system can, it
never had a name), so that nothing stays of it whatever becomes of the process. Read back through a mapping: the body is
a memoryview, nothing is copied. Writing blocks the loop for as long as the page cache takes, about 0.1 ms per 256 KiB.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from mesh.errors import MeshError

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_TOO_MANY_FILES = frozenset({errno.EMFILE, errno.ENFILE})
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})


class SpoolError(MeshError):
    """The upload cannot be kept here; the operator has to look at the directory that the message names."""

    type = "spool_failed"


class SpoolFullError(SpoolError):
    """There is no room for the upload."""

    status = 507
    type = "insufficient_storage"


class SpooledBody:
    """A whole body. ``view`` is valid until ``close``; parts of it that are still in use keep the rest alive."""

    __slots__ = ("_mapping", "view")

    def __init__(self, view: memoryview, mapping: mmap.mmap | None = None) -> None:
        self.view = view
        self._mapping = mapping

    def close(self) -> None:
        """Let it go. Idempotent."""
        self.view = memoryview(b"")
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            with suppress(BufferError):  # a slice is still in use; the last one that goes takes the mapping with it
                mapping.close()


class Spool:
    """Takes the bytes of one body. Ends with ``finish`` or ``close``."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._memory = bytearray()
        self._file: int | None = None
        self.size = 0

    def write(self, data: bytes) -> None:
        """Append *data*; raise ``SpoolError`` if it cannot be kept, after which nothing is kept."""
        self.size += len(data)
        if self._file is None and self.size <= self._memory_bytes:
            self._memory += data
            return
        try:
            if self._file is None:
                self._file = _open_unlinked(spool_directory())
                _write_all(self._file, self._memory)
                self._memory = bytearray()
            _write_all(self._file, data)
        except OSError as error:
            self.close()
            raise _explained(error) from error

    def finish(self) -> SpooledBody:
        """Return all that was written."""
        memory, self._memory = self._memory, bytearray()
        if self._file is None:
            return SpooledBody(memoryview(memory).toreadonly())
        try:
            mapping = mmap.mmap(self._file, self.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise _explained(error) from error
        finally:
            self.close()
        return SpooledBody(memoryview(mapping), mapping)

    def close(self) -> None:
        """Give everything up. Idempotent."""
        self._memory = bytearray()
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


def spool_directory() -> Path:
    """Return where uploads are kept, which need not exist."""
    return Path(tempfile.gettempdir()) / f"llama-mesh-{os.geteuid()}"


def _open_unlinked(directory: Path) -> int:
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    try:
        opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise SpoolError(f"uploads cannot be kept: {directory} is not a directory; remove it") from error
        raise
    try:
        found = os.fstat(opened)  # of what was opened: whoever replaces it now comes too late
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise SpoolError(
                f"uploads cannot be kept: others may use {directory}; it must belong to the user of this node, with"
                " mode 0700. Remove it, or set TMPDIR to another place"
            )
        return _nameless(opened)
    finally:
        os.close(opened)


def _nameless(directory: int) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=directory)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
    name = secrets.token_hex(16)
    file = os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=directory)
    os.unlink(name, dir_fd=directory)
    return file


def _write_all(file: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _explained(error: OSError) -> SpoolError:
    directory = spool_directory()
    if error.errno in _NO_ROOM:
        return SpoolFullError(f"no room for this upload on the disk of {directory} (TMPDIR of the node moves it)")
    if error.errno in _TOO_MANY_FILES:
        return SpoolError(f"uploads cannot be kept: {error.strerror}; raise the limit of this node (ulimit -n)")
    return SpoolError(f"uploads cannot be kept in {directory}: {error.strerror} (TMPDIR of the node moves it)")
