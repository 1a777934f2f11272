"""What links do as time passes, on the fake clock: limits of handshakes, pings, silence, and the one timer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mesh.errors import LinkError
from mesh.net import link_dial
from mesh.net.links import LinkLimits, Links
from mesh.net.noise import Session
from mesh.net.noise_records import Control
from mesh.net.rate_limit import Rate
from tests.net.link_nodes import FakeTrust, Recorder
from tests.net.link_sessions import PSK, FakeIdentity, initiator, responder
from tests.net.link_tcp import FakeTcp

pytestmark = pytest.mark.looptime


class Side:
    """A node's links on fake TCP, and the sessions at the other ends."""

    def __init__(self, **options: Any) -> None:
        self.served: list[Recorder] = []
        settings: dict[str, Any] = {
            "identity": FakeIdentity(9),
            "psk": PSK,
            "trust": FakeTrust(),
            "node_id": "node9",
            "version": "1.0",
            "serve": self.serve,
        }
        self.links = Links(**(settings | options))

    def serve(self) -> Recorder:
        self.served.append(Recorder())
        return self.served[-1]

    def accept(self) -> FakeTcp:
        tcp = FakeTcp()
        tcp.set_protocol(self.links.accept())
        tcp.protocol.connection_made(tcp)
        return tcp

    def link(self) -> tuple[FakeTcp, Session]:
        """Return an established link's TCP transport and its other end."""
        tcp, other = self.accept(), initiator()
        for _ in range(2):
            tcp.protocol.data_received(other.data_to_send())
            other.receive_data(tcp.take())
        return tcp, other

    async def close(self) -> None:
        for tcp in [link._tcp for link in self.links.links]:
            asyncio.get_running_loop().call_soon(tcp.protocol.connection_lost, None)  # type: ignore[attr-defined]
        await self.links.close()


async def test_a_silent_handshake_ends_after_five_seconds() -> None:
    side = Side()
    tcp = side.accept()
    await asyncio.sleep(4.9)
    assert tcp.ended is None
    await asyncio.sleep(0.2)
    assert side.links.half_open == 0
    assert str(tcp.ended) == "abort"


async def test_a_handshake_that_drips_gets_no_more_time() -> None:
    """A Slowloris sends a byte a second, each of them right."""
    side = Side()
    tcp, message = side.accept(), initiator().data_to_send()
    for second in range(4):
        tcp.protocol.data_received(message[second : second + 1])
        await asyncio.sleep(1)
    assert tcp.ended is None
    await asyncio.sleep(1.1)
    assert tcp.ended == "abort"
    tcp.protocol.data_received(message[4:])
    tcp.protocol.connection_lost(None)
    assert tcp.written == b""


async def test_a_rate_for_each_source() -> None:
    side = Side(limits=LinkLimits(per_source=Rate(per_s=2.0, burst=3)))

    async def accepted() -> bool:
        tcp = side.accept()
        await asyncio.sleep(0.001)
        return tcp.ended is None

    assert [await accepted() for _ in range(5)] == [True, True, True, False, False]
    await asyncio.sleep(0.5)
    assert [await accepted() for _ in range(2)] == [True, False]
    await side.close()


async def test_where_a_peer_has_come_from_more_may_come() -> None:
    """A burst of requests to a node is a burst of links; a stranger's burst stays one."""
    side = Side(limits=LinkLimits(per_source=Rate(0.0, 1), known=Rate(0.0, 50)))
    side.link()
    more = [side.accept() for _ in range(50)]
    await asyncio.sleep(0.001)
    assert all(tcp.ended is None for tcp in more)
    last = side.accept()
    await asyncio.sleep(0.001)
    assert last.ended == "abort"
    await side.close()


async def test_pings_and_death() -> None:
    """Three seconds without a word of ours: a ping. Ten without one of theirs: dead."""
    side = Side()
    tcp, other = side.link()
    await asyncio.sleep(3.5)
    assert other.receive_data(tcp.take()) == [Control.PING]
    await asyncio.sleep(5)
    tcp.protocol.data_received(other.sealer.seal_control(Control.PING))
    await asyncio.sleep(9)
    assert tcp.ended is None
    await asyncio.sleep(2)
    assert tcp.ended == "abort"
    tcp.protocol.connection_lost(None)
    error = side.served[0].error
    assert isinstance(error, LinkError)
    assert "said nothing for 10 s" in error.message
    assert not side.links.links


async def test_two_ends_keep_each_other_alive() -> None:
    side = Side()
    tcp, other = side.link()
    for _ in range(100):
        await asyncio.sleep(3)
        pings = other.receive_data(tcp.take())
        assert len(pings) <= 1
        tcp.protocol.data_received(other.sealer.seal_control(Control.PING))
    assert tcp.ended is None
    await side.close()


async def test_a_process_that_was_stopped_does_not_take_its_peers_for_dead() -> None:
    """The loop's clock jumps by a minute (a suspended laptop): one tick, not sixty."""
    side = Side()
    tcp, other = side.link()
    loop: Any = asyncio.get_running_loop()
    began = loop.time()
    loop.setup_looptime(start=began + 60)
    await asyncio.sleep(5)
    assert loop.time() >= began + 65
    assert tcp.ended is None
    tcp.protocol.data_received(other.sealer.seal_control(Control.PING))
    await side.close()


async def test_one_timer_and_none_without_links() -> None:
    side = Side()
    assert side.links._timer is None
    first, _ = side.link()
    timer = side.links._timer
    assert timer is not None
    second, _ = side.link()
    assert side.links._timer is timer
    first.protocol.connection_lost(None)
    second.protocol.connection_lost(None)
    assert side.links._timer is None
    assert timer.cancelled()


async def test_a_dial_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """trap 56: while connecting, and while shaking hands; the time is for both together."""
    side, tcp = Side(), FakeTcp()

    async def connect(host: str, port: int) -> FakeTcp:
        await asyncio.sleep(2)
        return tcp

    monkeypatch.setattr("mesh.net.links.connect", connect)
    loop = asyncio.get_running_loop()
    for timeout_s, said in ((1.0, r"192\.0\.2\.9:1: cannot be reached, gave up after 1 s"), (3.0, "does not speak")):
        began = loop.time()
        with pytest.raises(LinkError, match=said):
            await side.links.dial("192.0.2.9", 1, Recorder, timeout_s=timeout_s)
        assert loop.time() - began == pytest.approx(timeout_s, abs=0.01)
    await asyncio.sleep(0)
    assert (tcp.ended, side.links.half_open) == ("abort", 0)


async def test_a_dial_that_is_cancelled_when_it_is_just_established(monkeypatch: pytest.MonkeyPatch) -> None:
    side, tcp, other, recorder = Side(), FakeTcp(), responder(), Recorder()

    async def connect(host: str, port: int) -> FakeTcp:
        return tcp

    monkeypatch.setattr("mesh.net.links.connect", connect)
    task = asyncio.get_running_loop().create_task(side.links.dial("h", 1, lambda: recorder, timeout_s=5))
    await asyncio.sleep(0.1)
    for _ in range(2):
        other.receive_data(tcp.take())
        tcp.protocol.data_received(other.data_to_send())
    assert recorder.made.is_set()
    task.cancel()  # the result is there, the waiter has not seen it
    with pytest.raises(asyncio.CancelledError):
        await task
    assert tcp.ended == "abort"
    tcp.protocol.connection_lost(None)
    assert isinstance(recorder.error, LinkError)
    assert not side.links.links


class Addresses:
    """What connecting to each address takes and leads to; a name stands for all of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: tuple[float, FakeTcp | OSError]) -> None:
        self.answers = answers
        self.begun: dict[str, float] = {}
        self.cancelled: set[str] = set()
        monkeypatch.setattr(link_dial, "_resolve", self.resolve)
        monkeypatch.setattr(link_dial, "_attempt", self.attempt)

    async def resolve(self, host: str, port: int) -> list[str]:
        return list(self.answers)

    async def attempt(self, host: str, port: int) -> FakeTcp | OSError:
        self.begun[host] = asyncio.get_running_loop().time()
        delay_s, answer = self.answers[host]
        try:
            await asyncio.sleep(delay_s)
        except asyncio.CancelledError:
            self.cancelled.add(host)
            raise
        return answer


async def test_a_dead_address_costs_a_quarter_second(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, loop = FakeTcp(), asyncio.get_running_loop()
    addresses = Addresses(monkeypatch, a=(120, OSError("late")), b=(0.1, wanted), c=(0.1, FakeTcp()))
    began = loop.time()
    assert await link_dial.connect("name", 1) is wanted
    assert loop.time() - began == pytest.approx(0.35, abs=0.01)
    assert addresses.cancelled == {"a"}
    assert set(addresses.begun) == {"a", "b"}


async def test_an_address_that_refuses_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = Addresses(monkeypatch, a=(0.01, OSError("refused")), b=(0.01, OSError("unreachable")))
    with pytest.raises(OSError, match="refused"):
        await link_dial.connect("name", 1)
    assert addresses.begun["b"] - addresses.begun["a"] == pytest.approx(0.01, abs=0.005)


async def test_of_two_that_answer_at_once_one_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    both = FakeTcp(), FakeTcp()
    Addresses(monkeypatch, a=(0.5, both[0]), b=(0.25, both[1]))
    winner = await link_dial.connect("name", 1)
    assert winner in both
    assert sorted(str(tcp.ended) for tcp in both) == ["None", "abort"]
    assert not winner.is_closing()


async def test_giving_up_on_a_name_ends_its_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = Addresses(monkeypatch, a=(120, OSError()), b=(120, OSError()))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await link_dial.connect("name", 1)
    assert addresses.cancelled == {"a", "b"}


async def test_a_name_that_stands_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Addresses(monkeypatch)
    with pytest.raises(OSError, match="no address"):
        await link_dial.connect("name", 1)
