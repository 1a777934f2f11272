"""Which contacts a node has: from settings, file and mDNS; and what it does while mDNS does not work."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import uvloop

from mesh.config.settings import Cluster
from mesh.config.settings import Discovery as MdnsSetting
from mesh.errors import ConfigError
from mesh.net import discovery
from mesh.net.addresses import LocalAddress
from mesh.net.discovery import LOOK_EVERY_S, Discovery
from mesh.net.mdns_records import Announcement, Reach
from tests.net.test_mdns import _WHY_NOT, _udp_sockets

LO = LocalAddress("lo", "127.0.0.1", 1, multicast=False)
LAN = LocalAddress("eth0", "192.168.1.5", 2)
WIFI = LocalAddress("wlan0", "10.1.1.5", 3)

Learned = Callable[[str, tuple[str, ...]], None]


async def inline(job: Callable[[], Any], name: str) -> Any:
    return job()


@dataclass
class FakeMdns:
    """Opens, or not, as the bench says."""

    bench: Bench
    own: Announcement
    reach: Reach
    learned: Learned
    closed: bool = False

    async def open(self) -> None:
        self.bench.opened.append(self)
        if self.bench.broken:
            raise OSError(self.bench.broken)

    async def close(self) -> None:
        self.closed = True


@dataclass
class Bench:
    """A ``Discovery`` on a machine whose network, file and multicast are variables."""

    local: tuple[LocalAddress, ...] = (LO, LAN)
    peers: tuple[str, ...] = ()
    filed: Iterable[str] | Exception = ()
    listen_host: str = "0.0.0.0"
    mdns: bool = True
    broken: str = ""
    opened: list[FakeMdns] = field(default_factory=list)
    found: list[str] = field(default_factory=list)

    def make(self) -> Discovery:
        return Discovery(
            Cluster.model_validate({"peers": self.peers, "discovery": {"mdns": self.mdns}}),
            node_id="me",
            fingerprint="my key",
            version="1.0",
            listen_host=self.listen_host,
            port=8080,
            on_found=self.found.append,
            read_peers=self._read,
            look=lambda: self.local,
            in_thread=inline,
            responder=lambda type_, own, reach, learned: FakeMdns(self, own, reach, learned),
        )

    def _read(self) -> Iterable[str]:
        if isinstance(self.filed, Exception):
            raise self.filed
        return self.filed


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.looptime
class TestContacts:
    async def test_all_sources_none_twice_none_our_own(self) -> None:
        """Settings first, then the file, then mDNS; names stay names (trap 68)."""
        bench = Bench(
            peers=("GPU1", "[2001:db8::7]:9000", "192.168.1.5:8080", "gpu1:8080"),
            filed=["10.0.0.7", "gpu1:8080", "nonsense:x", "127.0.0.1:8080"],
        )
        found = bench.make()
        assert found.contacts() == ("gpu1:8080", "[2001:db8::7]:9000", "192.168.1.5:8080")  # nobody looked yet
        await found.start()
        await settled()
        bench.opened[0].learned("a", ("10.0.0.7:8080", "10.0.0.8:8080", "[fe80::8%2]:8080", "192.168.1.5:8080"))
        await settled()
        expected = ("gpu1:8080", "[2001:db8::7]:9000", "10.0.0.7:8080", "10.0.0.8:8080", "[fe80::8%2]:8080")
        assert found.contacts() == expected
        assert bench.found == list(expected)
        await found.close()

    async def test_one_that_comes_back_is_news(self) -> None:
        bench = Bench()
        found = bench.make()
        await found.start()
        await settled()
        for contacts in (("10.0.0.8:1",), (), ("10.0.0.8:1",), ("10.0.0.8:1", "10.0.0.8:2")):
            bench.opened[0].learned("a", contacts)
            await settled()
            assert found.contacts() == contacts
        assert bench.found == ["10.0.0.8:1", "10.0.0.8:1", "10.0.0.8:2"]
        await found.close()

    async def test_the_file_is_read_again(self) -> None:
        """``llama-mesh join`` takes effect without a restart; a file that cannot be read changes nothing."""
        bench = Bench(mdns=False)
        found = bench.make()
        await found.start()
        await settled()
        assert found.contacts() == ()
        for bench.filed, expected in (
            (["10.0.0.7:1"], ("10.0.0.7:1",)),
            (OSError("gone"), ("10.0.0.7:1",)),
            (["10.0.0.8:1"], ("10.0.0.8:1",)),
        ):
            await asyncio.sleep(LOOK_EVERY_S)
            assert found.contacts() == expected
        assert bench.found == ["10.0.0.7:1", "10.0.0.8:1"]
        assert bench.opened == []
        await found.close()

    async def test_no_more_than_the_bound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Somebody floods the network; what people set is there all the same."""
        monkeypatch.setattr(discovery, "MOST_CONTACTS", 20)
        bench = Bench(peers=("gpu1:8080",))
        found = bench.make()
        await found.start()
        await settled()
        for n in range(100):
            bench.opened[0].learned(f"n{n}", (f"10.0.0.{n}:1",))
        await settled()
        assert len(found.contacts()) == 20
        assert found.contacts()[0] == "gpu1:8080"
        await found.close()

    async def test_many_answers_are_one_change(self) -> None:
        """Every contact is reported once, however the answers come."""
        bench = Bench()
        found = bench.make()
        await found.start()
        await settled()
        for n in range(200):
            bench.opened[0].learned(f"n{n}", (f"10.0.{n}.1:1",))
        await settled()
        assert len(bench.found) == len(set(bench.found)) == 200
        await found.close()

    async def test_a_listener_that_fails(self, caplog: pytest.LogCaptureFixture) -> None:
        """A bug in who is told is logged, and looking goes on."""
        bench = Bench(mdns=False, filed=["10.0.0.7:1"])
        found = bench.make()
        failures = iter([RuntimeError("bug")])

        def tell(address: str) -> None:
            for error in failures:
                raise error
            bench.found.append(address)

        found._on_found = tell
        await found.start()
        await settled()
        assert "looking for other nodes failed" in caplog.text
        bench.filed = ["10.0.0.7:1", "10.0.0.8:1"]
        await asyncio.sleep(LOOK_EVERY_S)
        assert bench.found == ["10.0.0.8:1"]
        await found.close()


@pytest.mark.looptime
class TestMdns:
    async def test_where_it_announces(self) -> None:
        bench = Bench(listen_host="192.168.1.5", local=(LO, LAN, WIFI))
        found = bench.make()
        await found.start()
        await settled()
        (mdns,) = bench.opened
        assert mdns.reach == Reach(("192.168.1.5",), ("192.168.1.5",))
        assert mdns.own == Announcement("me", "my key", "1.0", 8080)
        await found.close()
        assert mdns.closed

    async def test_the_network_changes(self) -> None:
        """A laptop goes from one network to another: it is announced again, and the old network's nodes are gone."""
        bench = Bench()
        found = bench.make()
        await found.start()
        await settled()
        bench.opened[0].learned("a", ("192.168.1.9:1",))
        await asyncio.sleep(10 * LOOK_EVERY_S)
        assert len(bench.opened) == 1  # nothing changed
        bench.local = (LO, WIFI)
        await asyncio.sleep(LOOK_EVERY_S)
        await settled()
        assert [(mdns.reach.interfaces, mdns.closed) for mdns in bench.opened] == [
            (("192.168.1.5",), True),
            (("10.1.1.5",), False),
        ]
        assert found.contacts() == ()
        await found.close()

    async def test_no_multicast_is_not_fatal(self, caplog: pytest.LogCaptureFixture) -> None:
        """One warning, then quiet retries that grow rarer; the static peers are there all the time."""
        bench = Bench(broken="not permitted", peers=("gpu1:8080",))
        found = bench.make()
        loop = asyncio.get_running_loop()
        began = loop.time()
        await found.start()
        await settled()
        assert loop.time() == began
        times = []
        for _ in range(400):
            count = len(bench.opened)
            await asyncio.sleep(LOOK_EVERY_S)
            if len(bench.opened) > count:
                times.append(loop.time() - began)
        pauses = [after - before for before, after in zip([0, *times], times, strict=False)]
        assert pauses[:6] == [10, 20, 40, 80, 160, 300]
        assert found.contacts() == ("gpu1:8080",)
        warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) == 1
        assert warnings[0].__dict__["fields"]["reason"] == "not permitted"
        await found.close()

    async def test_it_works_again(self, caplog: pytest.LogCaptureFixture) -> None:
        """The warning comes back only after it worked in between."""
        bench = Bench(broken="not permitted")
        found = bench.make()
        await found.start()
        await asyncio.sleep(1000)
        bench.broken = ""
        await asyncio.sleep(1000)
        bench.opened[-1].learned("a", ("192.168.1.9:1",))
        await settled()
        assert found.contacts() == ("192.168.1.9:1",)
        bench.broken, bench.local = "gone", (LO, WIFI)
        await asyncio.sleep(1000)
        assert found.contacts() == ()
        reasons = [r.__dict__["fields"]["reason"] for r in caplog.records if r.levelno >= logging.WARNING]
        assert reasons == ["not permitted", "gone"]
        await found.close()

    async def test_a_new_interface_is_tried_at_once(self) -> None:
        """No interface at the start, as on a machine that boots; no back-off stands in the way when one comes up."""
        bench = Bench(listen_host="10.1.1.5")
        found = bench.make()
        await found.start()
        await asyncio.sleep(3000)
        assert bench.opened == []
        bench.local = (LO, LAN, WIFI)
        await asyncio.sleep(LOOK_EVERY_S)
        assert len(bench.opened) == 1
        await found.close()

    async def test_loopback_falls_back_in_silence(self, caplog: pytest.LogCaptureFixture) -> None:
        bench = Bench(listen_host="127.0.0.1", broken="no multicast on lo")
        found = bench.make()
        await found.start()
        await asyncio.sleep(1000)
        assert bench.opened[0].reach.loopback
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        await found.close()

    async def test_an_interface_question_that_fails(self, caplog: pytest.LogCaptureFixture) -> None:
        bench = Bench()
        found = bench.make()
        found._look = iter(()).__next__  # raises
        await found.start()
        await asyncio.sleep(LOOK_EVERY_S)
        assert "looking for other nodes failed" in caplog.text
        found._look = lambda: bench.local
        await asyncio.sleep(LOOK_EVERY_S)
        assert len(bench.opened) == 1
        await found.close()

    def test_a_service_name_that_is_none(self) -> None:
        bench = Bench()
        discovery = MdnsSetting.model_construct(mdns=True, service_name="llama mesh")  # past what the loader checks
        settings = Cluster.model_construct(peers=(), discovery=discovery)
        with pytest.raises(ConfigError, match=r"cluster\.discovery\.service_name"):
            Discovery(
                settings,
                node_id="me",
                fingerprint="",
                version="",
                listen_host="::",
                port=1,
                on_found=bench.found.append,
                read_peers=tuple,
            )


async def test_closing_at_any_time() -> None:
    """Before the start, right after it, and twice."""
    found = Bench().make()
    await found.close()
    await found.start()
    await found.close()
    await found.close()
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_real_nodes(run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    """Two nodes of one machine that listen on loopback, as they are in production; nothing is left after them."""
    name = f"_lld-{psutil.Process().pid % 100000}._tcp.local"
    settings = Cluster.model_validate({"discovery": {"service_name": name}})

    async def scene() -> None:
        met = {port: asyncio.Event() for port in (1, 2)}
        nodes = [
            Discovery(
                settings,
                node_id="same name",
                fingerprint=f"key {port}",
                version="1.0",
                listen_host="127.0.0.1",
                port=port,
                on_found=lambda address, port=port: met[port].set(),  # type: ignore[misc]
                read_peers=tuple,
            )
            for port in met
        ]
        async with AsyncExitStack() as stack:
            for node in nodes:
                await node.start()
                stack.push_async_callback(node.close)
            async with asyncio.timeout(20):
                for event in met.values():
                    await event.wait()
            assert [node.contacts() for node in nodes] == [("127.0.0.1:2",), ("127.0.0.1:1",)]
        assert len(asyncio.all_tasks()) == 1

    sockets = _udp_sockets()
    run(scene())
    gc.collect()
    assert _udp_sockets() == sockets
    for thread in threading.enumerate():
        if thread.name == "discovery":  # a look at the interfaces that was under way
            thread.join(5)
    assert not [thread for thread in threading.enumerate() if "zeroconf" in thread.name]
