"""Why a child ended, in one sentence, from its exit code and its last words. Pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

#: what llama.cpp, ggml, the C++ runtime and the dynamic linker say when they give up
_COMPLAINT = re.compile(
    r"(?-i:(?:^|\s)E\s)|\berror\b|\bfailed\b|cannot|couldn't|could not|unable to|GGML_ASSERT|terminate called"
    r"|what\(\):|out of memory|no such file",
    re.IGNORECASE,
)
#: complaints that only repeat an earlier one
_ECHO = re.compile(
    r"exiting due to|terminate called|Failed to init server|failed to load model|error loading model\s*$"
)
_PREFIX = re.compile(r"^(?:\d+\.)+\d+\s+[A-Z]\s+")  # llama.cpp's time and level
_HINTS = {
    -signal.SIGKILL: "killed by SIGKILL; if nobody did that on purpose, the system ran out of memory",
    -signal.SIGILL: "illegal instruction: this binary was built for another CPU",
    -signal.SIGSEGV: "segmentation fault",
    -signal.SIGABRT: "aborted",
    128 + signal.SIGILL: "illegal instruction: this binary was built for another CPU",
    128 + signal.SIGABRT: "aborted",
}
MAX_REASON_CHARACTERS = 300


def describe_exit(returncode: int, log_tail: Sequence[str], *, asked: bool = False) -> str:
    """Return what happened; *asked* says that the node told it to stop."""
    how = _how(returncode)
    if asked:
        return f"llama-server stopped: {how}"
    cause = first_complaint(log_tail)
    ended = f"llama-server ended by itself: {how}"
    return f"{cause} ({ended})" if cause else ended


def first_complaint(log_tail: Sequence[str]) -> str | None:
    """Return the line that names the cause: the first complaint, for those after it are its consequences."""
    complaints = [line for line in log_tail if _COMPLAINT.search(line)]
    original = next((line for line in complaints if not _ECHO.search(line)), None)
    line = original or next(iter(complaints), None)
    return _PREFIX.sub("", line).strip()[:MAX_REASON_CHARACTERS] if line else None


def _how(returncode: int) -> str:
    if hint := _HINTS.get(returncode):
        return hint
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"
