"""One command: what is kept of its output, and how it is ended."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from mesh.build import command
from mesh.build.command import Command, CommandError, HangsError, Surroundings, run
from mesh.build.server_under_test import Child
from mesh.errors import BuildError
from mesh.host.process import Process
from mesh.host.warden import Warden
from mesh.tasks import spawn
from tests.host.deaths import wait_for_death


@pytest.fixture
def around() -> Iterator[Surroundings]:
    warden = Warden()
    yield Surroundings(lambda: os.environ, warden)
    warden.close()


def _sh(script: str, **options: object) -> Command:
    return Command(("sh", "-c", script), **options)  # type: ignore[arg-type]


async def test_lines_are_told_as_they_come_and_the_last_ones_are_kept(around: Surroundings) -> None:
    said: list[str] = []
    script = r"""
        for i in $(seq 50); do echo line $i; done
        printf 'Receiving objects:  10%% (1/10)\rReceiving objects: 100%% (10/10), done.\r\n'
        printf '\033[31mred\033[0m\n'
        head -c 1000 /dev/zero | tr '\0' x; echo
        echo "fatal: https://me:s3cret@example.org/x" >&2
        exit 7"""
    with pytest.raises(CommandError, match=r"^command failed \(exit status: 7\): sh -c") as caught:
        await run(_sh(script), around, said.append)
    assert said[49:53] == ["line 50", "Receiving objects:  10% (1/10)", "Receiving objects: 100% (10/10), done.", "red"]
    assert caught.value.exit_status == 7
    tail = caught.value.log_tail
    assert len(tail) == 40
    assert tail[0] == "line 14", "what git writes over itself takes no place"
    assert tail[-3:] == ("red", "x" * 399 + "…", "fatal: https://example.org/x")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("\x1b[1;31mred\x1b[0m \x1b[?25lhidden\x1b[2K", "red hidden"),
        ("\x1b]0;a title\x07text", "text"),
        ("see \x1b]8;;https://example.org\x1b\\here\x1b]8;;\x1b\\ now", "see here now"),
        ("\x1b]0;never ended", ""),
        ("\x1bP1$r\x1b\\a\x1b(Bb\x1bMc\x08\x00\x9b", "abc"),
        ("\x1b", ""),
        ("a\tb", "a\tb"),
        ("https://me:s3cret@example.org/x", "https://example.org/x"),
        ("https://me:s3/cr@t@example.org/x y@z", "https://example.org/x y@z"),
        ("'https://token@example.org/x'", "'https://example.org/x'"),
        ("https://example.org/x?a=1&private_token=s3cret&b=2", "https://example.org/x?a=1&private_token=…&b=2"),
        ("https://example.org/x?access_TOKEN=s3cret'", "https://example.org/x?access_TOKEN=…'"),
        ("http://127.0.0.1:8080/x to a@b", "http://127.0.0.1:8080/x to a@b"),
        ("https://example.org/x@v1", "https://example.org/x@v1"),
    ],
)
def test_what_is_shown_of_a_line(line: str, shown: str) -> None:
    assert command.clean(line) == shown


async def test_success_says_nothing(around: Surroundings) -> None:
    await run(_sh("true"), around, pytest.fail)


async def test_it_is_nice_and_sees_no_other_repository(around: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/elsewhere")
    monkeypatch.setenv("GIT_SSH", "kept")
    said: list[str] = []
    await run(_sh("nice; echo $GIT_DIR $GIT_SSH $MORE", extra_env={"MORE": "too"}), around, said.append)
    assert said == ["19", "kept too"]
    await run(_sh("nice", nice=False), around, said.append)
    assert said[-1] == str(os.nice(0))


async def test_killed_by_a_signal(around: Surroundings) -> None:
    with pytest.raises(CommandError, match=r"killed by SIGKILL; .* out of memory") as caught:
        await run(_sh("kill -9 $$"), around, print)
    assert caught.value.exit_status == -signal.SIGKILL


async def test_what_is_not_there(around: Surroundings, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot start no-such-program: no such file"):
        await run(Command(("no-such-program",)), around, print)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"max_silence_s": 0.3}, "said nothing for 0.3 s"), ({"limit_s": 0.3}, "took more than 0.3 s")],
)
async def test_what_hangs_is_ended(around: Surroundings, options: Mapping[str, float], text: str) -> None:
    with pytest.raises(BuildError, match=text) as caught:
        await run(_sh("echo first; exec sleep 1000", **options), around, print)
    assert not isinstance(caught.value, CommandError)
    assert caught.value.log_tail == ("first",)


async def test_output_is_a_sign_of_life(around: Surroundings) -> None:
    said: list[str] = []
    await run(_sh("for i in 1 2 3 4 5; do sleep 0.2; echo $i; done", max_silence_s=0.8), around, said.append)
    assert said == ["1", "2", "3", "4", "5"]


OWN_GROUP = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if (pid := os.fork()) == 0:
    os.setpgid(0, 0)
    time.sleep(1000)
print(pid, flush=True)
time.sleep(1000)
"""


async def test_cancelled_it_ends_all_that_it_started(around: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also who ignores SIGTERM, and a grandchild with a process group of its own, like ninja's compilers."""
    monkeypatch.setattr(command, "TERM_GRACE_S", 0.1)
    lines: asyncio.Queue[str] = asyncio.Queue()
    task = spawn(run(Command((sys.executable, "-c", OWN_GROUP)), around, lines.put_nowait), "a command")
    pid = int(await lines.get())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    wait_for_death(pid)


async def test_it_ends_as_its_group_even_if_it_ends_well(around: Surroundings) -> None:
    lines: list[str] = []
    script = OWN_GROUP.replace("print(pid, flush=True)\ntime.sleep(1000)", "print(pid)")
    await run(Command((sys.executable, "-c", script)), around, lines.append)
    wait_for_death(int(lines[0]))


@pytest.fixture
def unkillable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No signal ends anything, as if it waited in the kernel for a disk."""
    monkeypatch.setattr(command, "TERM_GRACE_S", 0.1)
    monkeypatch.setattr(command, "KILL_LIMIT_S", 0.2)
    monkeypatch.setattr(Process, "signal_group", lambda self, number: None)
    yield
    monkeypatch.undo()


async def _gone(pid: int) -> None:
    """Kill *pid*, and wait until it is reaped: that goes on after everybody stopped waiting."""
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        while psutil.pid_exists(pid):  # noqa: ASYNC110  # nobody is told
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("unkillable")
async def test_cancelled_it_does_not_wait_for_what_cannot_be_killed(
    around: Surroundings, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the node would not end, nor the lock of the build be free."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    task = spawn(run(_sh("echo $$; exec sleep 1000", nice=False), around, lines.put_nowait), "a command")
    pid = int(await lines.get())
    task.cancel()
    async with asyncio.timeout(20):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert "a process cannot be killed; it waits for a disk, perhaps" in caplog.text
    assert psutil.pid_exists(pid)
    await _gone(pid)


@pytest.mark.usefixtures("unkillable")
async def test_what_hangs_and_cannot_be_killed_is_left_alone(around: Surroundings) -> None:
    lines: list[str] = []
    async with asyncio.timeout(20):
        with pytest.raises(HangsError, match=r"said nothing for 0\.5 s") as caught:
            await run(_sh("echo $$; exec sleep 1000", nice=False, max_silence_s=0.5), around, lines.append)
    assert (caught.value.exit_status, caught.value.log_tail) == (None, tuple(lines))
    await _gone(int(lines[0]))


@pytest.mark.skipif(sys.platform != "linux", reason="only there the kernel is told whom to take")
async def test_if_memory_is_short_a_build_is_taken_before_what_serves(around: Surroundings) -> None:
    """Also what it starts; and the server under test."""
    says = "sleep 0.3; cat /proc/self/oom_score_adj"
    said: list[str] = []
    for nice in (True, False):
        await run(_sh(says, nice=nice), around, said.append)
    server = Child(("sh", "-c", says), {"PATH": os.environ["PATH"]}, around.warden)
    assert await server.ended(20.0) == 0
    assert [*said, *server.ring.tail()] == ["800"] * 3
