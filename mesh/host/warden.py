"""A second process that outlives the node by a moment: when the node dies, however it dies, it kills the children.

The node holds the write end of a pipe and tells the warden which process groups are alive. End of file means that the
node is gone, SIGKILL included; then every group that is still registered gets SIGKILL. That covers what the kernel's
parent-death signal does not: grandchildren (a ``bash -c`` wrapper's llama-server), and macOS (trap 13). Each group
leads a session of its own, and what left the group dies with the session: ninja gives every compiler its own group.

This file is both sides: ``Warden`` in the node, and ``main``, run as ``python -I -S -E warden.py``, which must import
nothing of mesh.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys


class Warden:
    """The node's side. Starts the process with the first group, and again if somebody killed it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: set[int] = set()

    @property
    def pid(self) -> int | None:
        """The warden process, once there is one."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process if it does not run. Raise ``OSError`` if that is impossible."""
        if self._process is None or self._process.poll() is not None:
            self._start()

    def register(self, group: int) -> None:
        """Kill *group* when this process dies."""
        self._groups.add(group)
        self._update(f"+{group}\n")

    def unregister(self, group: int) -> None:
        """*group* is gone; its number may be given to somebody else."""
        self._groups.discard(group)
        self._update(f"-{group}\n")

    def close(self) -> None:
        """Let the warden end; whatever is still registered is killed. Blocks for a few milliseconds. Idempotent."""
        if self._process is not None:
            self._reap(self._process)
        self._process = None

    def _update(self, message: str) -> None:
        """Tell the warden; a dead one is replaced. A failure is logged, and the next call tries again."""
        if self._process is not None and self._tell(message):
            return
        try:
            self._start()
        except OSError:
            import logging  # not at the top: the other side of this file would pay for it

            logging.getLogger("mesh.host.warden").exception("no warden: if this node is killed, children may survive")

    def _start(self) -> None:
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-E", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C and "kill the node's group" must not reach it
        )
        self._tell("".join(f"+{group}\n" for group in sorted(self._groups)))

    def _tell(self, message: str) -> bool:
        """Write *message*; False if the warden is gone."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(message.encode())
        except (OSError, ValueError):  # it died; or it was closed, at the very end
            return False
        return True

    @staticmethod
    def _reap(process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait()


def kill_session(session: int) -> None:
    """Kill what is left of *session*, whose leader has ended or is being killed, in whatever process groups it is.

    As long as the leader is not reaped, or anything else is left, its number is given to nobody else.
    """
    seen: set[int] = set()
    while new := {pid for pid in _pids() if pid != session and _session_of(pid) == session} - seen:
        seen |= new  # once more: what was killed may have started something in its last moment
        for pid in new:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _pids() -> list[int]:
    if os.path.isdir("/proc/self"):
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    try:
        listed = subprocess.run(["ps", "-axo", "pid="], stdout=subprocess.PIPE, check=False).stdout
    except OSError:
        return []
    return [int(word) for word in listed.split()]


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:  # it is gone, or macOS does not say it of somebody else's
        return None


def main() -> None:
    """Follow the node's messages to their end, then kill what is left."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # a service manager signals every process at once,
        signal.signal(number, signal.SIG_IGN)  # but the node may need its grace period, and the warden with it
    groups: set[int] = set()
    for line in sys.stdin.buffer:
        group = int(line[1:])
        (groups.add if line[:1] == b"+" else groups.discard)(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        kill_session(group)


if __name__ == "__main__":
    main()
