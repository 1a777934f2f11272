"""How everything that a build runs is started: git, cmake and what they start, and the servers under test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from mesh.host.logring import LogRing
from mesh.host.process import Process
from mesh.host.warden import Warden

#: Of 1000. A llama-server that serves is the largest process of the machine, so if memory runs short, it is what the
#: kernel would take, and with it everybody's requests; a compiler is only run again. Raising this needs no privilege.
OOM_SCORE_ADJ: Final = 800


def start(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    on_exit: Callable[[int], None],
    ring: LogRing,
    warden: Warden | None,
) -> Process:
    """Start *argv* as ``Process.start`` does. It ends with all of its session, and before others if memory is short.

    Raise ``InstanceError`` if it cannot be started.
    """
    process = Process.start(
        argv,
        env=env,
        cwd=cwd,
        on_exit=on_exit,
        ring=ring,
        warden=warden,
        whole_session=True,  # ninja gives each compiler a group of its own, as an operator's wrapper its llama-server
    )
    # At once: what is started later inherits it. No such file: not Linux, or it has ended already.
    with contextlib.suppress(OSError):
        Path(f"/proc/{process.pid}/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
    return process
