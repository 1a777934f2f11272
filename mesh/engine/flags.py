"""Which of a profile's flags its engine does not know, found out before anything is started with them.

llama.cpp renames and removes flags, and every build has its own. ``--help`` lists what a binary knows; what is not
there counts as unknown only once the binary itself refuses it, for a wrong "unknown" would keep a model from starting.
Both are asked once per binary (``EngineBinary.identity``) and remembered. Whatever is in doubt is left unsaid: then the
start itself tells. Blocks, but for ``refused_before`` and ``lacks``.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mesh.config.diagnostics import suggestion
from mesh.config.llama_args import expand
from mesh.engine.kind import EngineKind, Option
from mesh.engine.locate import EngineBinary

#: a binary that takes longer is doing something else
LIMIT_S: Final = 10.0
#: that of b11549 has 60 kB
MAX_OUTPUT_BYTES: Final = 1 << 20
#: binaries that are remembered
_KEPT: Final = 32
#: what every llama-server has; help without them is that of something else
_PLAUSIBLE: Final = frozenset({"--model", "--port"})
#: renamed by llama.cpp, and not told by its help
_SUCCESSORS: Final[Mapping[str, str]] = {
    "--no-mmap": "--load-mode none",
    "--mmap": "--load-mode mmap",
    "--mlock": "--load-mode mlock",
}
_REFUSAL: Final = re.compile(r"(?:invalid|unknown|unrecognized) (?:argument|option)|argument has been removed")

#: an entry of the help begins at the margin; its description is far to the right, or in lines further in
_ENTRY: Final = re.compile(r" {0,4}(?=--?[A-Za-z])(?P<head>\S.*?)(?: {2,}(?P<text>.*))?")
_FLAG: Final = re.compile(r"--?[A-Za-z][\w.-]*")
_LISTED: Final = re.compile(r"(?:^|, )(--?[A-Za-z][\w.-]*)")
_REMOVED: Final = re.compile(r"the argument has been removed\.? *(?P<instead>.*)")


def known_flags(help_text: str) -> Mapping[str, Option]:
    """Return what *help_text* lists, by every name that it has; empty if it is not that of a llama-server."""
    found: dict[str, Option] = {}
    for head, text in _entries(help_text):
        names = _LISTED.findall(head)
        hint = head[head.rindex(names[-1]) + len(names[-1]) :].split()
        plain_pair = len(hint) == 2 and all(word.isupper() for word in hint)  # START END
        removed = _REMOVED.match(text)
        option = Option(2 if plain_pair else min(len(hint), 1), removed["instead"] if removed else None)
        found |= dict.fromkeys(names, option)
    return found if found.keys() >= _PLAUSIBLE else {}


def _entries(help_text: str) -> Iterator[tuple[str, str]]:
    """Yield the flags with their values, and the description, of each entry."""
    lines = [re.sub(r", +(?=-)", ", ", line) for line in help_text.splitlines()]  # "-h,    --help"
    for number, line in enumerate(lines):
        if (entry := _ENTRY.fullmatch(line)) is None or not _LISTED.search(entry["head"]):
            continue
        rest = [entry["text"] or ""]
        for more in lines[number + 1 :]:
            if not more.startswith("     ") or "(env: " in more:
                break
            rest.append(more)
        yield entry["head"], " ".join(" ".join(rest).split())


def unknown_flags(args: Iterable[str], known: Mapping[str, Option]) -> tuple[str, ...]:
    """Return the words of *args* that stand where a flag can stand and are none of *known*, each once."""
    found: list[str] = []
    values, after_unknown = 0, False
    for word in expand(args):
        if values:
            values -= 1
            continue
        may_be_value = after_unknown and not word.startswith("--")
        after_unknown = False
        if may_be_value or not _FLAG.fullmatch(word):  # such as "-1", "-" or a sentence
            continue
        option = known.get(_normal(word))
        if option is None or option.removed is not None:
            found.append(word)
        values, after_unknown = (0, True) if option is None else (option.values, False)
    return tuple(dict.fromkeys(found))


def _normal(word: str) -> str:
    """llama.cpp reads ``--ctx_size`` as ``--ctx-size``."""
    return word.replace("_", "-") if word.startswith("--") else word


@dataclass(slots=True, eq=False)
class _Known:
    """What one binary was asked so far."""

    lock: threading.Lock = field(default_factory=threading.Lock)  #: held while it is asked
    flags: Mapping[str, Option] | None = None  #: None = not asked yet; empty = it does not say
    refused: dict[str, bool] = field(default_factory=dict)


_binaries: dict[str, _Known] = {}
_binaries_lock = threading.Lock()


def refused(args: Sequence[str], engine: EngineBinary, env: Mapping[str, str], kind: EngineKind) -> str | None:
    """Return which flags of *args* the *engine* does not know, as a sentence; None if it knows all, or cannot say.

    *env*: that of a child. Asks the binary what it was not asked before.
    """
    if not args or not engine.identity:
        return None
    own_env = {name: value for name, value in env.items() if not name.startswith(kind.variables)}  # may be wrong, too
    with (known := _of(engine)).lock:
        if known.flags is None:
            known.flags = _ask_help(engine, own_env, kind)
        for flag in unknown_flags(args, known.flags) if known.flags else ():
            if flag not in known.refused:
                known.refused[flag] = _is_refused(engine, flag, own_env, kind)
    return refused_before(args, engine)


def refused_before(args: Sequence[str], engine: EngineBinary) -> str | None:
    """Return the same from memory, without asking anybody."""
    known = _binaries.get(engine.identity)
    if known is None or not known.flags:
        return None
    flags = [flag for flag in unknown_flags(args, known.flags) if known.refused.get(flag)]
    if not flags:
        return None
    return f"{engine.label} does not know " + ", ".join(f"{flag}{_advice(flag, known.flags)}" for flag in flags)


def lacks(engine: EngineBinary, flag: str) -> bool:
    """Whether *engine* was asked and does not list *flag*."""
    known = _binaries.get(engine.identity)
    return known is not None and bool(known.flags) and flag not in (known.flags or ())


def _advice(flag: str, known: Mapping[str, Option]) -> str:
    option = known.get(_normal(flag))
    if option is not None and option.removed is not None:
        return f" any more ({option.removed or 'it was removed'})"
    if (instead := _SUCCESSORS.get(flag)) and instead.split()[0] in known:
        return f" (use {instead})"
    close = suggestion(flag, (name for name, other in known.items() if other.removed is None), cutoff=0.7)
    return f" ({close.removeprefix('; ')})" if close else ""


def _of(engine: EngineBinary) -> _Known:
    with _binaries_lock:
        known = _binaries.pop(engine.identity, None) or _Known()
        _binaries[engine.identity] = known  # now the newest
        while len(_binaries) > _KEPT:
            del _binaries[next(iter(_binaries))]
        return known


def _ask_help(engine: EngineBinary, env: Mapping[str, str], kind: EngineKind) -> Mapping[str, Option]:
    answer = _output((*engine.argv, "--help"), env, directory_of(kind))
    return kind.known_flags(answer[1]) if answer is not None and answer[0] == 0 else {}


def _is_refused(engine: EngineBinary, flag: str, env: Mapping[str, str], kind: EngineKind) -> bool:
    """Whether the binary says so itself: a wrapper script may have flags of its own, which no help lists."""
    answer = _output((*engine.argv, flag, kind.check_flag), env, directory_of(kind))
    if answer is None or (answer[0] == 0 and 0 not in kind.usage_statuses):
        return False
    return any(flag in line and _REFUSAL.search(line) for line in answer[1].splitlines())


def directory_of(kind: EngineKind) -> Path | None:
    """Return where a program is asked about itself: one that looks about where it runs is not to see the node's."""
    return Path("/") if kind.needs_directory else None


def _output(argv: Sequence[str], env: Mapping[str, str], cwd: Path | None) -> tuple[int, str] | None:
    """Return exit status and output of a short run; None if it cannot be started, or does not end in time."""
    try:
        process = subprocess.Popen(argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    except OSError:
        return None
    with process:
        try:
            text = _read_all(process)
            return None if text is None else (process.wait(1), text)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what a wrapper script left behind, too


def _read_all(process: subprocess.Popen[bytes]) -> str | None:
    """Return what *process* prints until it closes its output; None after ``LIMIT_S`` or too much of it."""
    assert process.stdout is not None, "a pipe was asked for"
    output, until = bytearray(), time.monotonic() + LIMIT_S
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while len(output) <= MAX_OUTPUT_BYTES and selector.select(max(0.0, until - time.monotonic())):
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                return output.decode(errors="replace")
            output += chunk
    return None
