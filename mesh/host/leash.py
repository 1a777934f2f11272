"""Tie a process to its parent's life, then become another program: ``python -I -S -E leash.py PARENT_PID ARGV...``.

Linux only. Asks the kernel for SIGKILL when the parent dies (PR_SET_PDEATHSIG survives exec), and becomes ARGV. A
separate program, because the only other place for it is ``preexec_fn``: Python code between fork and exec, which may
deadlock in a process with threads. Costs some 10 ms. Imports nothing of mesh.
"""

from __future__ import annotations

import os
import signal
import sys

PR_SET_PDEATHSIG = 1
#: the shell's exit code for "found, but could not be executed"
CANNOT_EXECUTE = 126


def main(parent_pid: int, argv: list[str]) -> int:
    """Become *argv*; return only if that is impossible."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        return CANNOT_EXECUTE
    for (
        number
    ) in signal.valid_signals():  # exec passes on what Python, or a shell that made us a background job, ignores
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"error: cannot execute {argv[0]}: {error.strerror}", file=sys.stderr)
    return CANNOT_EXECUTE


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
