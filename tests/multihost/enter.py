"""Become a program inside a namespace: ``python -I -S -E enter.py PARENT USER_NAMESPACE|- NETWORK_NAMESPACE ARGV...``.

A program of its own, because a process with threads may not join a user namespace, and since a program that was started
this way is still the child of who started it. It dies with its parent: a lab whose test run was killed leaves nothing.
"""

from __future__ import annotations

import os
import signal
import sys

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1


def main(parent: int, user: str, network: str, argv: list[str]) -> int:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    for path, kind in ((user, CLONE_NEWUSER), (network, CLONE_NEWNET)):
        if path == "-":
            continue
        if libc.setns(os.open(path, os.O_RDONLY | os.O_CLOEXEC), kind) != 0:
            print(f"cannot enter {path}: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
            return 126
    libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)  # last: entering a user namespace takes it back
    if os.getppid() != parent:
        return 126
    for number in signal.valid_signals():  # Python ignores SIGPIPE, and exec would pass that on
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]))
