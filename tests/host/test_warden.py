"""No child outlives the node, however the node dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mesh.host.warden import Warden
from tests.host.deaths import wait_for_death


@pytest.fixture
def warden() -> Iterator[Warden]:
    warden = Warden()
    yield warden
    warden.close()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process
        process.kill()


def test_nothing_runs_before_the_first_group() -> None:
    warden = Warden()
    assert warden.pid is None
    warden.close()


def test_closing_kills_what_is_registered(warden: Warden, sleeper: subprocess.Popen[bytes]) -> None:
    warden.register(sleeper.pid)
    warden.close()
    assert sleeper.wait(5) == -signal.SIGKILL


def test_closing_kills_what_left_the_group_but_not_the_session(warden: Warden) -> None:
    script = "import os, time; pid = os.fork(); pid or os.setpgid(0, 0); print(pid, flush=True); time.sleep(600)"
    argv = [sys.executable, "-I", "-S", "-c", script]
    with subprocess.Popen(argv, start_new_session=True, stdout=subprocess.PIPE) as leader:
        assert leader.stdout is not None
        grandchild = max(int(leader.stdout.readline()), int(leader.stdout.readline()))
        warden.register(leader.pid)
        warden.close()
        wait_for_death(grandchild)


def test_an_unregistered_group_is_left_alone(warden: Warden, sleeper: subprocess.Popen[bytes]) -> None:
    warden.register(sleeper.pid)
    warden.unregister(sleeper.pid)
    warden.close()
    warden.close()
    assert sleeper.poll() is None


def test_a_killed_warden_is_replaced_and_knows_every_group(warden: Warden, sleeper: subprocess.Popen[bytes]) -> None:
    warden.register(sleeper.pid)
    first = warden.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_for_death(first)
    warden.unregister(999_999_999)
    assert warden.pid not in (None, first)
    warden.close()
    assert sleeper.wait(5) == -signal.SIGKILL


def test_a_service_manager_that_signals_every_process_does_not_end_it(
    warden: Warden, sleeper: subprocess.Popen[bytes]
) -> None:
    warden.register(sleeper.pid)
    assert warden.pid is not None
    _wait_until_handlers(warden.pid)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(warden.pid, number)
    warden.close()
    assert sleeper.wait(5) == -signal.SIGKILL


NODE = """
import asyncio, os, sys
from mesh.host.logring import LogRing
from mesh.host.process import Process
from mesh.host.warden import Warden

async def main():
    warden = Warden() if sys.argv[1] == "warden" else None
    ring = LogRing()
    lines = ring.subscribe()
    Process.start(sys.argv[2:], env=os.environ, on_exit=print, ring=ring, warden=warden)
    print(await anext(lines), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("guard", "command"),
    [
        ("none", "echo $$; exec sleep 600"),  # the kernel's parent-death signal alone
        ("warden", "echo $$; exec sleep 600"),
        ("warden", "sleep 600 & echo $!; wait"),  # a wrapper's grandchild: only the warden reaches it
    ],
    ids=["pdeathsig", "child", "grandchild"],
)
def test_no_child_survives_a_killed_node(guard: str, command: str) -> None:
    """trap 13"""
    node = subprocess.Popen([sys.executable, "-c", NODE, guard, "bash", "-c", command], stdout=subprocess.PIPE)
    with node:
        assert node.stdout is not None
        child = int(node.stdout.readline())
        os.kill(child, 0)
        node.kill()
    wait_for_death(child)


def _wait_until_handlers(pid: int) -> None:
    """Wait until its signal handlers are installed; before that a signal ends it, and it would be replaced."""
    with open(f"/proc/{pid}/status") as status:
        while True:
            status.seek(0)
            ignored = next(line for line in status if line.startswith("SigIgn"))
            if int(ignored.split()[1], 16) & 1 << (signal.SIGHUP - 1):
                return


def test_a_node_that_cannot_start_one_goes_on_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("subprocess.Popen", fail)
    warden = Warden()
    warden.register(999_999_999)
    assert "children may survive" in caplog.text
    with pytest.raises(OSError, match="Too many"):
        warden.start()
