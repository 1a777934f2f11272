"""Accepting and dialling over real sockets on both loops: trust, tokens, limits, what stays (nothing)."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mesh.core.node_state import PeerIdentity
from mesh.errors import LinkError, UntrustedPeerError
from mesh.net import link_dial
from mesh.net.link_dial import connect
from mesh.net.links import LinkLimits
from mesh.net.noise_hello import SelfDialError
from mesh.net.rate_limit import Rate
from tests.net.link_nodes import Recorder, echo, node, until

UNLIMITED = LinkLimits(known=Rate(1e9, 1e9))


@contextmanager
def silent_port() -> Iterator[int]:
    """A port that the kernel accepts connections on, and nobody else does."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(16)
        yield sock.getsockname()[1]


def log_lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(r.getMessage(), str(getattr(r, "fields", {}).get("reason"))) for r in caplog.records]


async def test_a_link_both_ways() -> None:
    async with node(1) as one, node(2) as two:
        mine = await one.dial(two, expect=two.identity.key)
        await until(lambda: len(two.served) == 1)
        theirs = two.served[0]
        theirs.on_data = echo
        mine.link.write(b"hello")
        await until(lambda: mine.data == b"hello")
        assert one.trust.admitted == [(two.identity.key, "node2", None)]
        assert two.trust.admitted == [(one.identity.key, "node1", None)]
        assert theirs.link.peer == PeerIdentity(one.identity.key, "node1", "1.0")
        assert (set(one.links.links), set(two.links.links)) == ({mine.link}, {theirs.link})
        mine.link.close()
        await theirs.lost.wait()
        await mine.lost.wait()
        assert not one.links.links
        assert not two.links.links


async def test_a_rotation_statement_reaches_trust() -> None:
    async with node(1) as one, node(2) as two:
        one.identity.rotation = b"signed by the old key"
        await one.dial(two)
        assert two.trust.admitted[0][2] == b"signed by the old key"


# --- who is refused


async def test_another_token() -> None:
    async with node(1, psk=bytes(32)) as one, node(2) as two:
        with pytest.raises(LinkError, match="most likely the cluster tokens differ") as caught:
            await one.dial(two)
        assert f"127.0.0.1:{two.port}" in caught.value.message
        await until(lambda: two.links.half_open == 0)
        assert not two.trust.admitted
        assert not two.served


async def test_a_stranger_is_refused_by_either_side() -> None:
    async with node(1) as one, node(2) as two:
        two.trust.strangers.add(one.identity.key)
        with pytest.raises(LinkError, match="refused this node"):
            await one.dial(two)
        two.trust.strangers.clear()
        one.trust.strangers.add(two.identity.key)
        with pytest.raises(UntrustedPeerError, match="not trusted"):
            await one.dial(two)
        await until(lambda: bool(two.served) and two.served[0].lost.is_set())
        assert isinstance(two.served[0].error, LinkError)
        assert "refused this node" in two.served[0].error.message
        assert not one.links.links
        assert not two.links.links


async def test_somebody_else_than_expected() -> None:
    """And nobody gets to be remembered for it."""
    async with node(1) as one, node(2) as two:
        with pytest.raises(LinkError, match="another node answers there: 'node2'"):
            await one.dial(two, expect=one.identity.key)
        assert not one.trust.admitted


async def test_oneself(caplog: pytest.LogCaptureFixture) -> None:
    """The accepting side only sees that it is closed, and says nothing of it; of others it does."""
    async with node(1) as one:
        for _ in range(3):
            with pytest.raises(SelfDialError, match="the node itself"):
                await one.dial(one)
            await until(lambda: one.links.half_open == 0)
        assert not one.trust.admitted
        assert not log_lines(caplog)
        assert not one.links.failures._excused
        _, stranger = await asyncio.open_connection("127.0.0.1", one.port)
        stranger.write(b"\0")
        stranger.close()
        await until(lambda: bool(log_lines(caplog)))
        await stranger.wait_closed()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
async def test_oneself_on_a_socket_for_both_kinds_of_address(caplog: pytest.LogCaptureFixture) -> None:
    async with node(1, host="::") as one:
        with pytest.raises(SelfDialError):
            await one.dial(one)
        await until(lambda: one.links.half_open == 0)
        assert not log_lines(caplog)


async def test_a_version_that_the_policy_rejects() -> None:
    def reject(peer: PeerIdentity) -> None:
        if peer.version.startswith("1."):
            raise LinkError(f"version {peer.version} is too old (cluster.version_policy)")

    async with node(1, version="2.0") as one, node(2, check_version=reject) as two:
        await one.dial(two)
        async with node(3) as three:
            with pytest.raises(LinkError, match="version_policy"):
                await two.dial(three)
            with pytest.raises(LinkError, match="refused this node"):
                await three.dial(two)
        assert [node_id for _, node_id, _ in two.trust.admitted] == ["node1"]


# --- who does not answer


async def test_nobody_there() -> None:
    with silent_port() as port:
        pass
    async with node(1) as one:
        with pytest.raises(LinkError, match=rf"127\.0\.0\.1:{port}: cannot be reached: Connection refused"):
            await one.links.dial("127.0.0.1", port, Recorder, timeout_s=5)
        with pytest.raises(LinkError, match=r"no-such-host\.invalid:1: cannot be reached"):
            await one.links.dial("no-such-host.invalid", 1, Recorder, timeout_s=5)


async def test_who_accepts_and_says_nothing() -> None:
    """trap 56"""
    async with node(1) as one:
        with silent_port() as port, pytest.raises(LinkError, match="accepts but does not speak, gave up"):
            await one.links.dial("127.0.0.1", port, Recorder, timeout_s=0.05)
        assert one.links.half_open == 0


async def test_who_is_no_node() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    async with node(1) as one:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        with pytest.raises(LinkError, match="not the handshake of a llama-mesh link"):
            await one.links.dial("127.0.0.1", server.sockets[0].getsockname()[1], Recorder, timeout_s=5)
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("turns", range(12))
async def test_a_dial_that_is_cancelled_leaves_nothing(turns: int) -> None:
    async with node(1) as one, node(2) as two:
        task = asyncio.get_running_loop().create_task(one.dial(two))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            (await task).link.abort()
        await until(lambda: not one.links.links and not two.links.links and not two.links.half_open)
        assert one.links.half_open == 0


async def test_a_protocol_that_fails_at_its_start() -> None:
    class Failing(Recorder):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            raise ZeroDivisionError

    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    async with node(1) as one, node(2) as two:
        with pytest.raises(ZeroDivisionError):
            await one.links.dial("127.0.0.1", two.port, Failing, timeout_s=5)
        await until(lambda: not one.links.links and bool(two.served) and not two.links.links)
    async with node(1) as one, node(2, Failing) as two:
        mine = await one.dial(two)
        await mine.lost.wait()
        assert isinstance(mine.error, LinkError)
        assert not two.links.links


# --- limits for those who begin


async def test_too_many_handshakes_of_one_source(caplog: pytest.LogCaptureFixture) -> None:
    """Said once, and once that it works again."""
    async with node(1) as one, node(2, limits=LinkLimits(known=Rate(0.0, 3))) as two:
        for _ in range(3):
            await one.dial(two)
        for _ in range(20):
            with pytest.raises(LinkError, match="takes no links now"):
                await one.dial(two)
        assert len(two.served) == 3
        assert [reason for _, reason in log_lines(caplog)] == ["too many handshakes from there"]


async def test_the_same_failure_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with node(1) as one, node(2) as two, node(3, psk=bytes(32)) as three:
        for _ in range(5):
            with pytest.raises(LinkError):
                await three.dial(two)
        await until(lambda: two.links.half_open == 0)
        assert len(log_lines(caplog)) == 1
        assert "cluster token" in log_lines(caplog)[0][1]
        await one.dial(two)
        assert "work again" in log_lines(caplog)[1][0]
        with pytest.raises(LinkError):
            await three.dial(two)
        await until(lambda: len(log_lines(caplog)) == 3)


@pytest.mark.parametrize("limits", [LinkLimits(half_open=4), LinkLimits(half_open_per_source=4)])
async def test_strangers_that_say_nothing(limits: LinkLimits, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them at once are closed unheard; whom this node knows gets through all the same."""
    monkeypatch.setattr("mesh.net.links.is_loopback", lambda source: False)
    async with node(1) as one, node(2, limits=limits) as two:
        slow = [await asyncio.open_connection("127.0.0.1", two.port) for _ in range(4)]
        for _, writer in slow:
            writer.write(b"\x00\x30half of message 1")
        await until(lambda: two.links.half_open == 4)
        with pytest.raises(LinkError):
            await one.dial(two)
        for _, writer in slow:
            writer.close()
        await until(lambda: two.links.half_open == 0)
        await one.dial(two)
        slow = [await asyncio.open_connection("127.0.0.1", two.port) for _ in range(8)]
        for _, writer in slow:
            writer.write(b"\x00\x30half of message 1")
        await until(lambda: two.links.half_open == 8)
        await one.dial(two)
        for _, writer in slow:
            writer.close()
        await until(lambda: two.links.half_open == 0)


async def test_all_strangers_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with many addresses has no more than one of them would."""
    monkeypatch.setattr("mesh.net.links.is_loopback", lambda source: False)
    names = iter(range(99))
    monkeypatch.setattr("mesh.net.links.source_of", lambda host: f"source {next(names)}")
    async with node(1) as one, node(2, limits=LinkLimits(strangers=Rate(0.0, 2))) as two:
        for _ in range(2):
            await one.dial(two)
        with pytest.raises(LinkError):
            await one.dial(two)


async def test_a_burst_from_whom_this_node_knows_is_no_attack() -> None:
    """Each of a hundred requests at once may need a link of its own."""
    async with node(1) as one, node(2) as two:
        await asyncio.gather(*(one.dial(two) for _ in range(100)))
        assert len(two.links.links) == 100


async def test_a_handshake_that_drips_is_closed() -> None:
    """However lively it is: the limit is for all of it (a Slowloris)."""
    async with node(2, limits=LinkLimits(handshake_s=0.1)) as two:
        reader, writer = await asyncio.open_connection("127.0.0.1", two.port)
        with suppress(OSError, RuntimeError):  # uvloop's for a transport that is closed by now
            for byte in b"\x00\x30" + bytes(46):
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.01)
            assert await reader.read() == b""
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        assert two.links.half_open == 0


# --- revocation and the end


async def test_dropping_a_key() -> None:
    async with node(1) as one, node(2) as two, node(3) as three:
        mine = [await one.dial(two) for _ in range(3)]
        other = await three.dial(two)
        await until(lambda: len(two.served) == 4)
        assert two.links.drop(one.identity.key) == 3
        assert two.links.drop(b"nobody's key") == 0  # type: ignore[arg-type]
        for recorder in mine:
            await recorder.lost.wait()
            assert isinstance(recorder.error, LinkError)
        assert isinstance(two.served[0].error, LinkError)
        assert "trust" in two.served[0].error.message
        assert not other.lost.is_set()


async def test_closing() -> None:
    async with node(1) as one, node(2) as two:
        mine = await one.dial(two)
        _, writer = await asyncio.open_connection("127.0.0.1", two.port)
        writer.write(b"\x00")
        await until(lambda: two.links.half_open == 1)
        await two.links.close()
        await two.links.close()
        assert two.links.half_open == len(two.links.links) == 0
        await mine.lost.wait()
        assert isinstance(mine.error, LinkError)
        with pytest.raises(LinkError):
            await one.dial(two)
        with pytest.raises(LinkError, match="this node is stopping"):
            await two.dial(one)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def test_closing_with_grace_sends_what_there_is() -> None:
    async with node(1) as one, node(2) as two:
        mine = await one.dial(two)
        await until(lambda: len(two.served) == 1)
        two.served[0].link.write(bytes(3_000_000))
        await two.links.close(grace_s=20)
        await mine.lost.wait()
        assert (len(mine.data), mine.error) == (3_000_000, None)


async def test_grace_ends() -> None:
    async with node(1) as one, node(2) as two:
        mine = await one.dial(two)
        mine.link.pause_reading()
        await until(lambda: len(two.served) == 1)
        two.served[0].link.write(bytes(30_000_000))
        await two.links.close(grace_s=0.05)
        assert isinstance(two.served[0].error, LinkError)
        mine.link.abort()


async def test_three_hundred_links_leave_nothing() -> None:
    """trap 63: descriptors, tasks, timers and memory are as before."""
    async with node(1) as one, node(2, limits=UNLIMITED) as two:

        async def cycle(number: int) -> None:
            mine = await one.dial(two)
            mine.link.write(bytes(2000))
            if number % 3 == 0:
                mine.link.abort()
            else:
                mine.link.close()
            await mine.lost.wait()

        for number in range(50):
            await cycle(number)
        await until(lambda: not two.links.links)
        two.served.clear()
        gc.collect()
        before = _descriptors(), len(asyncio.all_tasks()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(300):
            await cycle(number)
        await until(lambda: not two.links.links)
        two.served.clear()
        gc.collect()
        after = _descriptors(), len(asyncio.all_tasks()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert after[:2] == before[:2]
        assert after[2] - before[2] < 8192  # KiB
        assert one.links._timer is None
        assert two.links._timer is None


def _descriptors() -> int:
    directory = Path("/proc/self/fd")
    if not directory.exists():
        pytest.skip("counts descriptors in /proc")
    return len(os.listdir(directory))


# --- addresses


async def test_ipv6() -> None:
    """trap 68"""
    async with node(1) as one, node(2, host="::1") as two:
        link, _ = await one.links.dial("::1", two.port, Recorder, timeout_s=5)
        assert link.address == f"[::1]:{two.port}"
        two.trust.strangers.add(one.identity.key)
        with pytest.raises(LinkError, match=rf"^\[::1\]:{two.port}: "):
            await one.links.dial("::1", two.port, Recorder, timeout_s=5)


async def test_a_name_whose_first_address_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs a quarter second (less here), and the attempt leaves nothing."""
    monkeypatch.setattr(link_dial, "_STAGGER_S", 0.02)

    async def resolve(host: str, port: int) -> list[str]:
        return ["192.0.2.1", "127.0.0.1"]

    monkeypatch.setattr(link_dial, "_resolve", resolve)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (await connect("name", port)).abort()  # libuv opens a spare descriptor for itself, once
        await asyncio.sleep(0.01)
        before = _descriptors(), asyncio.all_tasks()
        tcp = await connect("name", port)
        assert tcp.get_extra_info("peername") == ("127.0.0.1", port)
        tcp.abort()
        await until(lambda: (_descriptors(), asyncio.all_tasks()) == before)


async def test_a_name_whose_second_address_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """``localhost`` where the node listens on one family only; at once, since the first refuses at once."""

    async def resolve(host: str, port: int) -> list[str]:
        return ["::1", "127.0.0.1"]

    monkeypatch.setattr(link_dial, "_resolve", resolve)
    monkeypatch.setattr(link_dial, "_STAGGER_S", 3600)
    async with node(1) as one, node(2) as two:
        link, _ = await one.links.dial("localhost", two.port, Recorder, timeout_s=10)
        assert link.address == f"127.0.0.1:{two.port}"


async def test_losers_of_the_race_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that answer, the second while the first is being looked at."""
    monkeypatch.setattr(link_dial, "_STAGGER_S", 0)

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"] * 5

    monkeypatch.setattr(link_dial, "_resolve", resolve)
    with socket.create_server(("127.0.0.1", 0)) as server:
        (await connect("name", server.getsockname()[1])).abort()  # libuv opens a spare descriptor for itself, once
        await asyncio.sleep(0.01)
        before = _descriptors(), asyncio.all_tasks()
        tcp = await connect("name", server.getsockname()[1])
        tcp.abort()
        await until(lambda: (_descriptors(), asyncio.all_tasks()) == before)


async def test_the_order_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    six, four = socket.AF_INET6, socket.AF_INET

    async def getaddrinfo(host: str, port: int, **more: object) -> list[tuple[object, ...]]:
        found = [
            (six, ("a", 1, 0, 0)),
            (six, ("b", 1, 0, 7)),
            (six, ("a", 1, 0, 0)),
            (four, ("c", 1)),
            (four, ("d", 1)),
        ]
        return [(family, 1, 6, "", address) for family, address in found]

    class Resolver:
        def __getattr__(self, name: str) -> object:
            return getaddrinfo if name == "getaddrinfo" else getattr(loop, name)

    monkeypatch.setattr(asyncio, "get_running_loop", Resolver)
    assert await link_dial._resolve("name", 1) == ["a", "c", "b%7", "d"]
