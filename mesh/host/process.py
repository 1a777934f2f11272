"""One child process in its own group: start it, drain what it prints, signal it, learn that it ended.

Owns the process, its output pipe and the promise that nothing of its group is left when ``on_exit`` is called. Knows
nothing of models or health. Everything runs on the event loop's thread; works on uvloop and on stock asyncio.

The subtle part is the end. A pidfd (elsewhere: a waiting thread) tells the loop that the leader is a zombie. While it
is not reaped, its process group id cannot be given to anybody else, so that is the moment to SIGKILL what is left of
the group (trap 14). Only then is it reaped. The output pipe plays no part in it: a grandchild that holds it open
delays nothing (trap 15).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mesh.errors import InstanceError
from mesh.host import leash
from mesh.host.logring import LogRing
from mesh.host.warden import Warden, kill_session

_READ_BYTES = 64 * 1024
#: what is read from the pipe after the end, at most; it holds no more unless somebody keeps writing
_LAST_READ_BYTES = 1024 * 1024


class Process:
    """A running child. Use ``Process.start``."""

    def __init__(self, popen: subprocess.Popen[bytes], on_exit: Callable[[int], None], ring: LogRing) -> None:
        self._popen = popen
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._output: int | None = None
        self._pidfd: int | None = None
        self._warden: Warden | None = None
        self._whole_session = False
        self.ring = ring
        self.pid = popen.pid
        self.returncode: int | None = None
        self.last_output_at = self._loop.time()
        self.on_output: Callable[[], None] | None = None  #: called after each piece of output

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | Path | None = None,
        on_exit: Callable[[int], None],
        ring: LogRing,
        warden: Warden | None = None,
        whole_session: bool = False,
    ) -> Process:
        """Start *argv*; *on_exit* is called once, on the loop, with the exit code (negative: the signal).

        *whole_session*: descendants that made process groups of their own, as ninja's do, end with it, too.
        Raise ``InstanceError`` with cause and fix if it cannot be started.
        """
        _check_executable(argv[0], env)
        read_end, write_end = os.pipe()
        try:
            if warden is not None:
                warden.start()
            popen = subprocess.Popen(
                _tied_to_us(argv),
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            os.close(read_end)
            raise InstanceError(f"cannot start {argv[0]}: {error.strerror}{_fix(error)}") from error
        finally:
            os.close(write_end)
        process = cls(popen, on_exit, ring)
        process._whole_session = whole_session
        process._watch(read_end, warden)
        return process

    def signal_group(self, number: signal.Signals) -> None:
        """Send *number* to the process and all its descendants; nothing happens once it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
                os.killpg(self.pid, number)

    # -- output

    def _watch(self, output: int, warden: Warden | None) -> None:
        os.set_blocking(output, False)
        self._output = output
        self._loop.add_reader(output, self._read)
        if warden is not None:
            self._warden = warden
            warden.register(self.pid)
        self._pidfd = _open_pidfd(self.pid)
        if self._pidfd is not None:
            self._loop.add_reader(self._pidfd, self._ended)
        else:
            threading.Thread(target=self._wait_in_thread, name=f"wait-{self.pid}", daemon=True).start()

    def read_now(self) -> None:
        """Take what it has written up to now."""
        read = 0
        while read < _LAST_READ_BYTES and (count := self._read_once()):
            read += count
            self.last_output_at = self._loop.time()

    def _read(self) -> None:
        """Take what the pipe holds; always as much as it offers, so that the child never blocks on its log."""
        if self._read_once():
            self.last_output_at = self._loop.time()
            if self.on_output is not None:
                self.on_output()

    def _read_once(self) -> int:
        if self._output is None:
            return 0
        try:
            data = os.read(self._output, _READ_BYTES)
        except BlockingIOError:
            return 0
        if data:
            self.ring.feed(data)
        else:
            self._close_output()  # the child closed it; that says nothing about its end
        return len(data)

    def _close_output(self) -> None:
        if self._output is not None:
            self._loop.remove_reader(self._output)
            os.close(self._output)
            self._output = None

    # -- the end

    def _wait_in_thread(self) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(self._ended)

    def _ended(self) -> None:
        """The leader is a zombie: end its group, reap it, and tell."""
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        self.signal_group(signal.SIGKILL)
        if self._whole_session:
            kill_session(self.pid)
        self.returncode = self._popen.wait()  # does not block: it is a zombie
        if self._warden is not None:
            self._warden.unregister(self.pid)
        read = 0
        while read < _LAST_READ_BYTES and (count := self._read_once()):
            read += count
        self._close_output()
        self.ring.close()
        self._on_exit(self.returncode)


def _open_pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when *pid* ends; None where there is no such thing."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, or a sandbox that forbids it
        return None


def _tied_to_us(argv: Sequence[str]) -> list[str]:
    """Return the command that runs *argv* and dies with this process."""
    if sys.platform != "linux":
        return list(argv)
    return [sys.executable, "-I", "-S", "-E", leash.__file__, str(os.getpid()), *argv]


def _check_executable(program: str, env: Mapping[str, str]) -> None:
    """Raise now what exec would find out only in the child."""
    if shutil.which(program, path=env.get("PATH", os.defpath)) is not None:
        return
    path = Path(program)
    if path.is_dir():
        problem = "it is a directory"
    elif path.exists():
        problem = f"it is not executable; chmod +x {program}"
    else:
        problem = "no such file; correct the path, or install it"
    raise InstanceError(f"cannot start {program}: {problem}")


def _fix(error: OSError) -> str:
    fixes = {
        errno.EMFILE: "; raise the limit of open files (ulimit -n)",
        errno.ENFILE: "; the system has no file descriptors left",
        errno.EAGAIN: "; raise the limit of processes (ulimit -u)",
        errno.ENOMEM: "; free memory",
        errno.E2BIG: "; the arguments or the environment are too long",
    }
    return fixes.get(error.errno or 0, "")
