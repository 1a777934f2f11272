"""mDNS against a zeroconf that does what the test says, and against the real one on the loopback interface."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any, cast

import psutil
import pytest
import uvloop
from zeroconf import NotRunningException, ServiceInfo, Zeroconf
from zeroconf.asyncio import AsyncZeroconf

from mesh.net import mdns
from mesh.net.mdns import CLOSE_S, GROUP, Mdns, check_multicast
from mesh.net.mdns_records import Announcement, Reach

TYPE = "_llama-mesh._tcp.local."
LAN = Reach(("192.168.1.5",), ("192.168.1.5",))
LOOPBACK = Reach(("127.0.0.1",), ("127.0.0.1",), loopback=True)
ZC = cast(Zeroconf, None)  # the listener does not look at it

Run = Callable[[Coroutine[Any, Any, None]], None]


def node(name: str, port: int = 8080) -> Announcement:
    return Announcement(name, f"key of {name}", "1.0", port)


def answer(own: Announcement, *addresses: str, port: int | None = None) -> ServiceInfo:
    name = f"{own.label}.{TYPE}"
    return ServiceInfo(
        TYPE, name, port=own.port if port is None else port, properties=own.txt, parsed_addresses=list(addresses)
    )


class FakeZeroconf:
    """AsyncZeroconf as far as Mdns uses it. ``network`` is what it knows; ``hangs`` is the call that never returns."""

    def __init__(self, interfaces: list[str | int]) -> None:
        self.interfaces = interfaces
        self.network: dict[str, ServiceInfo] = {}
        self.registered: list[ServiceInfo] = []
        self.broadcast: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.hangs = ""
        self.fails: dict[str, Exception] = {}
        self.asked: list[str] = []
        self.closed = self.sockets_closed = False
        self.zeroconf = self
        self.released = asyncio.Event()

    async def _step(self, name: str) -> None:
        if name in self.fails:
            raise self.fails[name]
        if self.hangs == name:
            await self.released.wait()

    async def async_add_service_listener(self, type_: str, listener: object) -> None:
        await self._step("browse")

    async def async_register_service(self, info: ServiceInfo, **options: object) -> asyncio.Future[None]:
        await self._step("register")
        self.registered.append(info)
        return self.broadcast

    async def async_get_service_info(self, type_: str, name: str, timeout: int) -> ServiceInfo | None:
        self.asked.append(name)
        await self._step("ask")
        return self.network.get(name)

    async def async_close(self) -> None:
        await self._step("close")
        self.closed = True

    def close(self) -> None:
        self.sockets_closed = True


class Bench:
    """One ``Mdns`` on a fake zeroconf, and what it reported."""

    def __init__(self, reach: Reach = LAN, **faults: Any) -> None:
        self.reports: list[tuple[str, tuple[str, ...]]] = []
        self.faults = faults
        self.mdns = Mdns(TYPE, node("me"), reach, self._report, responder=self._make, check=lambda reach: None)

    def _make(self, *, interfaces: list[str | int]) -> AsyncZeroconf:
        self.zeroconf = FakeZeroconf(interfaces)
        for name, value in self.faults.items():
            setattr(self.zeroconf, name, value)
        return cast(AsyncZeroconf, self.zeroconf)

    def _report(self, name: str, contacts: tuple[str, ...]) -> None:
        self.reports.append((name, contacts))

    async def announce(self, own: Announcement, *addresses: str, port: int | None = None) -> str:
        """Let *own* be seen on the network; return its name there."""
        info = answer(own, *addresses, port=port)
        self.zeroconf.network[info.name] = info
        self.mdns.add_service(ZC, TYPE, info.name)
        await settled()
        return info.name

    @property
    def contacts(self) -> set[str]:
        return {contact for contacts in dict(self.reports).values() for contact in contacts}


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_it_announces_this_node() -> None:
    bench = Bench()
    await bench.mdns.open()
    (info,) = bench.zeroconf.registered
    assert bench.zeroconf.interfaces == ["192.168.1.5"]
    assert (info.port, info.parsed_addresses()) == (8080, ["192.168.1.5"])
    assert info.properties[b"id"] == b"me"
    assert info.server == f"{node('me').label}.local."
    await bench.mdns.close()
    assert bench.zeroconf.closed
    assert bench.zeroconf.broadcast.cancelled()


async def test_removal_is_by_the_exact_name() -> None:
    """trap 54: of ``tcp``, ``node``, ``node1`` and what DNS finds hard, exactly the one that left is forgotten."""
    bench = Bench()
    await bench.mdns.open()
    ids = ["tcp", "node", "node1", "node.1", "node 1", "_tcp.local.", "größe", "n" * 100, "n" * 101]
    names = {name: await bench.announce(node(name, 9000 + n), "192.168.1.9") for n, name in enumerate(ids)}
    assert len(bench.contacts) == len(ids)
    for n, name in enumerate(ids):
        bench.mdns.remove_service(ZC, TYPE, names[name].upper())  # DNS knows no case
        assert bench.contacts == {f"192.168.1.9:{9000 + later}" for later in range(n + 1, len(ids))}
    await bench.mdns.close()


async def test_two_nodes_of_one_name() -> None:
    bench = Bench()
    await bench.mdns.open()
    first, second = (Announcement("gpu", key, "1", port) for key, port in (("k1", 1), ("k2", 2)))
    name = await bench.announce(first, "192.168.1.9")
    await bench.announce(second, "192.168.1.9")
    bench.mdns.remove_service(ZC, TYPE, name)
    assert bench.contacts == {"192.168.1.9:2"}
    await bench.mdns.close()


async def test_a_node_that_moves() -> None:
    """Another address takes the place of the old one; the same one again is no news."""
    bench = Bench()
    await bench.mdns.open()
    for address in ("192.168.1.9", "192.168.1.9", "192.168.1.10"):
        await bench.announce(node("a"), address)
    assert [contacts for _, contacts in bench.reports] == [("192.168.1.9:8080",), ("192.168.1.10:8080",)]
    await bench.announce(node("a"), "127.0.0.1")  # nothing that could be dialed any more
    assert bench.contacts == set()
    await bench.mdns.close()


async def test_ourselves() -> None:
    """By our name nobody is even asked, and another name with our key is not believed."""
    bench = Bench()
    await bench.mdns.open()
    await bench.announce(node("me"), "192.168.1.5")
    assert bench.zeroconf.asked == []
    await bench.announce(Announcement("not me", "key of me", "1", 8080), "192.168.1.5")
    assert bench.reports == []
    await bench.mdns.close()


async def test_it_left_while_it_was_asked() -> None:
    """The answer comes late, and is dropped."""
    bench = Bench(hangs="ask")
    await bench.mdns.open()
    name = await bench.announce(node("a"), "192.168.1.9")
    bench.mdns.remove_service(ZC, TYPE, name)
    bench.zeroconf.released.set()
    await settled()
    assert bench.reports == []
    await bench.mdns.close()


async def test_a_flood_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table and the questions at once are bounded; who was known before stays."""
    monkeypatch.setattr(mdns, "MOST_NODES", 20)
    monkeypatch.setattr(mdns, "_MOST_QUESTIONS", 8)
    bench = Bench()
    await bench.mdns.open()
    await bench.announce(node("first"), "192.168.1.9")
    for n in range(50):
        await bench.announce(node(f"n{n}"), f"10.0.0.{n}")
    assert len(bench.contacts) == 20
    assert "192.168.1.9:8080" in bench.contacts
    bench.zeroconf.hangs = "ask"
    bench.zeroconf.asked.clear()
    for n in range(10):
        await bench.announce(node(f"n{n}"), f"10.1.0.{n}")
    assert len(bench.zeroconf.asked) == 8
    await bench.mdns.close()
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("error", [NotRunningException(), OSError("gone"), ValueError("nonsense")])
async def test_a_question_that_fails(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(fails={"ask": error})
    await bench.mdns.open()
    await bench.announce(node("a"), "192.168.1.9")
    assert bench.reports == []
    assert not caplog.records
    await bench.mdns.close()


@pytest.mark.parametrize("step", ["browse", "register"])
@pytest.mark.parametrize("error", [OSError("no"), NotRunningException(), RuntimeError("no interfaces")])
async def test_an_opening_that_fails_leaves_nothing(step: str, error: Exception) -> None:
    bench = Bench(fails={step: error})
    with pytest.raises(OSError):
        await bench.mdns.open()
    assert bench.zeroconf.closed
    assert bench.zeroconf.sockets_closed


@pytest.mark.looptime
async def test_an_opening_that_is_given_up() -> None:
    bench = Bench(hangs="register")
    task = asyncio.get_running_loop().create_task(bench.mdns.open())
    await settled()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert bench.zeroconf.closed
    assert bench.zeroconf.sockets_closed


@pytest.mark.looptime
async def test_a_goodbye_that_takes_for_ever() -> None:
    """The network is gone: the node still stops, and no socket stays."""
    bench = Bench(hangs="close")
    await bench.mdns.open()
    loop = asyncio.get_running_loop()
    began = loop.time()
    await bench.mdns.close()
    assert loop.time() - began == CLOSE_S
    assert bench.zeroconf.sockets_closed
    await bench.mdns.close()


async def test_a_goodbye_that_fails() -> None:
    bench = Bench(fails={"close": OSError(errno.ENETUNREACH, "unreachable")})
    await bench.mdns.open()
    await bench.mdns.close()
    assert bench.zeroconf.sockets_closed


async def test_a_broadcast_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    await bench.mdns.open()
    bench.zeroconf.broadcast.set_exception(OSError("gone"))
    await settled()
    await bench.mdns.close()
    gc.collect()
    assert not caplog.records


def test_no_multicast_here() -> None:
    """What zeroconf would only find out with a socket left open."""
    with pytest.raises(OSError):
        check_multicast(Reach(("203.0.113.77",), ()))  # an address that this machine does not have
    with pytest.raises(OSError):
        check_multicast(Reach((987654,), ()))


def test_port_5353_is_taken() -> None:
    """By a program that does not share it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        try:
            other.bind(("127.0.0.1", mdns.PORT))
        except OSError as error:
            pytest.skip(f"port {mdns.PORT} is in use here: {error}")
        with pytest.raises(OSError) as caught:
            check_multicast(LOOPBACK)
        assert caught.value.errno == errno.EADDRINUSE


# --- with the real one


def loopback_multicast() -> str:
    """Return why multicast on the loopback interface does not work here; nothing if it does."""
    try:
        check_multicast(LOOPBACK)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.settimeout(2)
            one.bind(("", 0))
            here = socket.inet_aton("127.0.0.1")
            one.setsockopt(
                socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, struct.pack("4s4s", socket.inet_aton(GROUP), here)
            )
            one.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, here)
            one.sendto(b"?", (GROUP, one.getsockname()[1]))
            one.recv(1)
    except OSError as error:
        return f"NO MULTICAST ON LOOPBACK HERE ({error}): mDNS is not tested with real sockets"
    return ""


_WHY_NOT = loopback_multicast()


@pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_real_nodes_find_each_other(run: Run) -> None:
    """Three nodes on the loopback interface: found, one says goodbye, and no task, thread or socket is left."""
    service = f"_llm-{psutil.Process().pid % 100000}._tcp.local."  # other test runs on this machine are not ours

    async def scene() -> None:
        seen: dict[str, dict[str, tuple[str, ...]]] = {}
        changed = asyncio.Event()

        def made(name: str, port: int) -> Mdns:
            def report(whose: str, contacts: tuple[str, ...]) -> None:
                seen.setdefault(name, {})[whose] = contacts
                changed.set()

            return Mdns(service, node(name, port), LOOPBACK, report)

        async def until(check: Callable[[], bool]) -> None:
            async with asyncio.timeout(20):
                while not check():
                    changed.clear()
                    await changed.wait()

        def known(name: str) -> set[str]:
            return {contact for contacts in seen.get(name, {}).values() for contact in contacts}

        nodes = {name: made(name, port) for name, port in (("tcp", 1), ("node", 2), ("node1", 3))}
        for one in nodes.values():
            await one.open()
            left_open.push_async_callback(one.close)
        everybody = {"127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"}
        await until(lambda: all(len(known(name)) == 2 for name in nodes))
        assert known("tcp") == everybody - {"127.0.0.1:1"}
        await nodes["node"].close()
        await until(lambda: known("tcp") == {"127.0.0.1:3"} and known("node1") == {"127.0.0.1:1"})
        await left_open.aclose()
        assert len(asyncio.all_tasks()) == 1

    async def closing() -> None:
        async with left_open:  # also of a test that failed
            await scene()

    left_open = AsyncExitStack()
    threads, sockets = threading.active_count(), _udp_sockets()
    run(closing())
    gc.collect()
    assert threading.active_count() == threads
    assert _udp_sockets() == sockets


def _udp_sockets() -> int:
    return len(psutil.Process().net_connections("udp"))
