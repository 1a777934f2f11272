"""Instances that die, once or again and again: each request gets a right answer or one clear error."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from tests.e2e.harness import Models, Node, cookbook, eventually, profile
from tests.e2e.robustness import (
    Client,
    assert_at_rest,
    assert_broken_off,
    assert_same_fds,
    baseline,
    chat,
    chunks,
    client,
    content,
    fake_node,
    fake_profile,
    report,
)


def _wall(line: dict[str, str]) -> float:
    return datetime.fromisoformat(line["timestamp"].replace("Z", "+00:00")).timestamp()


def _now() -> float:
    return datetime.now().astimezone().timestamp()


def kill(instance: dict[str, int]) -> float:
    """SIGKILL the instance's process; return when, in wall time."""
    psutil.Process(instance["pid"]).kill()
    return _now()


# -- kill -9 of the child


def test_an_idle_instance_that_dies_is_noticed_and_replaced(tmp_path: Path) -> None:
    """Detected in well under 100 ms, told as a crash, and the next request is served (traps 24, 27, 29)."""
    with fake_node(tmp_path, {"m": fake_profile()}) as node:
        before = None
        detected_ms = []
        for turn in range(1, 3):
            instance = node.prewarm("m")
            before = before or baseline(node)
            killed = kill(instance)
            lines = node.wait_log("instance failed", count=turn, within_s=5)
            detected_ms.append(round((_wall(lines[-1]) - killed) * 1000, 1))
            assert lines[-1]["fields"]["kind"] == "crash"
            assert not node.instances("m"), "not in the table as something that lives"
            assert not psutil.pid_exists(instance["pid"]), "reaped"
            if turn == 1:
                assert node.say("m") == "hello from fake.gguf"
        report(detected_ms=detected_ms)
        assert max(detected_ms) < 250  # 100 on a quiet machine
        assert node.metric("llama_mesh_instance_crashes_total") == 2
        assert before is not None
        assert_same_fds(node, before)


def test_a_request_without_a_first_byte_is_sent_again(tmp_path: Path) -> None:
    """The instance dies in prefill: the client gets its answer from the next one (trap 75)."""
    with fake_node(tmp_path, {"m": fake_profile(prefill_s=1)}) as node:
        instance = node.prewarm("m")

        async def scenario() -> tuple[int, bytes]:
            async with client(node) as one:
                one.send(chat("m", stream=True))
                await asyncio.sleep(0.3)
                kill(instance)
                return await asyncio.wait_for(one.answer(), 10)

        status, body = asyncio.run(scenario())
        assert (status, content(body)) == (200, "hello from fake.gguf")
        assert node.metric("llama_mesh_upstream_retries_total") == 1
        assert node.metric("llama_mesh_errors_total") == 0
        assert_at_rest(node)


def test_a_stream_whose_instance_dies_gets_an_error_event_and_no_clean_end(tmp_path: Path) -> None:
    """After the first byte nothing is sent again, and the break shows on both levels (traps 7, 75)."""
    with fake_node(tmp_path, {"m": fake_profile(tokens_per_s=50)}) as node:
        instance = node.prewarm("m")

        async def scenario() -> list[bytes]:
            clients = [await Client.connect(node) for _ in range(4)]
            for one in clients:
                one.send(chat("m", stream=True, ignore_eos=True, max_tokens=10_000))
                assert (await one.head())[0] == 200
            await asyncio.sleep(0.3)
            kill(instance)
            rests = await asyncio.wait_for(asyncio.gather(*(one.rest() for one in clients)), 5)
            for one in clients:
                await one.close()
            return rests

        for raw in asyncio.run(scenario()):
            assert_broken_off(raw)
            assert content(b"".join(chunks(raw)[0])).startswith("hello from fake.gguf")
        assert node.metric("llama_mesh_errors_total") == 4
        assert_at_rest(node)
        assert node.say("m")


def test_a_stream_of_the_real_server_breaks_off_likewise(tmp_path: Path, models: Models) -> None:
    """kill -9 of the real llama-server in mid-stream, then the next request is served (traps 7, 24)."""
    with Node(tmp_path, cookbook({"alpha": profile(models.alpha)})) as node:
        instance = node.prewarm("alpha")

        async def scenario() -> bytes:
            async with client(node) as one:
                one.send(chat("alpha", stream=True, ignore_eos=True, max_tokens=4000))
                await one.head()
                start = await one.reader.readexactly(5000)
                kill(instance)
                return start + await asyncio.wait_for(one.rest(), 5)

        raw = asyncio.run(scenario())
        assert_broken_off(raw)
        assert "I am alpha" in content(b"".join(chunks(raw)[0]))
        assert node.say("alpha") == "I am alpha"
        assert_at_rest(node)


def test_a_plain_answer_whose_instance_dies_is_cut_off(tmp_path: Path) -> None:
    """Less than Content-Length says, then the connection ends: no client can take it for whole (trap 7)."""
    size = 60 * 10**6
    with fake_node(tmp_path, {"m": fake_profile(reply_bytes=size)}) as node:
        instance = node.prewarm("m")

        async def scenario() -> int:
            one = await Client.connect(node, limit=2**16)
            one.send(chat("m"))
            _, headers = await one.head()
            assert int(headers["content-length"]) > size
            await asyncio.sleep(0.3)
            kill(instance)
            rest = await asyncio.wait_for(one.rest(), 5)
            await one.close()
            return len(rest)

        assert asyncio.run(scenario()) < size
        assert_at_rest(node)


@pytest.mark.parametrize("streamed", [False, True])
def test_no_queued_request_is_lost_to_a_crash(tmp_path: Path, streamed: bool) -> None:
    """2 run, 20 wait, the instance is killed: those without a first byte are all served, in order (traps 19, 24)."""
    with fake_node(tmp_path, {"m": fake_profile("-np 2", tokens_per_s=30, prefill_s=0.1)}) as node:
        instance = node.prewarm("m")

        async def one_request(started: list[int], done: list[int], number: int) -> int:
            async with client(node) as one:
                await asyncio.sleep(number * 0.005)
                started.append(number)
                status, body = await one.ask(chat("m"))
                assert status != 200 or b"hello from fake.gguf" in body
                done.append(number)
                return status

        async def scenario() -> tuple[list[int], list[int]]:
            started: list[int] = []
            done: list[int] = []
            running = [await Client.connect(node) for _ in range(2)]
            for one in running:
                one.send(chat("m", stream=streamed, ignore_eos=True, max_tokens=40))
                if streamed:
                    await one.head()
            queued = [asyncio.ensure_future(one_request(started, done, n)) for n in range(20)]
            await asyncio.to_thread(
                eventually, lambda: sum(node.status()["queues"].values()) == 20, what="20 wait", every_s=0.02
            )
            kill(instance)
            statuses = list(await asyncio.wait_for(asyncio.gather(*queued), 20))
            for one in running:
                if streamed:
                    assert_broken_off(await one.rest())
                else:
                    statuses.append((await one.answer())[0])
                await one.close()
            return statuses, done

        statuses, done = asyncio.run(scenario())
        assert set(statuses) == {200}, statuses
        assert all(abs(number - place) < 4 for place, number in enumerate(done)), (
            f"about first come first served: {done}"
        )
        assert_at_rest(node)
        assert node.metric("llama_mesh_instance_crashes_total") == 1


# -- those that die again and again


def test_a_load_that_always_fails_backs_off(tmp_path: Path) -> None:
    """Requests get 503 with the reason, the log's end and Retry-After, fast; few processes are started (trap 25)."""
    models = {"bad": fake_profile(crash_at_load=1), "good": fake_profile()}
    with fake_node(tmp_path, models) as node:
        node.prewarm("good")
        before, spawned = baseline(node, "good"), node.metric("llama_mesh_instance_spawns_total")
        start, answers, slowest_s = time.monotonic(), 0, 0.0
        while time.monotonic() - start < 2.5:
            asked = time.monotonic()
            response = node.chat("bad")
            slowest_s = max(slowest_s, time.monotonic() - asked)
            answers += 1
            error = response.json()["error"]
            assert (response.status_code, error["type"]) == (503, "instance_failed")
            assert "exiting due to model loading error" in error["message"]
            assert answers == 1 or int(response.headers["retry-after"]) >= 0
            assert answers % 50 or node.say("good")
        spawns = node.metric("llama_mesh_instance_spawns_total") - spawned
        report(answers=answers, spawns=spawns, slowest_s=slowest_s)
        assert 2 <= spawns <= 5, "at once, then after 0, 1, 2 s"
        assert slowest_s < 2
        assert len(node.instances()) == 1
        assert_at_rest(node)
        assert_same_fds(node, before)


def test_an_instance_that_crashes_on_every_request_backs_off(tmp_path: Path) -> None:
    """A request that kills whoever gets it is tried twice, not for ever; then its model rests a while (trap 25)."""
    with fake_node(tmp_path, {"m": fake_profile(crash_after=0), "good": fake_profile()}) as node:
        node.prewarm("good")
        start, statuses = time.monotonic(), []
        while time.monotonic() - start < 2:
            response = node.chat("m")
            statuses.append(response.status_code)
            assert response.json()["error"]["type"] in ("upstream_error", "instance_failed")
            time.sleep(0.02)
        crashes = node.metric("llama_mesh_instance_crashes_total")
        report(requests=len(statuses), crashes=crashes, statuses={s: statuses.count(s) for s in set(statuses)})
        assert set(statuses) <= {502, 503}
        assert statuses[-1] == 503
        assert crashes <= 5
        assert node.say("good")
        assert_at_rest(node)
