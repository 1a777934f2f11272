"""The links to one peer: how many are opened at once, who gets one that is free, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest

from mesh.api.peer_pool import PeerEndpoint, PeerPool
from mesh.api.upstream import UpstreamConnection
from mesh.core.breaker import Limits
from mesh.errors import LinkError, MeshError
from mesh.net.peer import Peer
from tests.members import Clock, key_of, member, profile

AT_ONCE = 16


class FakeTransport(asyncio.Transport):
    """What a pool does with a link."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = False
        self.reading = True

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class FakeRequester:
    """A request that wants a link until it has one, or heard that there is none."""

    def __init__(self) -> None:
        self.wants_connection = True
        self.connection: UpstreamConnection | None = None
        self.error: MeshError | None = None
        self.feed: Callable[[bytes], None] = lambda data: None
        self.on_failed: Callable[[], None] = lambda: None

    def connected(self, connection: UpstreamConnection) -> None:
        assert self.wants_connection
        self.wants_connection = False
        self.connection = connection
        connection.requester = self

    def connect_failed(self, error: MeshError) -> None:
        assert self.wants_connection
        self.wants_connection = False
        self.error = error
        self.on_failed()

    def upstream_lost(self, error: Exception | None) -> None:
        self.error = LinkError("lost")


class Dials:
    """Handshakes that are under way; the test ends each."""

    def __init__(self) -> None:
        self.open: list[asyncio.Future[None]] = []
        self.total = 0

    async def __call__(self, peer: Peer, factory: Callable[[], UpstreamConnection]) -> UpstreamConnection:
        self.total += 1
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.open.append(done)
        try:
            await done
        finally:
            self.open.remove(done)
        connection = factory()
        connection.connection_made(FakeTransport())
        return connection

    async def end(self, count: int = 1, error: Exception | None = None) -> None:
        for done in self.open[:count]:
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)
        await turns()


async def turns() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


class Peered:
    def __init__(self) -> None:
        peer = Peer(key_of(1), Limits(), Clock())
        peer.update(member(1, profile(ready=1)))
        self.dials = Dials()
        self.endpoint = PeerEndpoint(peer, "node-0", self.dials)
        self.pool: PeerPool = self.endpoint.pool

    async def want(self, count: int = 1) -> list[FakeRequester]:
        requesters = [FakeRequester() for _ in range(count)]
        for requester in requesters:
            self.pool.connect(cast(Any, requester))
        await turns()
        return requesters

    def give(self, requester: FakeRequester) -> UpstreamConnection:
        """Its answer was complete: its link is free."""
        connection = requester.connection
        assert connection is not None
        self.pool.give(connection, asyncio.get_running_loop().time())
        return connection


@pytest.fixture
async def peered() -> AsyncIterator[Peered]:
    peered = Peered()
    yield peered
    await peered.dials.end(10**6, LinkError("the test is over"))
    while peered.dials.open:
        await peered.dials.end(10**6, LinkError("the test is over"))
    assert peered.pool._dialing == 0, "a slot is lost"
    assert not peered.pool._waiting
    peered.endpoint.close()


def served(requesters: list[FakeRequester]) -> int:
    return sum(requester.connection is not None for requester in requesters)


async def test_few_handshakes_at_once(peered: Peered) -> None:
    """Each source may begin only so many: the rest would be refused, and count as failures of a peer that is well."""
    requesters = await peered.want(700)
    assert len(peered.dials.open) == AT_ONCE
    await peered.dials.end(5)
    assert (len(peered.dials.open), served(requesters)) == (AT_ONCE, 5)
    while peered.dials.open:
        await peered.dials.end(7)
        assert len(peered.dials.open) <= AT_ONCE
    assert served(requesters) == peered.dials.total == 700
    assert all(requester.error is None for requester in requesters)


async def test_a_link_that_is_free_goes_to_whoever_waits_longest(peered: Peered) -> None:
    requesters = await peered.want(AT_ONCE + 3)
    await peered.dials.end(1)
    first, waiting = requesters[0], requesters[AT_ONCE + 1 :]
    link = peered.give(first)
    assert link.requester is waiting[0]
    link = peered.give(waiting[0])
    assert link.requester is waiting[1]
    assert link.reused, "the peer may close it for being idle as the request goes out"
    assert not peered.pool.idle
    peered.give(waiting[1])
    assert peered.pool.idle == [link], "nobody waits any more"
    link.transport.abort()


async def test_a_link_reads_on_for_whoever_gets_it(peered: Peered) -> None:
    """The last answer's client may have been slow to the end."""
    requesters = await peered.want(AT_ONCE + 2)
    await peered.dials.end(1)
    link = requesters[0].connection
    assert link is not None
    link.pause_reading()
    peered.give(requesters[0])
    assert link.requester is requesters[-1]
    assert not link.paused
    assert cast(FakeTransport, link.transport).reading


async def test_a_link_that_is_closing_goes_to_nobody(peered: Peered) -> None:
    requesters = await peered.want(AT_ONCE + 2)
    await peered.dials.end(1)
    link = requesters[0].connection
    assert link is not None
    link.transport.abort()
    peered.give(requesters[0])
    assert requesters[-1].wants_connection
    await peered.dials.end(1)
    assert served(requesters) == 2


async def test_who_has_left_is_passed_over(peered: Peered) -> None:
    """With a handshake that is over, and with a link that is free."""
    requesters = await peered.want(AT_ONCE + 6)
    first, second = requesters[AT_ONCE + 2], requesters[AT_ONCE + 5]
    for gone in requesters[AT_ONCE:]:
        gone.wants_connection = gone in (first, second)
    await peered.dials.end(1)
    assert len(peered.dials.open) == AT_ONCE, "the next one's was begun"
    peered.give(requesters[0])
    assert second.connection is requesters[0].connection
    await peered.dials.end(AT_ONCE)
    assert first.connection is not None
    assert served(requesters) == AT_ONCE + 2


async def test_a_link_that_its_requester_left_goes_to_whoever_waits(peered: Peered) -> None:
    requesters = await peered.want(AT_ONCE + 2)
    requesters[0].wants_connection = False
    await peered.dials.end(1)
    assert requesters[-1].connection is not None
    assert requesters[0].connection is None


@pytest.mark.parametrize("error", [LinkError("nobody there"), ValueError("a bug")], ids=["peer", "bug"])
async def test_a_failed_dial_is_one_for_all_who_wait(
    peered: Peered, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Each would find out the same, one handful after the other, each after seconds. They try elsewhere at once."""
    requesters = await peered.want(AT_ONCE + 50)
    await peered.dials.end(1, error)
    assert [requester.error is not None for requester in requesters] == [True] + [False] * (AT_ONCE - 1) + [True] * 50
    assert len(peered.dials.open) == AT_ONCE - 1, "who has a handshake under way has what comes of it"
    await peered.dials.end(AT_ONCE)
    assert served(requesters) == AT_ONCE - 1
    assert caplog.text.count("connecting failed unexpectedly") == isinstance(error, ValueError)


async def test_failures_lose_no_slot(peered: Peered) -> None:
    for _ in range(3 * AT_ONCE):
        (requester,) = await peered.want()
        await peered.dials.end(1, LinkError("nobody there"))
        assert requester.error is not None
    requesters = await peered.want(AT_ONCE)
    assert len(peered.dials.open) == AT_ONCE
    await peered.dials.end(AT_ONCE)
    assert served(requesters) == AT_ONCE


async def test_who_hears_of_a_failed_dial_may_come_back_at_once(peered: Peered) -> None:
    """Another one of them asks for a link in the same call: it neither is forgotten nor goes round for ever."""
    requesters = await peered.want(AT_ONCE + 2)
    late = FakeRequester()
    requesters[-1].on_failed = lambda: peered.pool.connect(cast(Any, late))
    await peered.dials.end(1, LinkError("nobody there"))
    assert late.error is not None or len(peered.dials.open) == AT_ONCE
    await peered.dials.end(AT_ONCE)
    assert not late.wants_connection


async def test_a_peer_that_leaves_keeps_the_links_that_are_in_use(peered: Peered) -> None:
    """What it has begun to answer comes to its end; nothing is begun with it any more."""
    (working,) = await peered.want()
    await peered.dials.end(1)
    (resting,) = await peered.want()
    await peered.dials.end(1)
    idle = peered.give(resting)
    peered.endpoint.retire()
    in_use = working.connection
    assert in_use is not None
    assert idle.transport.is_closing()
    assert not in_use.transport.is_closing()
    assert not peered.pool.idle
    peered.give(working)
    assert in_use.transport.is_closing(), "its answer is over"
    assert not peered.pool.idle


async def test_who_waits_for_a_link_to_a_peer_that_leaves_hears_of_it(peered: Peered) -> None:
    """With the first handshake that is over, and with nobody's dial after that."""
    requesters = await peered.want(AT_ONCE + 20)
    peered.endpoint.retire()
    await peered.dials.end(1)
    assert all(requester.error is not None for requester in requesters[AT_ONCE:])
    await peered.dials.end(AT_ONCE)
    assert served(requesters) == 0
    assert all(requester.error is not None for requester in requesters)
    assert peered.dials.total == AT_ONCE


async def test_closing_cuts_all_of_them(peered: Peered) -> None:
    (working,) = await peered.want()
    await peered.dials.end(1)
    peered.endpoint.close()
    assert working.connection is not None
    assert working.connection.transport.is_closing()
    peered.endpoint.close()
