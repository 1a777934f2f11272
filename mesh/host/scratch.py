"""Empty directories of their own for children: what one leaves there is gone with it, or with the next node.

Each node has a directory below the root, with a lock that the kernel drops when the node dies: whoever can take the
lock of another's directory may remove it. So nodes that share a root do not clear each other's away. Blocks, shortly.
What a child leaves while it lives is ``Leftovers``' business.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Final

from mesh.errors import InstanceError
from mesh.files import private_directory
from mesh.logs import Log
from mesh.tasks import wall_time

_log: Final = Log(__name__)

_LOCK: Final = ".lock"
_PREFIX: Final = "node-"
_NEW: Final = ".new-"
_GONE: Final = ".gone-"
#: far longer than making a directory takes
FORGOTTEN_S: Final = 3600.0


class Scratch:
    """The directories of one node. Without a *root* they are in the system's own directory for temporary files."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or Path(tempfile.gettempdir()) / _name()
        self._own: Path | None = None
        self._lock: int | None = None
        self._removing = threading.Lock()  #: held while something is removed: two at once would miss some of it

    @classmethod
    def below(cls, directory: Path) -> Scratch:
        """Return one in *directory*, which may be everybody's."""
        return cls(directory / _name())

    def take(self, name: str) -> Path:
        """Return a new and empty directory that only this user can enter; raise ``InstanceError`` if there is none."""
        try:
            return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._home()))
        except OSError as error:
            where = f"{error.filename or self._root}: {error.strerror}"
            raise InstanceError(f"cannot make a directory for it, {where}") from error

    def put_away(self, directory: Path) -> Path:
        """Give *directory* a name that nobody looks at, and return that: at once, while to remove it may take long."""
        try:
            return directory.rename(directory.with_name(_GONE + directory.name))
        except OSError:
            return directory

    def give_back(self, directory: Path) -> None:
        """Remove *directory* with all that is in it. Idempotent."""
        with self._removing:
            shutil.rmtree(directory, ignore_errors=True)

    def clear(self) -> None:
        """Remove what nodes left behind that are gone."""
        with contextlib.suppress(OSError):
            for directory in self._root.iterdir():
                if directory == self._own or directory.is_symlink():
                    continue
                if directory.name.startswith(_PREFIX):
                    _remove_if_dead(directory)
                elif directory.name.startswith(_NEW) and directory.stat().st_mtime < wall_time() - FORGOTTEN_S:
                    shutil.rmtree(directory, ignore_errors=True)

    def close(self) -> None:
        """Remove everything. Idempotent; a later ``take`` begins anew."""
        if self._own is not None:
            self.give_back(self._own)
            self._own = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        with contextlib.suppress(OSError):  # another node's are in it, or nobody ever took one
            self._root.rmdir()

    def _home(self) -> Path:
        if self._own is None or not self._own.is_dir():
            self._make_home()
        assert self._own is not None, "it was just made"
        return self._own

    def _make_home(self) -> None:
        private_directory(self._root)
        status = self._root.lstat()
        if self._root.is_symlink() or status.st_uid != os.getuid():
            raise PermissionError(1, "belongs to another user, or is a link; move it away", str(self._root))
        if status.st_mode & 0o022:
            raise PermissionError(1, f"others may write there; run: chmod 700 {self._root}", str(self._root))
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        new = Path(tempfile.mkdtemp(prefix=_NEW, dir=self._root.resolve()))
        self._lock = os.open(new / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # it gets the name by which others look for the dead only now that it is locked
        self._own = new.rename(new.with_name(_PREFIX + new.name.removeprefix(_NEW)))


class Leftovers:
    """The files that requests leave in the directory of one instance; they go once the requests are over.

    No clock is asked: a file that is seen belongs to a request that had begun by then, so once all of those are over
    it is nobody's. One of a request that goes on is never touched. What a request leaves after its end (the instance
    may work on for one whose client left) is of use to nobody either, and goes the next time.
    ``begin`` and ``end`` belong to one thread, ``clear`` to another, one call at a time.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._begun = 0
        self._going_on: frozenset[int] = frozenset()  #: swapped whole, for the thread that clears
        self._seen: dict[str, int] = {}  #: file name -> how many requests had begun when it was first seen
        self._complained = False

    def begin(self) -> int:
        """Count one more request, before it can leave anything; return its number."""
        self._begun += 1
        self._going_on |= {self._begun}
        return self._begun

    def end(self, number: int) -> None:
        """The request with that *number* is over. Idempotent."""
        self._going_on -= {number}

    def clear(self) -> None:
        """Remove what is nobody's any more. Blocks. What cannot be removed is logged, once, and tried again."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:  # it went with its instance
            return
        except OSError as error:
            self._complain(error)
            return
        begun = self._begun  # to be read after the names, and before who goes on
        oldest = min(self._going_on, default=begun + 1)
        seen = {name: self._seen.get(name, begun) for name in names}
        self._seen = {name: number for name, number in seen.items() if number >= oldest}
        for name in seen.keys() - self._seen.keys():
            try:
                (self._directory / name).unlink(missing_ok=True)
            except OSError as error:
                self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            _log.warning("what a request left behind cannot be removed", path=error.filename, error=error.strerror)


def _name() -> str:
    """Return what the root is called in a directory where others have theirs."""
    return f"llama-mesh-scratch-{os.getuid()}"


def _remove_if_dead(directory: Path) -> None:
    """Remove *directory* unless its node lives, for then it is locked."""
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:  # who removed it before was killed over it
        shutil.rmtree(directory, ignore_errors=True)
        return
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    else:
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(lock)
