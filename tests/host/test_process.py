"""Starting, draining, signalling and reaping one child, on uvloop and on stock asyncio."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from mesh.errors import InstanceError
from mesh.host.logring import LogRing
from mesh.host.process import Process
from mesh.host.warden import Warden
from tests.host.deaths import wait_for_death

Run = Callable[[Coroutine[Any, Any, None]], None]
PYTHON = [sys.executable, "-I", "-S", "-u", "-c"]
TIMEOUT_S = 20


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a test's coroutine on one of the two event loops, with a limit."""

    def run_it(test: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(asyncio.wait_for(test, TIMEOUT_S))

    return run_it


@pytest.fixture(params=["pidfd", "thread"])
def exit_watch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to learn of an exit; the thread is what systems without pidfd get."""
    if request.param == "thread":
        monkeypatch.setattr("mesh.host.process._open_pidfd", lambda pid: None)
    return str(request.param)


class Child:
    """A started process and the future of its exit code."""

    def __init__(self, *argv: str, env: dict[str, str] | None = None, warden: Warden | None = None) -> None:
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.ring = LogRing()
        env = dict(os.environ) if env is None else env
        self.process = Process.start(argv, env=env, on_exit=self.ended.set_result, ring=self.ring, warden=warden)

    async def line(self, text: str) -> str:
        """Wait for a line that contains *text*."""
        subscription = self.ring.subscribe()
        found = [line for line in self.ring.tail() if text in line]
        if found:
            return found[0]
        async for line in subscription:
            if text in line:
                return line
        raise AssertionError(f"ended without {text!r}: {self.ring.tail(5)}")


def test_exit_code_and_all_output_are_told_once(run: Run, exit_watch: str) -> None:
    async def test() -> None:
        child = Child(*PYTHON, "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)")
        assert child.process.returncode is None
        assert await child.ended == 7
        assert child.process.returncode == 7
        assert child.ring.tail() == ["out", "err"]
        assert child.ring.closed
        child.process.signal_group(signal.SIGTERM)  # harmless afterwards

    run(test())


def test_the_exit_is_an_event_and_not_a_poll(run: Run) -> None:
    """A crash is known in the same loop iteration in which the kernel tells of it: a pidfd is being watched."""

    async def test() -> None:
        child = Child("sleep", "600")
        assert child.process._pidfd is not None
        assert os.readlink(f"/proc/self/fd/{child.process._pidfd}") == "anon_inode:[pidfd]"
        loop = asyncio.get_running_loop()
        killed_at = loop.time()
        os.kill(child.process.pid, signal.SIGKILL)
        assert await child.ended == -signal.SIGKILL
        print(f"exit detected after {(loop.time() - killed_at) * 1000:.1f} ms")
        assert child.process._pidfd is None

    run(test())


def test_the_last_words_are_read_though_the_exit_is_seen_first(run: Run) -> None:
    async def test() -> None:
        child = Child(*PYTHON, "print('out of memory')")
        wait_for_death(child.process.pid)  # the loop could not read meanwhile
        child.process._ended()
        assert child.ended.result() == 0
        assert child.ring.tail() == ["out of memory"]

    run(test())


def test_the_warden_watches_the_group_from_start_to_exit(run: Run) -> None:
    """trap 13; and once the process is gone, its number may belong to somebody else."""

    async def test() -> None:
        warden = Warden()
        child = Child("sleep", "600", warden=warden)
        assert warden._groups == {child.process.pid}
        child.process.signal_group(signal.SIGKILL)
        await child.ended
        assert warden._groups == set()
        warden.close()

    run(test())


def test_no_descriptors_are_left(run: Run) -> None:
    """trap 25"""

    async def test() -> None:
        await Child("true").ended
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            await Child("true").ended
            with pytest.raises(InstanceError):
                Child("/nonexistent")
        assert len(os.listdir("/proc/self/fd")) == before

    run(test())


def test_a_line_of_a_mebibyte_and_more_does_not_block_the_child(run: Run) -> None:
    """trap 20"""

    async def test() -> None:
        child = Child(*PYTHON, "print('x' * (1 << 20)); print('after')")
        assert await child.ended == 0
        assert child.ring.tail()[-1] == "after"

    run(test())


def test_output_is_drained_while_the_process_lives_and_after_it_closed_it(run: Run) -> None:
    async def test() -> None:
        code = "import os, time; print('hello'); os.close(1); os.close(2); time.sleep(600)"
        child = Child(*PYTHON, code)
        started = child.process.last_output_at
        heard: list[str] = []
        child.process.on_output = lambda: heard.append("output")
        await child.line("hello")
        assert heard
        assert child.process.last_output_at >= started
        child.process.signal_group(signal.SIGKILL)
        assert await child.ended == -signal.SIGKILL

    run(test())


def test_stop_reaches_the_grandchild_of_a_wrapper(run: Run) -> None:
    """trap 14: bash waits for the child, the signal goes to both."""

    async def test() -> None:
        child = Child("bash", "-c", "sleep 600 & echo pid $!; wait")
        grandchild = int((await child.line("pid")).split()[1])
        child.process.signal_group(signal.SIGTERM)
        assert await child.ended == -signal.SIGTERM
        await asyncio.to_thread(wait_for_death, grandchild)

    run(test())


def test_a_grandchild_that_ignores_sigterm_and_holds_stdout_delays_nothing(run: Run, exit_watch: str) -> None:
    """traps 14, 15: the leader's end is the end, and it takes the group with it."""

    async def test() -> None:
        child = Child("bash", "-c", "(trap '' TERM; echo pid $BASHPID; sleep 600; sleep 600) & wait")
        grandchild = int((await child.line("pid")).split()[1])
        child.process.signal_group(signal.SIGTERM)
        await child.ended
        await asyncio.to_thread(wait_for_death, grandchild)

    run(test())


def test_a_descendant_that_left_the_group_delays_nothing_either(run: Run) -> None:
    """trap 15: it holds the pipe, which is simply closed."""

    async def test() -> None:
        child = Child("bash", "-c", "setsid sh -c 'echo pid $$; exec sleep 600' & sleep 600")
        escaped = int((await child.line("pid")).split()[1])
        child.process.signal_group(signal.SIGKILL)
        assert await child.ended == -signal.SIGKILL
        os.kill(escaped, signal.SIGKILL)

    run(test())


def test_a_whole_session_ends_with_its_leader(run: Run) -> None:
    """ninja gives each compiler a process group of its own; SIGKILL for the leader's group does not reach those."""

    async def test() -> None:
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        ring = LogRing()
        argv = [*PYTHON, LEAVES_THE_GROUP]
        Process.start(argv, env=os.environ, on_exit=ended.set_result, ring=ring, whole_session=True)
        assert await ended == 0
        wait_for_death(int(ring.tail()[0]))

    run(test())


LEAVES_THE_GROUP = """
import os, time
if (pid := os.fork()) == 0:
    os.setpgid(0, 0)
    time.sleep(600)
print(pid)
"""


def test_a_child_cannot_read_our_terminal_and_gets_exactly_its_environment(run: Run) -> None:
    async def test() -> None:
        child = Child(
            *PYTHON,
            "import os, signal, sys; print(repr(sys.stdin.read()), sorted(os.environ), os.getsid(0) == os.getpid())",
            env={"PATH": os.environ["PATH"], "ONLY": "this"},
        )
        assert await child.ended == 0
        line = child.ring.tail()[0]
        assert line.startswith("''")
        assert "'ONLY', 'PATH'" in line
        assert line.endswith("True")

    run(test())


def test_signals_that_python_ignores_are_not_ignored_in_the_child(run: Run) -> None:
    async def test() -> None:
        child = Child("grep", "SigIgn", "/proc/self/status")
        assert await child.ended == 0
        ignored = int(child.ring.tail()[0].split()[1], 16)
        # 32 and 33 belong to the C library, which lets nobody set them; some parents have them ignored
        assert [n for n in signal.valid_signals() if ignored >> (n - 1) & 1] == []

    run(test())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_text("#!/bin/sh\n"), "chmod"),
        (lambda path: path.mkdir(), "directory"),
    ],
    ids=["missing", "not executable", "directory"],
)
async def test_a_program_that_cannot_run_is_refused_with_the_fix(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "program")
    with pytest.raises(InstanceError, match=message):
        Child(str(tmp_path / "program"))


async def test_a_file_that_turns_out_not_to_be_a_program_says_so(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF nonsense")
    program.chmod(0o755)
    child = Child(str(program))
    assert await child.ended == 126
    assert f"cannot execute {program}: Exec format error" in child.ring.tail()[0]


async def test_a_failing_fork_is_told_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("subprocess.Popen", fail)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InstanceError, match="Too many open files; raise the limit of open files"):
        Child("true")
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_it_has_written_can_be_read_before_the_loop_turns(run: Run, tmp_path: Path) -> None:
    """An answer may come by another way than the log line that explains it, which was written first."""
    pipe = tmp_path / "written"
    os.mkfifo(pipe)

    async def main() -> None:
        child = Child(*PYTHON, f"import time; print('why'); open({str(pipe)!r}, 'w').close(); time.sleep(60)")
        pipe.read_text()  # on purpose: the loop must not turn
        assert child.ring.count == 0
        child.process.read_now()
        assert (child.ring.tail(), child.ring.count) == (["why"], 1)
        child.process.signal_group(signal.SIGKILL)
        await child.ended

    run(main())
