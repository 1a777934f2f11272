"""Why a child ended, in one sentence and in one word, from its exit code and its last words. Pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from enum import StrEnum

#: what llama.cpp, whisper.cpp, ggml, the C++ runtime and the dynamic linker say when they give up
_COMPLAINT = re.compile(
    r"(?-i:(?:^|\s)E\s)|\berror\b|\bfailed\b|cannot|couldn't|could not|unable to|GGML_ASSERT|terminate called"
    r"|what\(\):|out of memory|no such file|invalid model data",
    re.IGNORECASE,
)
#: complaints that only repeat an earlier one
_ECHO = re.compile(
    r"exiting due to|see the lines above|terminate called|Failed to init server|failed to load model"
    r"|error loading model\s*$|failed to initialize whisper context"
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

#: what ggml, its backends, the C++ library and mmap say when an allocation fails. The CPU's texts were provoked with
#: b11549; those of CUDA, HIP, Vulkan, SYCL and Metal are from llama.cpp's sources
_OUT_OF_MEMORY = re.compile(
    r"out of memory|out_?of_?(?:device_?|host_?)?_?memory|insufficient memory|cannot allocate memory|bad_alloc"
    r"|failed to allocate|unable to allocate|can't allocate|resource allocation failed|CUBLAS_STATUS_ALLOC_FAILED"
    r"|memory allocation of size \d+ failed|malloc failed",
    re.IGNORECASE,
)
#: allocations whose failure costs speed only: llama.cpp says so and goes on without
_DISPENSABLE = re.compile(r"pinned|mlock|memlock", re.IGNORECASE)
#: after this, what failed before was done again in another way
_RETRIES = re.compile(r"retrying without", re.IGNORECASE)
_INFORMS = re.compile(r"^(?:\d+\.)+\d+\s+[DIW]\s")  # llama.cpp's time and a level below error
_USAGE = re.compile(
    r"^error: (?:invalid argument|unknown argument|unrecognized)|^error while handling (?:argument|environment)"
    r"|the argument has been removed|requires? flash_attn|unsupported cache type|expected value for argument"
    r"|^error: (?:unknown language|cannot use both|unknown DTW preset)",
    re.IGNORECASE,
)
#: llama-server and whisper-server
_NO_PORT = re.compile(r"couldn't bind (?:HTTP|to) server socket", re.IGNORECASE)
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)


class Cause(StrEnum):
    """What can be done about a load that failed."""

    MEMORY = "memory"  #: more room may help
    USAGE = "usage"  #: only an edit of the profile helps
    PORT = "port"  #: somebody else has its port: another one helps
    OTHER = "other"


def classify(returncode: int, log_tail: Sequence[str], *, asked: bool = False) -> Cause:
    """Return the cause; *asked* says that the node told it to stop."""
    if asked:
        return Cause.OTHER
    last_retry = max((i for i, line in enumerate(log_tail) if _RETRIES.search(line)), default=-1)
    errors = [line for line in log_tail[last_retry + 1 :] if not _INFORMS.match(line)]
    if returncode in _KILLED or any(_OUT_OF_MEMORY.search(e) and not _DISPENSABLE.search(e) for e in errors):
        return Cause.MEMORY
    if any(_NO_PORT.search(line) for line in errors):
        return Cause.PORT
    usage = any(_USAGE.search(_PREFIX.sub("", line)) for line in errors)
    return Cause.USAGE if usage else Cause.OTHER


def describe_exit(
    returncode: int, log_tail: Sequence[str], *, asked: bool = False, program: str = "llama-server"
) -> str:
    """Return what happened to *program*; *asked* says that the node told it to stop."""
    how = _how(returncode)
    if asked:
        return f"{program} stopped: {how}"
    cause = first_complaint(log_tail)
    ended = f"{program} ended by itself: {how}"
    return f"{cause} ({ended})" if cause else ended


def first_complaint(log_tail: Sequence[str]) -> str | None:
    """Return the line that names the cause: the first complaint, for those after it are its consequences."""
    complaints = [line for line in log_tail if _COMPLAINT.search(line)]
    harmful = [line for line in complaints if not _DISPENSABLE.search(line)]
    errors = [line for line in harmful if not _INFORMS.match(line)]
    original = next((line for line in (*errors, *harmful) if not _ECHO.search(line)), None)
    line = original or next(iter((*errors, *complaints)), None)
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
