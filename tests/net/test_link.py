"""A link as a transport, over real sockets on both loops; with time on the fake clock."""

from __future__ import annotations

import asyncio
import random
import socket
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.node_state import PeerIdentity
from mesh.errors import LinkError
from mesh.net.link import CLOSED_AFTER_TICKS, DEAD_AFTER_TICKS, PING_AFTER_TICKS, Link
from mesh.net.noise import Session
from mesh.net.noise_records import MAX_CONTENT, Control
from tests.net.link_nodes import Recorder, echo, linked, node, until
from tests.net.link_sessions import established
from tests.net.link_tcp import FakeTcp


def link_on(tcp: FakeTcp, arrived: list[bytes | Control] | None = None) -> tuple[Link, Recorder, Session]:
    """Return a link on *tcp*, its protocol, and the session at its other end."""
    mine, other = established()
    link = Link(tcp, mine, "test:1", lambda link: None)
    recorder = Recorder()
    link.start(recorder, arrived or [])
    return link, recorder, other


# --- what goes through


async def test_ten_megabytes_in_pieces_of_any_size() -> None:
    rng = random.Random(4)
    data = rng.randbytes(10_000_000)
    async with linked() as (mine, theirs):
        theirs.on_data = echo
        at = 0
        while at < len(data):
            size = rng.choice((1, 17, 200, 4096, 65519, 65520, 300_000))
            piece = data[at : at + size]
            mine.link.write(rng.choice((bytes, bytearray, memoryview))(piece))
            at += size
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        await until(lambda: len(mine.data) >= len(data))
        assert mine.data == theirs.data == data


async def test_writelines_and_nothing() -> None:
    async with linked() as (mine, theirs):
        mine.link.write(b"")
        mine.link.writelines([])
        mine.link.writelines([b"head ", b"", memoryview(b"body ")])
        mine.link.writelines([b"head ", memoryview(bytes(100_000)), bytearray(b" end")])
        await until(lambda: len(theirs.data) == 100_019)
        assert theirs.data == b"head body head " + bytes(100_000) + b" end"


async def test_a_view_of_items_that_are_no_bytes() -> None:
    async with linked() as (mine, theirs):
        mine.link.write(memoryview(bytes(100_000)).cast("I"))
        await until(lambda: len(theirs.data) == 100_000)


async def test_what_a_transport_tells() -> None:
    async with linked() as (mine, theirs):
        peer = mine.link.get_extra_info("mesh_peer")
        assert isinstance(peer, PeerIdentity)
        assert (peer, theirs.link.get_extra_info("mesh_peer").node_id) == (mine.link.peer, "node1")
        assert mine.link.get_extra_info("peername") == theirs.link.get_extra_info("sockname")
        assert mine.link.get_extra_info("nothing", 5) == 5
        sock = mine.link.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert isinstance(mine.link, asyncio.Transport)
        assert not mine.link.can_write_eof()
        with pytest.raises(NotImplementedError):
            mine.link.write_eof()
        assert mine.link.get_protocol() is mine
        mine.link.set_write_buffer_limits(high=1000, low=10)
        assert mine.link.get_write_buffer_limits() == (10, 1000)
        assert mine.link.get_write_buffer_size() == 0
        assert mine.link.is_reading()
        assert "node2" in repr(mine.link)
        with pytest.raises(TypeError):
            mine.link.set_protocol(asyncio.BufferedProtocol())


async def test_another_protocol_takes_over() -> None:
    """As the server's HTTP does on a connection (``set_protocol``)."""
    async with linked() as (mine, theirs):
        mine.link.write(b"one")
        await until(lambda: theirs.data == b"one")
        after = Recorder()
        theirs.link.set_protocol(after)
        mine.link.write(b"two")
        await until(lambda: after.data == b"two")
        mine.link.close()
        await after.lost.wait()
        assert (after.events, theirs.events) == (["eof", "lost"], ["made"])


async def test_streams_run_on_a_link() -> None:
    """asyncio's own stream protocol is a strict user of transports."""
    async with node(1) as one, node(2) as two:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        link, protocol = await one.links.dial(
            "127.0.0.1", two.port, lambda: asyncio.StreamReaderProtocol(reader), timeout_s=5
        )
        writer = asyncio.StreamWriter(link, protocol, reader, loop)
        await until(lambda: bool(two.served))
        two.served[0].on_data = echo
        writer.write(b"line\n")
        await writer.drain()
        assert await reader.readline() == b"line\n"
        writer.close()
        await writer.wait_closed()


# --- back-pressure


async def test_a_reader_that_pauses_stops_the_writer() -> None:
    """Neither side keeps more than its buffers: what is not read is not sent (and no memory is used for it)."""
    async with linked() as (mine, theirs):
        theirs.link.pause_reading()
        sent, piece = 0, bytes(65536)
        while "pause" not in mine.events:
            mine.link.write(piece)
            sent += len(piece)
            assert sent < 64_000_000
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert mine.link.get_write_buffer_size() < 1_000_000
        assert sum(len(item) for item in theirs.link._pending if isinstance(item, bytes)) <= 300_000
        assert not theirs.link.is_reading()
        theirs.link.resume_reading()
        await until(lambda: len(theirs.data) == sent)
        assert mine.events == ["made", "pause", "resume"]


async def test_pausing_within_a_delivery() -> None:
    """A protocol that takes one chunk and pauses gets them one by one, none lost, and then the end."""

    def one_at_a_time(recorder: Recorder, data: bytes) -> None:
        recorder.link.pause_reading()
        asyncio.get_running_loop().call_soon(recorder.link.resume_reading)

    async with linked() as (mine, theirs):
        theirs.on_data = one_at_a_time
        for number in range(200):
            mine.link.write(bytes([number]) * (60_000 if number % 10 == 0 else 100))
        mine.link.close()
        await theirs.lost.wait()
        assert len(theirs.data) == 20 * 60_000 + 180 * 100
        assert theirs.data[-100:] == bytes([199]) * 100
        assert (theirs.events, theirs.error) == (["made", "eof", "lost"], None)


async def test_what_was_decrypted_before_the_pause_is_kept() -> None:
    tcp = FakeTcp()
    link, recorder, other = link_on(tcp)
    recorder.on_data = lambda recorder, data: recorder.link.pause_reading()
    big = [bytes([n]) * 60_000 for n in range(4)]
    tcp.protocol.data_received(b"".join(map(other.sealer.seal, big)))
    assert (len(recorder.data), tcp.reading, link.is_reading()) == (60_000, False, False)
    tcp.protocol.data_received(other.sealer.seal(b"the end"))  # was read by then
    for count in (2, 3, 4):
        link.resume_reading()
        link.resume_reading()
        assert not tcp.reading
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(recorder.chunks) == count
    recorder.on_data = None
    link.resume_reading()
    await asyncio.sleep(0)
    assert recorder.data == b"".join(big) + b"the end"
    assert tcp.reading


async def test_what_comes_between_resuming_and_the_delivery_waits_its_turn() -> None:
    tcp = FakeTcp()
    link, recorder, other = link_on(tcp)
    link.pause_reading()
    tcp.protocol.data_received(other.sealer.seal(b"first "))
    link.resume_reading()
    tcp.protocol.data_received(other.sealer.seal(b"second"))
    assert recorder.data == b""
    await asyncio.sleep(0)
    assert recorder.data == b"first second"
    assert tcp.reading


@settings(deadline=None)  # each example has a loop of its own
@given(st.lists(st.sampled_from(["pause", "resume", "data", "big", "turn", "close"]), max_size=30))
def test_any_order_of_pauses(steps: list[str]) -> None:
    """Everything arrives once and in order, nothing while paused; TCP reads exactly if nothing is left to deliver."""

    async def play() -> None:
        tcp = FakeTcp()
        link, recorder, other = link_on(tcp)
        sent = b""
        for step in steps:
            before = bytes(recorder.data)
            if step == "pause":
                link.pause_reading()
            elif step == "resume":
                link.resume_reading()
            elif step == "turn":
                await asyncio.sleep(0)
            elif step == "close" and tcp.reading:
                tcp.protocol.data_received(other.sealer.seal_control(Control.CLOSE))
                break
            elif tcp.reading:
                content = [b"a", b"b"] if step == "data" else [bytes(60_000), b"c", bytes(60_000)]
                sent += b"".join(content)
                tcp.protocol.data_received(b"".join(map(other.sealer.seal, content)))
            if not link.is_reading():
                assert step != "turn" or recorder.data == before
            assert sent.startswith(recorder.data)
        link.resume_reading()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert recorder.data == sent
        assert tcp.reading or tcp.ended
        assert ("eof" in recorder.events) == (tcp.ended == "close")

    asyncio.run(play())


# --- how it ends


async def test_close_sends_what_is_pending_and_a_goodbye() -> None:
    async with linked() as (mine, theirs):
        mine.link.write(bytes(5_000_000))
        mine.link.close()
        mine.link.close()
        mine.link.write(b"too late")
        mine.link.writelines([bytes(20_000)])
        assert mine.link.is_closing()
        await theirs.lost.wait()
        await mine.lost.wait()
        assert len(theirs.data) == 5_000_000
        assert (theirs.events[-2:], theirs.error, mine.error) == (["eof", "lost"], None, None)
        assert theirs.link.is_closing()


async def test_abort_in_the_middle() -> None:
    """Who aborts knows; the other end must not take it for an end."""
    async with linked() as (mine, theirs):
        mine.link.write(bytes(5_000_000))
        mine.link.abort()
        await mine.lost.wait()
        await theirs.lost.wait()
        assert mine.error is None
        assert isinstance(theirs.error, LinkError)
        assert "eof" not in theirs.events


async def test_tcp_that_ends_or_breaks_is_no_end() -> None:
    """Truncation: a clean FIN too, which anybody on the way can send."""
    for cut in ("fin", "reset"):
        async with linked() as (mine, theirs):
            mine.link.write(b"half")
            await until(lambda: theirs.data == b"half")
            tcp = mine.link._tcp
            if cut == "fin":
                tcp.write_eof()
            else:
                tcp.abort()
            await theirs.lost.wait()
            assert isinstance(theirs.error, LinkError)
            assert "node1" in theirs.error.message
            assert "eof" not in theirs.events
            await mine.lost.wait()
            assert isinstance(mine.error, LinkError)


async def test_rubbish_on_an_established_link() -> None:
    async with linked() as (mine, theirs):
        mine.link._tcp.write(b"\x00\x20" + bytes(32))
        await theirs.lost.wait()
        assert isinstance(theirs.error, LinkError)
        assert "changed, repeated or left out" in theirs.error.message


async def test_the_goodbye_waits_its_turn_behind_a_pause() -> None:
    async with linked() as (mine, theirs):
        theirs.link.pause_reading()
        mine.link.write(b"last words")
        mine.link.close()
        await mine.lost.wait()
        assert theirs.events == ["made"]
        theirs.link.resume_reading()
        await theirs.lost.wait()
        assert (bytes(theirs.data), theirs.events, theirs.error) == (b"last words", ["made", "eof", "lost"], None)


async def test_both_close_at_once() -> None:
    async with linked() as (mine, theirs):
        mine.link.close()
        theirs.link.close()
        await mine.lost.wait()
        await theirs.lost.wait()
        assert (mine.error, theirs.error) == (None, None)


async def test_closing_from_within_a_delivery() -> None:
    tcp = FakeTcp()
    _, recorder, other = link_on(tcp)
    recorder.on_data = lambda recorder, data: recorder.link.close()
    tcp.protocol.data_received(b"".join(other.sealer.seal(bytes(60_000)) for _ in range(3)))
    tcp.protocol.data_received(other.sealer.seal(b"x"))
    assert (len(recorder.data), tcp.ended) == (60_000, "close")
    assert other.receive_data(tcp.take()) == [Control.CLOSE]
    tcp.protocol.connection_lost(None)
    assert recorder.error is None


async def test_a_reset_after_the_goodbye_is_a_clean_end() -> None:
    tcp = FakeTcp()
    _, recorder, other = link_on(tcp)
    tcp.protocol.data_received(other.sealer.seal(b"bye") + other.sealer.seal_control(Control.CLOSE))
    assert tcp.take() == b""  # nobody would read an answer to it
    tcp.protocol.connection_lost(ConnectionResetError())
    assert (bytes(recorder.data), recorder.events, recorder.error) == (b"bye", ["made", "eof", "lost"], None)


async def test_what_came_with_the_handshake_is_delivered_first() -> None:
    tcp = FakeTcp()
    _, recorder, other = link_on(tcp, [b"early"])
    tcp.protocol.data_received(other.sealer.seal(b" later"))
    assert recorder.data == b"early later"


async def test_small_records_of_one_read_are_one_chunk() -> None:
    tcp = FakeTcp()
    _, recorder, other = link_on(tcp)
    wire = b"".join(other.sealer.seal(b"event") + other.sealer.seal_control(Control.PING) for _ in range(5))
    tcp.protocol.data_received(wire + other.sealer.seal_control(Control.CLOSE))
    assert (bytes(recorder.data), recorder.chunks, recorder.events) == (b"event" * 5, [25], ["made", "eof"])


async def test_one_write_is_one_tcp_write() -> None:
    tcp = FakeTcp()
    link, _, other = link_on(tcp)
    for data in (b"x", bytes(MAX_CONTENT), bytes(MAX_CONTENT + 1)):
        before = tcp.writes
        link.write(data)
        assert tcp.writes == before + 1
    before = tcp.writes
    link.writelines([b"head", bytes(100_000)])
    assert tcp.writes == before + 1
    assert sum(len(cast(bytes, item)) for item in other.receive_data(tcp.take())) == 2 * MAX_CONTENT + 2 + 100_004


# --- silence


def ticks(link: Link, count: int) -> None:
    for _ in range(count):
        link.tick()


async def test_a_link_that_sends_nothing_pings() -> None:
    tcp = FakeTcp()
    link, _, other = link_on(tcp)
    ticks(link, PING_AFTER_TICKS - 1)
    assert tcp.written == b""
    link.tick()
    assert other.receive_data(tcp.take()) == [Control.PING]
    ticks(link, PING_AFTER_TICKS - 1)
    link.write(b"x")
    link.tick()
    assert other.receive_data(tcp.take()) == [b"x"]


async def test_a_peer_that_says_nothing_is_dead() -> None:
    tcp = FakeTcp()
    link, recorder, other = link_on(tcp)
    ticks(link, DEAD_AFTER_TICKS - 1)
    tcp.protocol.data_received(other.sealer.seal_control(Control.PING))
    ticks(link, DEAD_AFTER_TICKS - 1)
    assert tcp.ended is None
    link.tick()
    assert tcp.ended == "abort"
    tcp.protocol.connection_lost(None)
    assert isinstance(recorder.error, LinkError)
    assert "said nothing for 10 s" in recorder.error.message


async def test_a_link_that_is_ended_is_no_sign_of_life() -> None:
    """trap 55: ticks are counted anew from the end, whoever it came from."""
    for end in ("close", "abort", "fail"):
        tcp = FakeTcp()
        link, recorder, other = link_on(tcp)
        ticks(link, PING_AFTER_TICKS + 1)
        assert link.heard_lately
        link.tick()
        assert not link.heard_lately
        tcp.protocol.data_received(other.sealer.seal_control(Control.PING))
        assert link.heard_lately
        link.fail("revoked") if end == "fail" else getattr(link, end)()
        assert not link.heard_lately
        tcp.protocol.connection_lost(None)
        assert not link.heard_lately
        del recorder


async def test_who_does_not_listen_does_not_judge() -> None:
    """A paused reader hears no pings; when it reads on, the peer gets its ten seconds."""
    tcp = FakeTcp()
    link, recorder, other = link_on(tcp)
    link.pause_reading()
    ticks(link, 100)
    assert tcp.ended is None
    link.resume_reading()
    ticks(link, DEAD_AFTER_TICKS - 1)
    assert tcp.ended is None
    link.tick()
    assert tcp.ended == "abort"
    del recorder, other


async def test_no_pings_into_a_full_buffer() -> None:
    tcp = FakeTcp()
    link, recorder, _ = link_on(tcp)
    tcp.protocol.pause_writing()
    link.pause_reading()
    ticks(link, 50)
    assert tcp.written == b""
    tcp.protocol.resume_writing()
    link.tick()
    assert len(tcp.written) == 18
    assert recorder.events == ["made", "pause", "resume"]


async def test_a_close_that_the_peer_does_not_take_ends_all_the_same() -> None:
    tcp = FakeTcp()
    link, recorder, _ = link_on(tcp)
    link.close()
    ticks(link, CLOSED_AFTER_TICKS - 1)
    assert tcp.ended == "close"
    link.tick()
    assert tcp.ended == "abort"
    tcp.protocol.connection_lost(None)
    assert isinstance(recorder.error, LinkError)
