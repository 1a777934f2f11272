"""The machine runs out of something, or the world around the node stops reading: it goes on, and says so once."""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.e2e.harness import Node, eventually
from tests.e2e.robustness import Client, assert_at_rest, baseline, chat, client, fake_node, fake_profile, report

linux_only = pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="needs prlimit(2)")


@linux_only
def test_without_file_descriptors_it_waits_and_recovers(tmp_path: Path) -> None:
    """Accepting pauses instead of spinning, open connections are served, one line in the log (bad input: limits)."""
    with fake_node(tmp_path, {"m": fake_profile()}) as node:
        process, before = psutil.Process(node.pid), baseline(node)
        soft, hard = process.rlimit(psutil.RLIMIT_NOFILE)
        process.rlimit(psutil.RLIMIT_NOFILE, (before.fds + 40, hard))

        async def scenario() -> float:
            crowd = [await Client.connect(node) for _ in range(200)]  # the kernel accepts them, the node cannot
            await asyncio.sleep(0.3)
            used = sum(process.cpu_times()[:2])
            async with asyncio.timeout(20):
                for _ in range(20):
                    status, _ = await crowd[0].ask(chat("m"))
                    assert status in (200, 502)
                await asyncio.sleep(2)
            used = sum(process.cpu_times()[:2]) - used
            for one in crowd:
                one.vanish(reset=False)
            return used

        node._close_client()
        cpu_s = asyncio.run(scenario())
        process.rlimit(psutil.RLIMIT_NOFILE, (soft, hard))
        report(cpu_s_in_2_s=cpu_s)
        assert cpu_s < 1
        assert len(node.wait_log("cannot accept connections")) == 1
        eventually(lambda: node.say("m") == "hello from fake.gguf")
        assert_at_rest(node)


@linux_only
def test_a_full_disk_costs_logs_and_counters_only(tmp_path: Path) -> None:
    """Nothing more can be written to the log file, stdout or the state: requests are served all the same."""
    config = {"logging": {"enabled": True, "directory": str(tmp_path / "logs")}}
    with fake_node(tmp_path, {"m": fake_profile()}, config) as node:
        baseline(node)
        process = psutil.Process(node.pid)
        _, hard = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (1, hard))  # any write beyond byte 1 of a file is an error
        for _ in range(300):
            assert node.say("m") == "hello from fake.gguf"
        node.unload("m")
        eventually(lambda: not node.instances(), what="it is stopped")
        assert node.say("m") == "hello from fake.gguf"
        assert_at_rest(node)
        process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
        assert node.say("m") == "hello from fake.gguf"
        (log_file,) = (tmp_path / "logs").iterdir()
        for path in (tmp_path / "stdout", log_file):
            eventually(partial(_ends_with_a_request, path), what="logs are written again, on a line of their own")


def _ends_with_a_request(log: Path) -> bool:
    last = log.read_text().splitlines()[-1]
    return last.endswith("}") and json.loads(last)["fields"].get("path") == "/v1/chat/completions"


def _with_pipe(node: Node) -> subprocess.Popen[bytes]:
    """Start *node* with its stdout in a pipe that nobody reads yet."""
    command = [sys.executable, "-m", "mesh", "serve", "--config", "config.yaml", "--cookbook", "cookbook.yaml"]
    with (node.directory / "stderr").open("ab") as errors:
        process = subprocess.Popen(
            command,
            cwd=node.directory,
            env=node.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    node._process = process
    eventually(lambda: node._is_up() or process.poll() is not None, what="the node is up")
    return process


@pytest.mark.parametrize("reader", ["asleep", "gone"])
def test_a_reader_of_stdout_that_stops_holds_up_nobody(tmp_path: Path, reader: str) -> None:
    """A stopped ``less`` or a dead log collector: thousands of lines later all requests are served, and it ends."""
    node = fake_node(tmp_path, {"m": fake_profile()})
    process = _with_pipe(node)
    assert process.stdout is not None
    try:
        if reader == "gone":
            process.stdout.close()

        async def scenario() -> float:
            async with client(node) as one:
                start = time.monotonic()
                for _ in range(2000):  # some 600 KB of log
                    assert (await asyncio.wait_for(one.ask(chat("m")), 5))[0] == 200
                return time.monotonic() - start

        before = baseline(node)
        report(reader=reader, seconds=asyncio.run(scenario()))
        assert psutil.Process(node.pid).memory_info().rss / 2**20 < before.rss_mib + 10
        node._close_client()
        start = time.monotonic()
        process.terminate()
        assert process.wait(20) == 0
        report(reader=reader, stopped_after_s=time.monotonic() - start)
        eventually(lambda: not node.marked(), what="nothing is left")
    finally:
        process.stdout.close()
        node._kill_everything()
