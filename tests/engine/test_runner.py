"""One instance from start to exit, over the fake server; test_embedded.py repeats the essentials with the real one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from mesh.config.builds import LlamaCpp
from mesh.core.exits import Cause
from mesh.engine import flags, llama
from mesh.engine.assignment import Assignment
from mesh.engine.locate import EngineBinary, Engines
from mesh.engine.model_file import model_bytes
from mesh.engine.runner import Exited, Healthy, Launcher, Runner
from mesh.errors import CapacityError, ConfigError, EngineMissingError, InstanceError
from mesh.host.ports import PortAllocator
from tests.engine.children import FAKE, Node, Reports, faults, line_of, make_profile
from tests.host.deaths import wait_for_death


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with Node(FAKE) as node:
        yield node


async def test_a_healthy_life(node: Node) -> None:
    runner, reports = node.start("-np", "3")
    assert runner.endpoint.alive
    assert runner.endpoint.port in range(10000, 20000)
    assert runner.pid is not None
    healthy = await reports.healthy()
    assert healthy.slots == 3
    assert healthy.info["model_path"] == "fake.gguf"
    assert runner.command[-4:] == ("--host", "127.0.0.1", "--port", str(runner.endpoint.port))
    closed: list[bool] = []
    runner.endpoint.closers.append(lambda: closed.append(runner.returncode is None))
    runner.terminate()
    runner.terminate()
    assert closed == [True], "connections are closed before the signal is sent"
    assert not runner.endpoint.alive
    exited = await reports.exited()
    assert exited == Exited(0, "llama-server stopped: exit code 0", exited.log_tail)
    assert any("listening" in line for line in exited.log_tail)
    runner.terminate()
    runner.kill()
    assert len(reports.all) == 2
    assert await runner.busy_slots() is None


async def test_readiness_waits_for_health_and_not_for_a_log_line(node: Node) -> None:
    """trap 94"""
    runner, reports = node.start(env=faults(load_s=0.3))
    await line_of(runner, "listening")
    assert reports.all == []
    await reports.healthy()


async def test_an_instance_that_dies_while_loading_is_known_at_once(node: Node) -> None:
    """trap 21: the probe that hangs at that moment delays nothing; the report has the log that says why."""
    runner, reports = node.start(env=faults(load_s=0.2, crash_at_load=1))
    exited = await reports.exited()
    assert exited.returncode == 1
    assert exited.reason.endswith("(llama-server ended by itself: exit code 1)")
    assert "error loading model" in "\n".join(exited.log_tail)
    assert not runner.endpoint.alive
    assert runner._readiness is not None
    with pytest.raises(asyncio.CancelledError):
        await runner._readiness


async def test_a_hanging_health_answer_does_not_outlive_the_child(node: Node) -> None:
    """trap 21"""
    runner, reports = node.start(env=faults(hang_health=1))
    await line_of(runner, "listening")
    runner.kill()
    exited = await reports.exited()
    assert exited.returncode == -signal.SIGKILL
    assert exited.cause is Cause.OTHER, "we did it"


async def test_a_refused_flag_is_told_with_the_log(node: Node) -> None:
    _, reports = node.start("--no-such-flag")
    exited = await reports.exited()
    assert exited.reason == "error: invalid argument: --no-such-flag (llama-server ended by itself: exit code 1)"
    assert exited.cause is Cause.USAGE


async def test_a_crash_after_ready(node: Node) -> None:
    runner, reports = node.start()
    await reports.healthy()
    assert runner.pid is not None
    os.kill(runner.pid, signal.SIGSEGV)
    exited = await reports.exited()
    assert "segmentation fault" in exited.reason


async def test_sigterm_while_loading(node: Node) -> None:
    """trap 16"""
    runner, reports = node.start(env=faults(load_s=600))
    await line_of(runner, "loading")
    runner.terminate()
    assert (await reports.exited()).returncode == 0
    assert len(reports.all) == 1


async def test_sigterm_before_the_program_has_even_started(node: Node) -> None:
    """trap 16"""
    runner, reports = node.start()
    runner.terminate()
    await reports.exited()


async def test_a_child_that_ignores_sigterm_is_killed(node: Node) -> None:
    runner, reports = node.start(env=faults(ignore_sigterm=1))
    await reports.healthy()
    runner.terminate()
    await line_of(runner, "SIGTERM ignored")
    assert len(reports.all) == 1
    runner.kill()
    assert (await reports.exited()).returncode == -signal.SIGKILL


async def test_a_grandchild_dies_with_the_instance(node: Node) -> None:
    """trap 14, trap 15: it holds stdout and ignores SIGTERM."""
    runner, reports = node.start(env=faults(grandchild=1))
    grandchild = int((await line_of(runner, "grandchild")).split()[-1])
    await reports.healthy()
    runner.terminate()
    await reports.exited()
    await asyncio.to_thread(wait_for_death, grandchild)


async def test_a_log_line_of_a_mebibyte_delays_nothing(node: Node) -> None:
    """trap 20"""
    _, reports = node.start(env=faults(log_line_bytes=1 << 20))
    await reports.healthy()


async def test_silence_is_reported_and_nothing_else_is_done(node: Node) -> None:
    """trap 22: /health answers all the time, which is no progress."""
    runner, reports = node.start(env=faults(load_s=600, silent_load=1), startup_timeout_s=0.5)
    assert "no sign of progress for 0.5 s" in (await reports.stalled()).reason
    assert runner.returncode is None
    runner.terminate()
    await reports.exited()


async def test_output_and_work_keep_a_long_load_alive(node: Node) -> None:
    """trap 22: both loads take four times their limit."""
    talking = node.start(env=faults(load_s=2), startup_timeout_s=0.5)
    working = node.start(env=faults(load_s=2, silent_load=1, busy_load=1), startup_timeout_s=0.5)
    await talking[1].healthy()
    await working[1].healthy()


async def test_another_server_on_the_port_is_not_taken_for_ours(node: Node) -> None:
    """trap 26"""
    _, reports = node.start(env=faults(wrong_model_path="/somebody/elses.gguf"))
    assert "another server, which serves /somebody/elses.gguf" in (await reports.stalled()).reason


async def test_the_same_file_under_another_name_is_ours(node: Node, tmp_path: Path) -> None:
    (tmp_path / "real.gguf").write_bytes(b"")
    link = tmp_path / "link.gguf"
    link.symlink_to(tmp_path / "real.gguf")
    _, reports = node.start(model_path=str(link), env=faults(wrong_model_path=tmp_path / "real.gguf"))
    await reports.healthy()


async def test_probes_carry_the_instances_own_key(node: Node) -> None:
    """trap 104; and trap 101: it is in no argument list."""
    runner, reports = node.start("--api-key", "sesame", "-np", "2")
    assert (await reports.healthy()).slots == 2
    assert await runner.busy_slots() == 0
    assert "sesame" not in " ".join((await node.fake_state(runner))["argv"])
    assert "sesame" not in " ".join(runner.command)
    assert runner.endpoint.api_key == "sesame"


async def test_busy_slots_counts_what_computes(node: Node) -> None:
    runner, reports = node.start(env=faults(prefill_s=600))
    await reports.healthy()
    reader, writer = await asyncio.open_connection("127.0.0.1", runner.endpoint.port)
    writer.write(b"POST /completion HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
    while await runner.busy_slots() != 1:
        pass
    writer.close()
    while await runner.busy_slots() != 0:
        pass
    assert await reader.read() == b""
    await writer.wait_closed()


async def test_busy_slots_is_unknown_if_the_server_does_not_tell(node: Node) -> None:
    runner, reports = node.start("--no-slots")
    await reports.healthy()
    assert await runner.busy_slots() is None


async def test_the_port_rests_after_the_exit(node: Node) -> None:
    """trap 26, trap 25"""
    node.host.ports = PortAllocator([17001, 17002])
    first, reports = node.start()
    first.kill()
    await reports.exited()
    second, _ = node.start()
    assert (first.endpoint.port, second.endpoint.port) == (17001, 17002)


async def test_a_start_that_fails_leaves_no_port_behind(tmp_path: Path) -> None:
    """trap 25"""
    ports = PortAllocator([17011])
    async with Node(EngineBinary((str(tmp_path / "none"),), None, "configured"), ports) as node:
        for _ in range(3):
            with pytest.raises(InstanceError, match="no such file"):
                node.start()
        with pytest.raises(ConfigError):
            node.start(model_path=None)
        assert ports.reserve() == 17011


async def test_a_port_of_the_users_is_kept_for_one_instance(node: Node) -> None:
    node.start("--port", "17021")
    with pytest.raises(CapacityError, match="17021 already in use by another instance"):
        node.start("--port", "17021")
    with (
        socket.create_server(("127.0.0.1", 17022)),
        pytest.raises(CapacityError, match="17022 already in use by another process"),
    ):
        node.start("--port", "17022")


async def test_reports_come_once_and_in_order(node: Node) -> None:
    started = [node.start() for _ in range(4)]
    for _, reports in started:
        await reports.healthy()
    for runner, _ in started:
        runner.terminate()
        runner.kill()
    for _, reports in started:
        await reports.exited()
        assert [type(report) for report in reports.all] == [Healthy, Exited]


async def test_the_launcher_runs_the_configured_binary(tmp_path: Path) -> None:
    script = tmp_path / "llama-server"
    script.write_text(f'#!/bin/sh\nexec {" ".join(FAKE.argv)} "$@"\n')
    script.chmod(0o755)
    launcher, reports = Launcher(Engines({"default": LlamaCpp(binary_path=str(script))})), Reports()
    runner = launcher.launch("m-1", make_profile(), reports)
    assert isinstance(runner, Runner)
    assert runner.pid is None
    assert not runner.endpoint.alive
    runner.terminate()
    runner.kill()
    runner.start()
    assert launcher.engine().source == "configured"
    await reports.healthy()
    runner.terminate()
    await reports.exited()
    await launcher.close()


async def test_an_assignment_reaches_the_child(tmp_path: Path) -> None:
    script = tmp_path / "llama-server"
    script.write_text(f'#!/bin/sh\nexec {" ".join(FAKE.argv)} "$@"\n')
    script.chmod(0o755)
    launcher, reports = Launcher(Engines({"default": LlamaCpp(binary_path=str(script))})), Reports()
    runner = launcher.launch("m-1", make_profile(), reports, Assignment(None, (), 77))
    runner.start()
    await reports.healthy()
    assert psutil.Process(runner.pid).environ()["LLAMA_ARG_CACHE_RAM"] == "77"
    runner.terminate()
    await reports.exited()
    assert await launcher.vet(make_profile("--bogus")) == "error: invalid argument: --bogus"
    assert await launcher.vet(make_profile()) is None
    await launcher.close()


async def test_a_child_that_the_system_kills_ran_out_of_memory(node: Node) -> None:
    """trap 46"""
    runner, reports = node.start(env=faults(load_s=600))
    await line_of(runner, "loading")
    assert runner.pid is not None
    os.kill(runner.pid, signal.SIGKILL)
    assert (await reports.exited()).cause is Cause.MEMORY


async def test_a_missing_engine_is_told_by_start(tmp_path: Path) -> None:
    launcher = Launcher(Engines({"default": LlamaCpp(binary_path=str(tmp_path / "none"))}))
    runner = launcher.launch("m-1", make_profile(), Reports())
    with pytest.raises(EngineMissingError):
        runner.start()
    await launcher.close()


def test_sharded_models_count_whole(tmp_path: Path) -> None:
    shard = tmp_path / "big-00001-of-00004.gguf"
    shard.write_bytes(b"x" * 10)
    assert model_bytes(make_profile(model_path=str(shard))) == 40
    assert model_bytes(make_profile(model_path=str(tmp_path / "none"))) == 0
    assert model_bytes(make_profile(model_path=None, hf_repo="a/b")) == 0


async def test_nothing_is_started_with_flags_that_are_known_to_be_refused(tmp_path: Path) -> None:
    script = tmp_path / "llama-server"
    script.write_text(f'#!/bin/sh\nexec {" ".join(FAKE.argv)} "$@"\n')
    script.chmod(0o755)
    launcher = Launcher(Engines({"default": LlamaCpp(binary_path=str(script))}))
    profile = make_profile("--bogus")
    assert flags.refused(profile.args, launcher.engine(profile), os.environ, llama.KIND) is not None
    runner = launcher.launch("m-1", profile, Reports())
    with pytest.raises(InstanceError, match=r"\(build default\) does not know --bogus"):
        runner.start()
    assert runner.pid is None
    await launcher.close()


async def test_each_instance_runs_the_engine_of_its_profile(tmp_path: Path) -> None:
    builds = {}
    for name in ("default", "other"):
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\nexec {" ".join(FAKE.argv)} "$@"\n')
        script.chmod(0o755)
        builds[name] = LlamaCpp(binary_path=str(script))
    launcher, reports = Launcher(Engines(builds)), Reports()
    profile = make_profile(engine_build="other")
    runner = launcher.launch("m-1", profile, reports)
    runner.start()
    await reports.healthy()
    assert runner.engine == launcher.engine(profile) != launcher.engine()
    assert (runner.command[0], runner.engine.build) == (str(tmp_path / "other"), "other")
    runner.terminate()
    await reports.exited()
    await launcher.close()
