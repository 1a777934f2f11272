"""Reaching peers over real links: which address, what the outcome says of the peer, and its answers in words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from mesh.core.breaker import Limits, Phase
from mesh.core.gossip_message import Message, decode_message
from mesh.core.node_state import NodeState, PeerIdentity, PeerKey
from mesh.errors import LinkError, PeerError, PeerRefusalError
from mesh.net.gossip import Gossip, Target
from mesh.net.link_http import Answer
from mesh.net.outreach import LONGEST_CALL_S
from mesh.net.peer import Peer
from tests.members import Clock, key_of, made_peers, member, state
from tests.members import sync as tell
from tests.net.link_nodes import Node, Recorder, node, until
from tests.net.outreach_nodes import (
    FakeClient,
    FakeLinks,
    Reaching,
    Served,
    answer,
    at,
    reaching,
    with_fakes,
)
from tests.net.test_links import silent_port

EAGER = Limits(failure_threshold=1, success_threshold=2, open_base_s=5.0, probe_interval_s=0.0)
#: What a peer may say of where it is. The sixth is an address, but the resolver raises ``ValueError``.
MALFORMED = (
    "",
    "nowhere",
    ":80",
    "127.0.0.1:99999",
    f"{'a' * 64}.example:80",
    f"[fe80::1%{'x' * 100}]:80",
    "[::1:80",
    "two words:80",
    "http://127.0.0.1:80",
)


@asynccontextmanager
async def two_nodes(limits: Limits | None = None) -> AsyncIterator[tuple[Reaching, Node, Served]]:
    served = Served()
    async with reaching(limits) as one, node(2, served.serve) as two:
        yield one, two, served


def dead_address() -> str:
    with silent_port() as port:
        return f"127.0.0.1:{port}"


def target(there: Node, *addresses: str) -> Target:
    return Target(there.identity.key, addresses)


def opened(peer: Peer, clock: Clock) -> None:
    """Open its circuit."""
    permit = peer.breaker.allows(clock())
    assert permit is not None
    peer.failed(permit)
    assert phase(peer) is Phase.OPEN


def phase(peer: Peer) -> Phase:
    return peer.breaker.phase


# --- gossip


async def test_an_exchange() -> None:
    async with two_nodes() as (one, two, served):
        peer = one.knows(two.identity.key, at(two))
        served.answers = lambda link: answer(b"\x81news")
        identity, body = await one.outreach.exchange(target(two), b"\x80hello")
        assert (identity.key, identity.node_id, body) == (two.identity.key, "node2", b"\x81news")
        method, path, _, sent = served.requests[0]
        assert (method, path, sent) == ("POST", "/cluster/gossip", b"\x80hello")
        assert peer.good_address == at(two)
        assert peer.rtt_s is not None
        assert peer.rtt_s > 0


async def test_the_address_that_worked_is_the_first_from_then_on() -> None:
    async with two_nodes() as (one, two, _):
        dead = dead_address()
        one.knows(two.identity.key, dead, at(two))
        await one.outreach.exchange(target(two), b"")
        assert one.client.asked == [dead, at(two)]
        await one.outreach.exchange(target(two), b"")
        await one.outreach.call(one.knows(two.identity.key, dead, at(two)), "/x", {}, timeout_s=5)
        assert one.client.asked[2:] == [at(two), at(two)]


async def test_what_a_record_says_comes_before_what_gossip_remembers() -> None:
    """A contact is where it answered once; both are tried, each once."""
    async with two_nodes() as (one, two, _):
        dead = dead_address()
        one.knows(two.identity.key, dead)
        await one.outreach.exchange(target(two, dead, at(two)), b"")
        assert one.client.asked == [dead, at(two)]


async def test_a_contact_is_whoever_answers_there() -> None:
    async with two_nodes() as (one, two, _):
        contact = Target(None, (at(two),))
        identity, _ = await one.outreach.exchange(contact, b"")
        assert identity.key == two.identity.key
        peer = one.knows(two.identity.key, "192.0.2.1:80")  # known by now: where it answers is noted
        await one.outreach.exchange(contact, b"")
        assert peer.good_address == at(two)
        assert peer.rtt_s is not None


async def test_nobody_answers() -> None:
    async with two_nodes() as (one, two, _):
        peer = one.knows(two.identity.key, dead_address(), dead_address())
        with pytest.raises(LinkError, match="Connection refused"):
            await one.outreach.exchange(target(two), b"")
        with pytest.raises(LinkError, match="no address of it is known"):
            await one.outreach.exchange(Target(key_of(9), ()), b"")
        assert peer.good_address is None
        assert peer.failures_total == 0  # of forwards; this was none


async def test_malformed_addresses_do_no_harm() -> None:
    """They are the peer's words. A resolver may raise ``ValueError``, too."""
    async with two_nodes() as (one, two, served):
        peer = one.knows(two.identity.key, *MALFORMED, at(two))
        await one.outreach.exchange(target(two), b"")
        peer.good_address = None
        recorder = await one.outreach.dial(peer, Recorder)
        assert recorder.link.peer.key == two.identity.key
        peer.good_address = None
        assert await one.outreach.call(peer, "/x", {}, timeout_s=5) is True
        assert served.paths == ["/cluster/gossip", "/x"]
        assert one.client.asked == [*peer.state.addresses] * 2


@pytest.mark.parametrize("address", MALFORMED)
async def test_a_malformed_address_and_no_other(address: str) -> None:
    async with reaching() as one:
        peer = one.knows(key_of(9), address)
        for attempt in (
            one.outreach.exchange(Target(None, (address,)), b""),
            one.outreach.exchange(Target(peer.key, ()), b""),
            one.outreach.dial(peer, Recorder),
            one.outreach.call(peer, "/x", {}, timeout_s=5),
        ):
            with pytest.raises(LinkError):
                await attempt


async def test_another_node_lives_there_now() -> None:
    """It is asked nothing, and nobody gets to be remembered for it."""
    stranger = Served()
    async with two_nodes() as (one, two, _), node(3, stranger.serve) as three:
        peer = one.knows(two.identity.key, at(three), at(two))
        await one.outreach.exchange(target(two), b"")
        assert peer.good_address == at(two)
        peer.good_address = None
        assert await one.outreach.call(peer, "/x", {}, timeout_s=5) is True
        peer.good_address = None
        recorder = await one.outreach.dial(peer, Recorder)
        assert recorder.link.peer.node_id == "node2"
        assert peer.good_address == at(two)
        assert not stranger.requests
        assert {node_id for _, node_id, _ in one.here.trust.admitted} == {"node2"}
        one.knows(two.identity.key, at(three))
        peer.good_address = None
        with pytest.raises(LinkError, match="another node answers there: 'node3'"):
            await one.outreach.exchange(target(two), b"")


async def test_a_refusal_of_gossip_in_the_peers_words() -> None:
    async with two_nodes() as (one, two, served):
        peer = one.knows(two.identity.key, at(two), dead_address())
        served.answers = lambda link: answer(b'{"error": {"message": "this node is in no mesh"}}', 400)
        with pytest.raises(PeerError, match=rf"{at(two)}: this node is in no mesh") as caught:
            await one.outreach.exchange(target(two), b"")
        assert not isinstance(caught.value, LinkError)
        served.answers = lambda link: answer(b"", 404)
        with pytest.raises(PeerError, match="HTTP 404"):
            await one.outreach.exchange(target(two), b"")
        assert one.client.asked == [at(two)] * 2  # it is there: no other address would say anything else
        assert peer.good_address == at(two)


async def test_one_that_takes_the_message_and_says_nothing_is_not_tried_elsewhere() -> None:
    def silent(address: str) -> Answer:
        raise PeerError("no answer within 5 s")

    clock, client = Clock(), FakeClient(silent)
    peers = made_peers(clock, member(2, addresses=("a:1", "b:1")))
    with pytest.raises(PeerError, match="no answer"):
        await with_fakes(FakeLinks(), client, peers, clock).exchange(Target(key_of(2), ()), b"")
    assert client.asked == ["a:1"]


async def test_the_distance_is_smoothed() -> None:
    times = iter((0.2, 0.6))

    def reply(address: str) -> Answer:
        return Answer(200, (), b"", PeerIdentity(key_of(2), "n2"), next(times))

    clock = Clock()
    peers = made_peers(clock, member(2, addresses=("a:1",)))
    outreach = with_fakes(FakeLinks(), FakeClient(reply), peers, clock)
    for expected in (0.2, 0.3):
        await outreach.exchange(Target(key_of(2), ()), b"")
        peer = peers.get(key_of(2))
        assert peer is not None
        assert peer.rtt_s == pytest.approx(expected)


# --- a contact that is this node


async def test_a_contact_that_leads_back_here(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mesh")
    async with reaching() as one:
        identity, body = await one.outreach.exchange(Target(None, (at(one.here),)), b"")
        assert identity.key == one.here.identity.key
        assert decode_message(body) == Message()
        assert "a contact is not another node" in [record.getMessage() for record in caplog.records]


async def test_gossip_marks_it_and_does_not_try_it_again(caplog: pytest.LogCaptureFixture) -> None:
    """As with a name that stands for this node in everybody's ``cluster.peers``."""
    async with reaching() as one:
        gossip = Gossip(
            identity=one.here.identity,
            payload=msgspec.msgpack.encode(NodeState("node1")),
            incarnation=1,
            verify=lambda *_: True,
            allows=lambda *_: True,
            exchange=one.outreach.exchange,
            contacts=lambda: [at(one.here)],
        )
        running = asyncio.get_running_loop().create_task(gossip.run())
        contacts = gossip._contacts
        await until(lambda: any(contact.is_self for contact in contacts._contacts.values()))
        assert not gossip.members()
        assert one.client.asked == [at(one.here)]
        assert not [record for record in caplog.records if record.name == "mesh.net.gossip"]  # nobody has to act
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_peer_that_names_this_nodes_address_is_tried_elsewhere() -> None:
    async with two_nodes() as (one, two, served):
        peer = one.knows(two.identity.key, at(one.here), at(two))
        await one.outreach.exchange(target(two), b"")
        assert peer.good_address == at(two)
        one.knows(two.identity.key, at(one.here))
        peer.good_address = None
        with pytest.raises(LinkError, match="the node itself"):
            await one.outreach.exchange(target(two), b"")
        assert len(served.requests) == 1


# --- the circuit


async def test_gossip_closes_an_open_circuit() -> None:
    """trap 52: with no client about. Success is an answer; both probes must have one."""
    async with two_nodes(EAGER) as (one, two, _):
        peer = one.knows(two.identity.key, at(two))
        opened(peer, one.clock)
        one.clock.time += 5.0
        await one.outreach.exchange(target(two), b"")
        assert phase(peer) is Phase.HALF_OPEN
        await one.outreach.exchange(target(two), b"")
        assert phase(peer) is Phase.CLOSED
        assert peer.breaker.allows(one.clock()) is not None


async def test_in_its_pause_an_open_circuit_stays_open() -> None:
    """Gossip goes on as ever, but says nothing of it."""
    async with two_nodes(EAGER) as (one, two, served):
        peer = one.knows(two.identity.key, at(two))
        opened(peer, one.clock)
        await one.outreach.exchange(target(two), b"")
        assert len(served.requests) == 1
        assert phase(peer) is Phase.OPEN
        assert peer.breaker.refusal_s(one.clock()) == 5.0


@pytest.mark.parametrize("how", ["dead", "refuses"])
async def test_a_probe_that_fails_opens_the_circuit_again(how: str) -> None:
    async with two_nodes(EAGER) as (one, two, served):
        peer = one.knows(two.identity.key, dead_address() if how == "dead" else at(two))
        served.answers = lambda link: answer(b"", 503)
        opened(peer, one.clock)
        one.clock.time += 5.0
        with pytest.raises(PeerError):
            await one.outreach.exchange(target(two), b"")
        assert phase(peer) is Phase.OPEN
        assert peer.breaker.refusal_s(one.clock()) == 10.0


async def test_a_probe_that_finds_this_node_failed_too() -> None:
    async with reaching(EAGER) as one:
        peer = one.knows(key_of(9), at(one.here))
        opened(peer, one.clock)
        one.clock.time += 5.0
        with pytest.raises(LinkError, match="the node itself"):
            await one.outreach.exchange(Target(peer.key, ()), b"")
        assert phase(peer) is Phase.OPEN


async def test_a_probe_that_is_cancelled_gives_its_permit_back() -> None:
    """trap 53: the next probe need not wait for it, and the circuit is where it was."""
    async with two_nodes(EAGER) as (one, two, served):
        peer = one.knows(two.identity.key, at(two))
        served.answers = lambda link: None
        opened(peer, one.clock)
        one.clock.time += 5.0
        probe = asyncio.get_running_loop().create_task(one.outreach.exchange(target(two), b""))
        await served.asked.wait()
        assert peer.breaker.allows(one.clock()) is None  # one at a time
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        assert phase(peer) is Phase.HALF_OPEN
        assert peer.breaker.allows(one.clock()) is not None


async def test_a_closed_circuit_is_not_moved_by_gossip() -> None:
    """It is about forwards: neither opened by gossip that fails, nor is the count of failures begun anew."""
    limits = Limits(failure_threshold=2)
    async with two_nodes(limits) as (one, two, served):
        peer = one.knows(two.identity.key, at(two))
        permits = [peer.breaker.allows(one.clock()) for _ in range(2)]
        peer.failed(permits[0])
        await one.outreach.exchange(target(two), b"")
        served.answers = lambda link: answer(b"", 500)
        for _ in range(3):
            with pytest.raises(PeerError):
                await one.outreach.exchange(target(two), b"")
        assert phase(peer) is Phase.CLOSED
        peer.failed(permits[1])
        assert phase(peer) is Phase.OPEN


# --- requests


async def test_dialling_goes_from_address_to_address() -> None:
    async with two_nodes() as (one, two, _):
        dead = dead_address()
        peer = one.knows(two.identity.key, dead, at(two))
        recorder = await one.outreach.dial(peer, Recorder)
        assert recorder.link.peer.key == two.identity.key
        assert peer.addresses() == (at(two), dead)


async def test_dialling_in_vain() -> None:
    async with two_nodes() as (one, two, _):
        peer = one.knows(two.identity.key, dead_address(), dead_address())
        with pytest.raises(LinkError, match="Connection refused"):
            await one.outreach.dial(peer, Recorder)
        one.knows(two.identity.key, name="lost")
        with pytest.raises(LinkError, match="no address of node lost is known"):
            await one.outreach.dial(peer, Recorder)


async def test_dialling_that_is_cancelled_leaves_nothing() -> None:
    """trap 63"""
    async with reaching() as one:
        with silent_port() as port:
            peer = one.knows(key_of(9), f"127.0.0.1:{port}", dead_address())
            dialling = asyncio.get_running_loop().create_task(one.outreach.dial(peer, Recorder))
            await until(lambda: one.here.links.half_open == 1)
            dialling.cancel()
            await asyncio.gather(dialling, return_exceptions=True)
            assert dialling.cancelled()
            assert one.here.links.half_open == 0
        assert peer.good_address is None


@pytest.mark.looptime
async def test_dialling_has_an_end_however_many_addresses_there_are() -> None:
    """trap 56: the request could be served elsewhere. Each has three seconds, all of them six."""
    loop, links = asyncio.get_running_loop(), FakeLinks(quick=0.0)
    addresses = ("dead:1", "dead2:1", "dead3:1", "quick:1")
    clock = Clock()
    peers = made_peers(clock, member(2, addresses=addresses))
    peer = peers.get(key_of(2))
    assert peer is not None
    outreach = with_fakes(links, FakeClient(lambda address: pytest.fail(address)), peers, loop.time)
    began = loop.time()
    with pytest.raises(LinkError, match="dead2: cannot be reached"):
        await outreach.dial(peer, Recorder)
    assert loop.time() - began == pytest.approx(6.0)
    assert [host for host, _ in links.dialled] == ["dead", "dead2"]
    peer.good_address = "quick:1"
    await outreach.dial(peer, Recorder)
    assert links.dialled[2:] == [("quick", 3.0)]


@pytest.mark.looptime
async def test_the_last_address_gets_what_is_left() -> None:
    class Refusing(FakeLinks):
        async def dial(self, host: str, *args: object, **options: object) -> tuple[None, object]:
            if host != "refuses":
                return await super().dial(host, *args, **options)  # type: ignore[arg-type]
            await asyncio.sleep(2.0)
            raise LinkError("refused")

    loop, links = asyncio.get_running_loop(), Refusing()
    clock = Clock()
    peers = made_peers(clock)
    tell(peers, member(2, addresses=("refuses:1", "dead:1", "dead2:1")))
    peer = peers.get(key_of(2))
    assert peer is not None
    with pytest.raises(LinkError, match="dead2"):
        await with_fakes(links, FakeClient(lambda a: pytest.fail(a)), peers, loop.time).dial(peer, Recorder)
    assert [(host, round(limit_s, 3)) for host, limit_s in links.dialled] == [("dead", 3.0), ("dead2", 1.0)]


# --- operators' calls


async def test_a_call() -> None:
    async with two_nodes() as (one, two, served):
        peer = one.knows(two.identity.key, dead_address(), at(two))
        served.answers = lambda link: answer(b'{"drained": true}')
        assert await one.outreach.call(peer, "/admin/drain", {"unload": True}, timeout_s=5) == {"drained": True}
        method, path, headers, body = served.requests[0]
        assert (method, path) == ("POST", "/admin/drain")
        assert headers[b"content-type"] == b"application/json"
        assert msgspec.json.decode(body) == {"unload": True}


async def refused_by(reply: bytes) -> PeerRefusalError:
    async with two_nodes() as (one, two, served):
        peer = one.knows(two.identity.key, at(two), name="there")
        served.answers = lambda link: reply
        with pytest.raises(PeerRefusalError) as caught:
            await one.outreach.call(peer, "/admin/prewarm", {}, timeout_s=5)
        assert len(served.requests) == 1
        return caught.value


async def test_a_refusal_in_the_peers_words() -> None:
    body = b'{"error": {"message": "Model not found", "type": "model_not_found", "param": "model"}}'
    refusal = await refused_by(answer(body, 404))
    assert (refusal.message, refusal.status, refusal.type) == ("node there: Model not found", 404, "model_not_found")
    assert refusal.retry_after_s is None
    assert refusal.source == "peer"
    refusal = await refused_by(answer(body, 503, "Retry-After: 7"))
    assert (refusal.status, refusal.retry_after_s) == (503, 7)


async def test_a_status_that_would_mislead_is_a_502() -> None:
    """A 401 would be about the key of whoever asked here, a redirect about this node."""
    for status in (301, 401, 418, 500):
        assert (await refused_by(answer(b"{}", status))).status == 502


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b"7", b'{"error": "no"}', b'{"error": {}}', b"[" * 100_000])
async def test_a_refusal_without_words(body: bytes) -> None:
    refusal = await refused_by(answer(body, 503))
    assert (refusal.message, refusal.type) == ("node there: HTTP 503", "peer_error")


@pytest.mark.parametrize("wait", ["\u00b2", "9" * 5000, "-1", "1.5", "Fri, 27 Nov 2026 00:00:00 GMT"])
async def test_a_retry_after_that_is_no_number_of_seconds(wait: str) -> None:
    assert (await refused_by(answer(b"", 503, f"Retry-After: {wait}"))).retry_after_s is None


@pytest.mark.parametrize("body", [b"", b"\xff", b"ok", b'{"a": 1', b'"\xff"', b"[" * 100_000])
async def test_an_answer_that_is_no_json(body: bytes) -> None:
    async with two_nodes() as (one, two, served):
        served.answers = lambda link: answer(body)
        with pytest.raises(PeerError, match="node there did not answer in JSON"):
            await one.outreach.call(one.knows(two.identity.key, at(two)), "/x", {}, timeout_s=5)


async def test_a_link_that_is_cut() -> None:
    async with two_nodes() as (one, two, served):
        served.answers = lambda link: link.abort()
        peer = one.knows(two.identity.key, at(two))
        with pytest.raises(LinkError, match=at(two)):
            await one.outreach.call(peer, "/x", {}, timeout_s=5)


async def test_no_answer_in_time() -> None:
    """trap 56"""
    async with two_nodes() as (one, two, served):
        served.answers = lambda link: None
        peer = one.knows(two.identity.key, at(two))
        with pytest.raises(PeerError, match=r"within 0\.05 s"):
            await one.outreach.call(peer, "/x", {}, timeout_s=0.05)
        await until(lambda: served.connections[-1].lost.is_set())


async def test_a_call_that_is_cancelled_takes_its_link_with_it() -> None:
    """The operator left: the other node learns of it."""
    async with two_nodes() as (one, two, served):
        served.answers = lambda link: None
        peer = one.knows(two.identity.key, at(two))
        call = asyncio.get_running_loop().create_task(one.outreach.call(peer, "/x", {}, timeout_s=None))
        await served.asked.wait()
        call.cancel()
        await served.connections[-1].lost.wait()
        await asyncio.gather(call, return_exceptions=True)
        assert call.cancelled()


@pytest.mark.parametrize(("timeout_s", "limit_s"), [(30.0, 30.0), (None, LONGEST_CALL_S)])
async def test_the_limit_of_a_call_is_the_operators(timeout_s: float | None, limit_s: float) -> None:
    """A load takes minutes without a byte."""
    client = FakeClient(lambda address: Answer(200, (), b"{}", PeerIdentity(PeerKey(b"k" * 32), "n"), 0.1))
    clock = Clock()
    peers = made_peers(clock, member(2, addresses=("a:1",)))
    (peer,) = peers
    await with_fakes(FakeLinks(), client, peers, clock).call(peer, "/x", {}, timeout_s=timeout_s)
    assert client.options[0]["first_byte_s"] == client.options[0]["total_s"] == limit_s
    assert client.options[0]["expect"] == peer.key


async def test_nowhere_to_call() -> None:
    async with reaching() as one:
        peer = one.knows(key_of(9), name="lost")
        with pytest.raises(LinkError, match="no address of node lost is known"):
            await one.outreach.call(peer, "/x", {}, timeout_s=5)
    assert state("lost").addresses == ()
