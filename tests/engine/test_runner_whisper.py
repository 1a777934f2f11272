"""The real whisper-server from start to exit: readiness, refusals, and the directory that it runs in."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from mesh.cli import whisper_build
from mesh.cli.whisper_build import NotPossibleError
from mesh.config.profile import Engine
from mesh.core.exits import Cause
from mesh.engine import flags, upkeep, whisper
from mesh.engine.locate import EngineBinary, file_identity
from mesh.engine.runner import Runner
from mesh.engine.vetting import complaint
from mesh.errors import InstanceError
from mesh.host.ports import PortAllocator
from mesh.host.scratch import Leftovers, Scratch
from tests.e2e.harness import free_port
from tests.engine.children import Node, Reports, make_profile
from tests.real_whisper import silence
from tests.tiny_whisper import SENTENCE, write_whisper


@pytest.fixture(scope="module")
def server() -> EngineBinary:
    try:
        path = whisper_build.ensure_server(os.environ, Console(stderr=True))
    except NotPossibleError as error:
        pytest.skip(error.message)
    return EngineBinary((str(path),), None, "cache", "", file_identity(path), whisper.PROGRAM)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whisper") / "tiny.bin"
    write_whisper(path)
    return path


@pytest.fixture
async def node(server: EngineBinary, tmp_path: Path) -> AsyncIterator[Node]:
    async with Node(server) as node:
        node.host.scratch = Scratch(tmp_path / "scratch")
        yield node


def start(node: Node, model: Path, *args: str, **fields: Any) -> tuple[Runner, Reports]:
    return node.start("-t", "1", *args, model_path=str(model), engine=Engine.WHISPER, **fields)


def directories(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "scratch").glob("node-*/m-*"))


async def test_a_healthy_life(node: Node, model: Path, tmp_path: Path) -> None:
    runner, reports = start(node, model)
    (own,) = directories(tmp_path)
    healthy = await reports.healthy()
    assert (healthy.slots, healthy.info) == (1, {})
    assert os.readlink(f"/proc/{runner.pid}/cwd") == str(own)
    assert not runner.endpoint.keeps_alive
    assert await runner.busy_slots() is None
    before = runner.endpoint.log_lines()
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        url = f"http://127.0.0.1:{runner.endpoint.port}/inference"
        answer = await client.post(url, files={"file": ("a.wav", silence(1))})
        refused = await client.post(url, files={"file": ("a.wav", b"no audio")})
    assert answer.json()["text"].strip() == SENTENCE
    assert refused.status_code == 400
    since = runner.endpoint.log_tail(runner.endpoint.log_lines() - before)
    assert since[-1] == "error: failed to read audio data", "its log is read before it is asked for"
    (own / "left-behind.wav").write_bytes(b"x")
    runner.terminate()
    exited = await reports.exited()
    assert (exited.returncode, exited.reason) == (0, "whisper-server stopped: exit code 0")
    assert directories(tmp_path) == []


async def test_it_converts_in_its_own_directory(node: Node, model: Path, tmp_path: Path) -> None:
    """An ffmpeg that only copies, and writes down where it was: ``-i IN ... OUT``."""
    (tmp_path / "bin").mkdir()
    ffmpeg = tmp_path / "bin/ffmpeg"
    ffmpeg.write_text(f"""#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = -i ] && from=$2; shift; done
[ -n "$from" ] || exit 0
pwd >{tmp_path}/where; echo "$from" >>{tmp_path}/where; cp "$from" "$1"
""")
    ffmpeg.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    runner, reports = start(node, model, convert=True, env={"PATH": path})
    (own,) = directories(tmp_path)
    await reports.healthy()
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        url = f"http://127.0.0.1:{runner.endpoint.port}/inference"
        answer = await client.post(url, files={"file": ("a.m4a", silence(1))})
    assert answer.json()["text"].strip() == SENTENCE
    ran_in, source = (tmp_path / "where").read_text().splitlines()
    assert (ran_in, os.path.dirname(source)) == (str(own), str(own))
    runner.terminate()
    await reports.exited()
    assert directories(tmp_path) == []


@pytest.mark.parametrize(
    ("args", "returncode", "reason"),
    [
        (("--bogus",), 0, "error: unknown argument: --bogus (whisper-server ended by itself: exit code 0)"),
        (("-l", "xx"), 0, "error: unknown language 'xx' (whisper-server ended by itself: exit code 0)"),
        (
            ("-t", "abc"),
            -signal.SIGABRT,
            "error: invalid argument: a number was expected (stoi) (whisper-server ended by itself: aborted)",
        ),
    ],
)
async def test_a_bad_argument_is_told_although_it_ends_well(
    node: Node, model: Path, tmp_path: Path, args: tuple[str, ...], returncode: int, reason: str
) -> None:
    _, reports = start(node, model, *args)
    exited = await reports.exited()
    assert exited.returncode == returncode
    assert exited.reason == reason
    assert exited.cause is Cause.USAGE
    assert exited.returncode in whisper.KIND.usage_statuses
    assert not any("--best-of" in line for line in exited.log_tail), "nobody wants to read its help"
    assert directories(tmp_path) == []


async def test_a_bad_model_is_told(node: Node, tmp_path: Path) -> None:
    (tmp_path / "bad.bin").write_bytes(b"no model at all")
    _, reports = start(node, tmp_path / "bad.bin")
    exited = await reports.exited()
    assert exited.returncode in whisper.KIND.usage_statuses
    assert "invalid model data (bad magic)" in exited.reason


async def test_a_killed_one_leaves_nothing(node: Node, model: Path, tmp_path: Path) -> None:
    runner, reports = start(node, model)
    await reports.healthy()
    assert runner.pid is not None
    os.kill(runner.pid, signal.SIGKILL)
    await reports.exited()
    assert directories(tmp_path) == []


def is_there(path: Path) -> bool:
    return path.exists()


async def gone(path: Path, within_s: float = 10.0) -> None:
    for _ in range(int(within_s / 0.02)):
        if not is_there(path):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{path} is still there")


async def test_nothing_of_a_request_stays_once_it_is_over(node: Node, model: Path, tmp_path: Path) -> None:
    runner, reports = start(node, model)
    (own,) = directories(tmp_path)
    await reports.healthy()
    upload = own / "whisper-server-1.wav"
    over = runner.endpoint.begin_upload()
    upload.write_bytes(b"x")
    await asyncio.sleep(0.2)
    assert upload.exists()
    over()
    await gone(upload, upkeep.LOOK_EVERY_S / 2)


async def test_what_it_leaves_of_a_request_whose_client_left_goes_by_itself(
    node: Node, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """whisper-server works on, and nobody is told when it stops."""
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 0.3)
    runner, reports = start(node, model)
    (own,) = directories(tmp_path)
    await reports.healthy()
    runner.endpoint.begin_upload()()
    await asyncio.sleep(0.1)
    (own / "late.wav").write_bytes(b"x")
    await gone(own / "late.wav")
    over = runner.endpoint.begin_upload()
    (own / "next.wav").write_bytes(b"x")
    await asyncio.sleep(1)
    assert (own / "next.wav").exists()
    over()
    await gone(own / "next.wav")


async def test_where_the_profile_wants_its_files_it_has_a_directory_of_its_own(
    node: Node, model: Path, tmp_path: Path
) -> None:
    """Others may keep theirs there."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ffmpeg").write_text("#!/bin/sh\n")
    (tmp_path / "bin/ffmpeg").chmod(0o755)
    (tmp_path / "big").mkdir()
    (tmp_path / "big/whisper-server-1.wav").write_bytes(b"somebody's")
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    runner, reports = start(node, model, "--tmp-dir", str(tmp_path / "big"), convert=True, env=env)
    await reports.healthy()
    assert directories(tmp_path) == []
    (own,) = (tmp_path / "big").glob("llama-mesh-scratch-*/node-*/m-*")
    assert runner.command[runner.command.index("--tmp-dir") + 1] == str(own)
    over = runner.endpoint.begin_upload()
    (own / "whisper-server-2.wav").write_bytes(b"x")
    over()
    await gone(own / "whisper-server-2.wav")
    runner.terminate()
    await reports.exited()
    await gone(own)
    for scratch in node.host.elsewhere.values():
        scratch.close()
    assert [path.name for path in (tmp_path / "big").iterdir()] == ["whisper-server-1.wav"]


async def test_its_directory_is_emptied_and_removed_off_the_loop_and_failures_of_that_stop_nothing(
    node: Node, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept, removed, threads = asyncio.Event(), asyncio.Event(), set[int]()
    loop = asyncio.get_running_loop()

    def clear(self: Leftovers) -> None:
        threads.add(threading.get_ident())
        loop.call_soon_threadsafe(swept.set)
        raise RuntimeError("can't start new thread")

    def give_back(self: Scratch, directory: Path) -> None:
        threads.add(threading.get_ident())
        loop.call_soon_threadsafe(removed.set)

    monkeypatch.setattr(Leftovers, "clear", clear)
    monkeypatch.setattr(Scratch, "give_back", give_back)
    runner, reports = start(node, model)
    await reports.healthy()
    for _ in range(2):
        runner.endpoint.begin_upload()()
        async with asyncio.timeout(10):
            await swept.wait()
        swept.clear()
    runner.terminate()
    await reports.exited()
    async with asyncio.timeout(10):
        await removed.wait()
    assert [type(report).__name__ for report in reports.all] == ["Healthy", "Exited"]
    assert threading.get_ident() not in threads


async def test_one_that_cannot_be_started_leaves_nothing(node: Node, model: Path, tmp_path: Path) -> None:
    node.host.find_engine = lambda profile: EngineBinary((str(tmp_path / "none"),), None, "path")
    with pytest.raises(InstanceError, match="no such file"):
        start(node, model)
    assert directories(tmp_path) == []


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    writer.close()


async def test_it_never_shares_its_port(node: Node, model: Path) -> None:
    """Both set SO_REUSEPORT; half of the requests would go to the other one."""
    port = free_port()
    node.host.ports = PortAllocator([port], is_free=lambda port, reuses: True)
    async with await asyncio.start_server(answer, "127.0.0.1", port, reuse_port=True):
        _, reports = start(node, model)
        assert (await reports.stalled()).reason == f"port {port} is used by another program, too"


async def test_it_goes_if_another_comes_to_its_port(
    node: Node, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 0.2)
    runner, reports = start(node, model)
    await reports.healthy()
    port = runner.endpoint.port
    async with await asyncio.start_server(answer, "127.0.0.1", port, reuse_port=True):
        exited = await reports.exited()
    assert exited.reason == f"port {port} is used by another program, too (pid {os.getpid()})"
    assert (exited.returncode, exited.cause) == (-signal.SIGKILL, Cause.OTHER), "it did not run out of memory"
    (told,) = (record for record in caplog.records if record.name == upkeep.__name__)
    assert told.levelname == "ERROR"
    assert node.ports.reserve() != port, "it rests"


async def test_another_that_leaves_at_once_drives_nobody_away(
    node: Node, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another node's instance does, which sees this one before it counts as ready."""
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 0.05)
    runner, reports = start(node, model)
    await reports.healthy()
    async with await asyncio.start_server(answer, "127.0.0.1", runner.endpoint.port, reuse_port=True):
        await asyncio.sleep(upkeep.CONFIRM_S / 2)
    await asyncio.sleep(upkeep.CONFIRM_S)
    assert runner.returncode is None
    runner.terminate()
    assert (await reports.exited()).reason == "whisper-server stopped: exit code 0"


async def test_unknown_flags_are_known_before_it_is_started(node: Node, server: EngineBinary, model: Path) -> None:
    args = ("--ngl", "99", "--thread", "2", "-fp", "x", "-sow", "--vad")
    said = flags.refused(args, server, os.environ, whisper.KIND)
    assert said == "whisper-server does not know --ngl (did you mean '-ng'?), --thread (did you mean '--threads'?)"
    assert flags.refused(("-t", "1", "--tmp-dir", "/x", "--convert"), server, os.environ, whisper.KIND) is None
    with pytest.raises(InstanceError, match="does not know --ngl"):
        start(node, model, "--ngl", "99")


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        (("-t", "1", "-l", "auto"), None),
        (("--bogus",), "error: unknown argument: --bogus"),
        (
            ("-t", "abc"),
            "error: invalid argument: a number was expected (stoi) (whisper-server ended by itself: aborted)",
        ),
        (("extra",), "error: unknown argument: extra"),
        (("--prompt",), "error: unknown argument: /no/such.bin"),  # it swallowed the -m
    ],
)
async def test_its_arguments_are_judged_without_loading_anything(
    server: EngineBinary, args: tuple[str, ...], answer: str | None
) -> None:
    profile = make_profile(*args, model_path="/no/such.bin", engine=Engine.WHISPER)
    assert await complaint(profile, server) == answer
