"""The node dies, or is told to: nothing outlives it, and what it had promised is still answered."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mesh.engine import embedded
from tests.e2e.harness import Models, Node, cookbook, eventually, profile
from tests.e2e.robustness import FAKE, Client, chat, client, content, doomed, fake_node, fake_profile, report

KILLED = 130
ENGINES = {str(FAKE), embedded.__file__}


def assert_no_orphan(node: Node, *, within_s: float = 5.0) -> float:
    """Every process with the node's mark ends; return after how long."""
    start = time.monotonic()
    eventually(lambda: not node.marked(), within_s=within_s, every_s=0.02, what=f"no orphan: {node.marked()}")
    return time.monotonic() - start


def servers(node: Node) -> list[psutil.Process]:
    """Return the processes that are a llama-server, fake or real, whoever their parent is."""
    return [p for p in node.marked() if set(p.cmdline()[:4]) & ENGINES]


async def _streaming(node: Node, model: str) -> Client:
    one = await Client.connect(node)
    one.send(chat(model, stream=True, ignore_eos=True, max_tokens=100_000))
    await one.head()
    return one


# -- kill -9


@pytest.mark.parametrize("moment", ["idle", "streaming", "loading"])
def test_kill_9_of_the_node_leaves_no_real_server(tmp_path: Path, models: Models, moment: str) -> None:
    """No llama-server survives SIGKILL of its node by 5 s, whatever it does (trap 13)."""
    with doomed(Node(tmp_path, cookbook({"alpha": profile(models.alpha), "beta": profile(models.beta)}))) as node:
        node.prewarm("alpha")
        if moment == "idle":
            node.prewarm("beta")
        elif moment == "streaming":
            asyncio.run(_stream_a_little(node, "alpha"))
        else:
            node.http.post("/admin/prewarm", json={"model": "beta", "wait": False}).raise_for_status()
        eventually(lambda: len(servers(node)) == (1 if moment == "streaming" else 2), what="the servers run")
        node.sigkill()
        report(moment=moment, gone_after_s=assert_no_orphan(node))


async def _stream_a_little(node: Node, model: str) -> None:
    one = await _streaming(node, model)
    await one.reader.readexactly(2000)
    one.vanish(reset=True)


def test_kill_9_of_the_node_reaches_the_grandchild_of_a_wrapper(tmp_path: Path) -> None:
    """PDEATHSIG ends only the wrapper; the warden ends the ``bash -c`` grandchild that is the server (traps 13, 14)."""
    profiles = {"m": fake_profile(ignore_sigterm=True, grandchild=True)}
    with doomed(fake_node(tmp_path, profiles, by_wrapper=True)) as node:
        instance = node.prewarm("m")
        (server,) = servers(node)
        assert server.pid != instance["pid"], "the server is not the node's own child"
        assert server.ppid() == instance["pid"]
        node.sigkill()
        report(gone_after_s=assert_no_orphan(node))


def test_unload_ends_the_grandchild_of_a_wrapper(tmp_path: Path) -> None:
    """Stopping an instance signals its whole group (trap 14)."""
    with fake_node(tmp_path, {"m": fake_profile()}, by_wrapper=True) as node:
        node.prewarm("m")
        (server,) = servers(node)
        node.unload("m")
        eventually(lambda: not psutil.pid_exists(server.pid), within_s=5, what="the grandchild ends")
        eventually(lambda: not node.instances(), what="the instance is gone")


def test_kill_9_of_the_warden_is_noticed_and_repaired(tmp_path: Path) -> None:
    """Somebody kills the warden; the next start makes a new one that knows the older groups too (trap 13)."""
    with doomed(fake_node(tmp_path, {"m": fake_profile(), "n": fake_profile()}, by_wrapper=True)) as node:
        node.prewarm("m")
        (warden,) = [p for p in node.marked() if any("warden" in word for word in p.cmdline())]
        warden.kill()
        node.prewarm("n")
        assert len(servers(node)) == 2
        node.sigkill()
        assert_no_orphan(node)


# -- SIGTERM and SIGINT


async def _shutdown(node: Node, number: signal.Signals) -> dict[str, Any]:
    """Send *number* while 2 requests run and 6 wait; return what became of them and of newcomers."""
    kept = await Client.connect(node)
    assert (await kept.ask(b"GET /readyz HTTP/1.1\r\nHost: t\r\n\r\n"))[0] == 200
    clients = [await Client.connect(node) for _ in range(8)]
    for index, one in enumerate(clients):
        one.send(chat("m", stream=index % 2 == 0))
    await asyncio.to_thread(eventually, lambda: sum(node.status()["queues"].values()) == 6, what="6 wait")
    node._close_client()
    start = time.monotonic()
    node.process.send_signal(number)
    refused_after_s = None
    while refused_after_s is None and time.monotonic() - start < 5:
        try:
            (await Client.connect(node)).vanish(reset=False)
            await asyncio.sleep(0.01)
        except ConnectionRefusedError:
            refused_after_s = time.monotonic() - start
    kept_rest = await asyncio.wait_for(kept.rest(), 5)
    answers = await asyncio.wait_for(asyncio.gather(*(one.answer() for one in clients)), 20)
    for one in clients:
        assert await asyncio.wait_for(one.rest(), 5) == b"", "closed after the last answer"
        await one.close()
    await kept.close()
    status = await asyncio.to_thread(node.process.wait, 20)
    took_s = time.monotonic() - start
    times = {"refused_after_s": refused_after_s, "took_s": took_s}
    return {"answers": answers, "kept": kept_rest, "status": status, **times}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_drains(tmp_path: Path, number: signal.Signals) -> None:
    """Queued and running requests are answered, the listener is closed at once, children go, exit 0 (item 9)."""
    words = " ".join(f"w{n}" for n in range(20))
    node = fake_node(tmp_path, {"m": fake_profile("-np 2", say=words, tokens_per_s=80)})
    with doomed(node):
        node.prewarm("m")
        result = asyncio.run(_shutdown(node, number))
        assert [status for status, _ in result["answers"]] == [200] * 8
        for index, (_, body) in enumerate(result["answers"]):
            text = content(body) if index % 2 == 0 else json.loads(body)["choices"][0]["message"]["content"]
            assert text == words
        assert result["refused_after_s"] is not None
        assert result["refused_after_s"] < 0.5
        assert result["kept"] == b"", "an idle connection is closed without a word"
        assert result["status"] == 0
        node.assert_nothing_left()
        saved = json.loads((tmp_path / "state" / "metrics.json").read_text())
        assert saved["requests_total"] == 8
        report(signal=number.name, **{k: result[k] for k in ("refused_after_s", "took_s")})


def test_readyz_says_draining_to_who_can_still_ask(tmp_path: Path) -> None:
    """A connection in the middle of something at the signal gets 503 from /readyz for its next request."""
    with doomed(fake_node(tmp_path, {"m": fake_profile("-np 1", tokens_per_s=20, say="a " * 40)})) as node:
        node.prewarm("m")

        async def scenario() -> tuple[int, bytes]:
            async with client(node) as streaming, client(node) as asking:
                streaming.send(chat("m", stream=True))
                await streaming.head()
                asking.send(b"GET /readyz HTTP/1.1\r\nHo")  # a head that is not whole yet
                await asyncio.sleep(0.2)
                node.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.3)
                asking.send(b"st: t\r\n\r\n")
                answer = await asyncio.wait_for(asking.answer(), 5)
                await streaming.rest()
                return answer

        status, body = asyncio.run(scenario())
        assert (status, json.loads(body)["status"]) == (503, "draining")
        assert node.process.wait(15) == 0
        node.assert_nothing_left()


def test_requests_on_open_connections_while_draining(tmp_path: Path) -> None:
    """One that began before the signal is served; one that begins after it is refused with the reason, not dropped."""
    with doomed(fake_node(tmp_path, {"m": fake_profile("-np 1", tokens_per_s=20, say="a " * 40)})) as node:
        node.prewarm("m")

        async def scenario() -> tuple[tuple[int, bytes], tuple[int, bytes]]:
            async with client(node) as streaming, client(node) as begun, client(node) as late:
                streaming.send(chat("m", stream=True))
                await streaming.head()
                begun.send(chat("m")[:-5])  # its head is whole, its body is not
                late.send(chat("m")[:20])  # not even its head is
                await asyncio.sleep(0.2)
                node.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.3)
                begun.send(chat("m")[-5:])
                late.send(chat("m")[20:])
                refused = await asyncio.wait_for(late.answer(), 5)
                await streaming.rest()
                return await asyncio.wait_for(begun.answer(), 15), refused

        served, refused = asyncio.run(scenario())
        assert served[0] == 200, served[1]
        assert (refused[0], json.loads(refused[1])["error"]["type"]) == (503, "draining"), refused[1]
        assert node.process.wait(15) == 0
        node.assert_nothing_left()


def test_what_does_not_end_in_the_grace_period_is_cut_off(tmp_path: Path) -> None:
    """After ``shutdown_grace_period_seconds`` a stream ends unclean, waiting requests get 503, exit code 0."""
    node = fake_node(tmp_path, {"m": fake_profile("-np 1", tokens_per_s=20)}, {"shutdown_grace_period_seconds": 1})
    with doomed(node):
        node.prewarm("m")

        async def scenario() -> tuple[bytes, tuple[int, bytes]]:
            async with client(node) as waiting:
                running = await _streaming(node, "m")
                waiting.send(chat("m"))
                await asyncio.sleep(0.2)
                node.process.send_signal(signal.SIGTERM)
                answer = await asyncio.wait_for(waiting.answer(), 10)
                rest = await asyncio.wait_for(running.rest(), 10)
                await running.close()
                return rest, answer

        rest, (status, body) = asyncio.run(scenario())
        assert (status, json.loads(body)["error"]["type"]) == (503, "draining")
        assert b'data: {"error"' in rest
        assert not rest.endswith(b"0\r\n\r\n")
        start = time.monotonic()
        assert node.process.wait(15) == 0
        assert time.monotonic() - start < 5
        node.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_ends_the_loading_child(tmp_path: Path, number: signal.Signals) -> None:
    """Nobody waits for the load: the child is stopped at once and the node exits cleanly (trap 16)."""
    with doomed(fake_node(tmp_path, {"m": fake_profile(load_s=60)})) as node:
        node.http.post("/admin/prewarm", json={"model": "m", "wait": False}).raise_for_status()
        eventually(lambda: servers(node), what="it loads")
        start = time.monotonic()
        node.process.send_signal(number)
        assert node.process.wait(15) == 0
        took_s = time.monotonic() - start
        node._close_client()
        node.assert_nothing_left()
        report(signal=number.name, took_s=took_s)


def test_a_signal_while_a_request_waits_for_a_load(tmp_path: Path) -> None:
    """The load is within the grace period: the request is served, then everything ends (trap 16)."""
    with doomed(fake_node(tmp_path, {"m": fake_profile(load_s=1.5)})) as node:

        async def scenario() -> int:
            async with client(node) as one:
                one.send(chat("m"))
                await asyncio.sleep(0.5)
                node.process.send_signal(signal.SIGTERM)
                return (await asyncio.wait_for(one.answer(), 10))[0]

        assert asyncio.run(scenario()) == 200
        assert node.process.wait(15) == 0
        node.assert_nothing_left()


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)])
def test_a_second_signal_kills_at_once(tmp_path: Path, first: signal.Signals, second: signal.Signals) -> None:
    """It does not wait for requests, nor for children that ignore SIGTERM, wrappers' grandchildren included."""
    faults: dict[str, Any] = {"tokens_per_s": 20, "ignore_sigterm": True, "grandchild": True}
    with doomed(fake_node(tmp_path, {"m": fake_profile(**faults)}, by_wrapper=True)) as node:
        node.prewarm("m")

        async def scenario() -> float:
            running = await _streaming(node, "m")
            node.process.send_signal(first)
            await asyncio.sleep(0.3)
            assert node.process.poll() is None
            start = time.monotonic()
            node.process.send_signal(second)
            rest = await asyncio.wait_for(running.rest(), 5)
            assert not rest.endswith(b"0\r\n\r\n"), "never a clean end"
            await running.close()
            status = await asyncio.to_thread(node.process.wait, 5)
            assert status == KILLED
            return time.monotonic() - start

        took_s = asyncio.run(scenario())
        node._close_client()
        assert took_s < 4
        report(killed_after_s=took_s, gone_after_s=assert_no_orphan(node))


def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    """Stopping takes at most the 10 s grace + 5, with a grandchild that holds stdout open, too (trap 15)."""
    faults: dict[str, Any] = {"ignore_sigterm": True, "grandchild": True}
    with doomed(fake_node(tmp_path, {"m": fake_profile(**faults), "n": fake_profile(**faults)})) as node:
        node.prewarm("m")
        node.prewarm("n")
        start = time.monotonic()
        node.process.send_signal(signal.SIGTERM)
        assert node.process.wait(20) == 0
        took_s = time.monotonic() - start
        node._close_client()
        node.assert_nothing_left()
        assert took_s < 15, "both in parallel"
        report(took_s=took_s)


def test_a_signal_right_after_the_start_leaves_nothing(tmp_path: Path) -> None:
    """Whenever SIGTERM comes, the node ends, fast, and holds neither port nor lock."""
    node = fake_node(tmp_path, {"m": fake_profile()})
    for delay_s in (0.05, 0.2, 0.4, 0.6, 0.8, 1.0):
        process = node.spawn()
        time.sleep(delay_s)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    node.assert_nothing_left()


# -- two nodes


def test_a_second_node_on_the_same_state_refuses(tmp_path: Path) -> None:
    """It says whose state it is, and the first is undisturbed (trap 28)."""
    with fake_node(tmp_path / "one", {"m": fake_profile()}) as node:
        other = fake_node(tmp_path / "two", {"m": fake_profile()}, {"metrics_path": node.config["metrics_path"]})
        status, text = other.run_to_end()
        assert status == 1
        assert "another llama-mesh node uses" in text
        assert "metrics.json" in text
        assert "Traceback" not in text
        assert node.say("m")


def test_a_second_node_on_the_same_port_refuses(tmp_path: Path) -> None:
    """Likewise for the port (trap 28)."""
    with fake_node(tmp_path / "one", {"m": fake_profile()}) as node:
        other = fake_node(tmp_path / "two", {"m": fake_profile()}, {"listen_addr": f"127.0.0.1:{node.port}"})
        status, text = other.run_to_end()
        assert status == 1
        assert f"cannot listen on 127.0.0.1 port {node.port}" in text
        assert "Traceback" not in text
        assert node.say("m")


def test_the_state_is_free_right_after_kill_9(tmp_path: Path) -> None:
    """The lock is the kernel's: a node that was killed does not keep the next one from starting (trap 28)."""
    node = fake_node(tmp_path, {"m": fake_profile()})
    with doomed(node):
        node.prewarm("m")
        node.sigkill()
        assert_no_orphan(node)
        node.start()
        assert node.say("m")
        node.stop()
