"""Where a request goes and when, on the fake clock: peers are records, an exchange does as it is told and notes it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mesh.api.exchange import Exchange
from mesh.api.forwarding import Forwarder, Trip
from mesh.api.peer_pool import PeerLease
from mesh.config.profile import Profile
from mesh.core.breaker import Limits
from mesh.core.node_state import PeerIdentity, encode_state
from mesh.core.routing import Ranked, Work, rank
from mesh.errors import MeshError, QueueFullError
from mesh.net.peer import FULL_S, Peer
from mesh.net.peers import Peers, stand_in
from mesh.net.version_policy import VersionPolicy
from tests.members import VERSION, Member, key_of, state, sync
from tests.members import profile as offer

pytestmark = pytest.mark.looptime

KEY = "qwen:default"


class Mesh:
    """This node, which has no model, and what it knows of others. ``asked`` are attempts: when, whom, who."""

    def __init__(self, *, max_hops: int = 10, limits: Limits | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.members: dict[int, Member] = {}
        self.peers = Peers(
            limits or Limits(failure_threshold=1000), VersionPolicy(VERSION, "warn"), self.loop.time,
            lambda state: stand_in(state, max_wait_s=60.0, max_request_s=None, max_queue=0),
        )  # fmt: skip
        self.compared: list[list[str]] = []
        self.bug = False
        self.here = False
        self.forwarder = Forwarder(self.peers, self, node_id="n0", dial=cast(Any, None), max_hops=max_hops)
        self.asked: list[tuple[float, str, int]] = []
        self.answers: dict[str, Callable[[Request, PeerLease], None]] = {}
        self.served: list[int] = []

    # --- ``Local``

    def serves(self, key: str) -> bool:
        return self.here

    def rank(self, exchange: Exchange, peers: list[Peer], *, here: bool) -> tuple[Ranked, ...]:
        if self.bug:
            raise ValueError("a bug")
        self.compared.append([peer.node_id for peer in peers])
        return rank(Work(profile=exchange.profile.key), [peer.candidate(KEY) for peer in peers])

    def good_enough(self, key: str, peers: list[Peer]) -> bool:
        return False

    # --- the others

    def knows(self, number: int, **changes: Any) -> None:
        """A new record of node *number* came."""
        values: dict[str, Any] = {"ready": 1, "slots": 4, "decode_tps": 100.0, "service_s": 1.0} | changes
        old, now = self.members.get(number), self.loop.time()
        name = f"n{number}"
        payload = encode_state(state(name, offer(KEY, **values)))
        version = 1 if old is None else old.version + 1
        self.members[number] = Member(key_of(number), payload, version=version, updated_at=now)
        sync(self.peers, *self.members.values())

    def peer(self, number: int) -> Peer:
        peer = self.peers.get(key_of(number))
        assert peer is not None
        return peer

    def request(self, number: int = 0, *, sender: PeerIdentity | None = None, **changes: Any) -> Request:
        request = Request(self, number, **changes)
        request.trip = self.forwarder.trip(cast(Exchange, request), sender, None)
        return request


class Request:
    """An ``Exchange`` as far as a trip knows it."""

    def __init__(self, mesh: Mesh, number: int, *, max_wait_s: float | None = 60.0, **limits: int) -> None:
        self.mesh = mesh
        self.number = number
        values: dict[str, Any] = {"max_wait_s": max_wait_s, "max_instances": 0} | limits
        self.profile = Profile(KEY, "qwen", "qwen", "default", args=(), args_hash="h", **values)
        self.client: object | None = object()
        self.request_id = b"%d" % number
        self.bytes_in = 100
        self.route = SimpleNamespace(capability=None)
        self.trip: Trip
        self.since = mesh.loop.time()
        self.errors: list[MeshError] = []
        self.ended_at: float | None = None
        self.waits: list[float] = []  #: what each peer was told

    def go(self) -> Request:
        self.trip.go()
        return self

    def ask_peer(self, lease: PeerLease) -> None:
        self.since = self.mesh.loop.time()
        name = lease.node_id
        self.mesh.asked.append((self.since, name, self.number))
        wait = lease.fields.partition(b"X-Llama-Mesh-Wait-Ms: ")[2]
        self.waits.append(int(wait) / 1000 if wait else -1.0)
        self.mesh.answers.get(name, serve)(self, lease)

    def queue_here(self, wait_s: float | None) -> None:
        self.since = self.mesh.loop.time()
        if not self.trip.refused_here(QueueFullError("full here")):
            raise AssertionError("not expected")

    def wait_in_line(self) -> float:
        self.since = self.mesh.loop.time()
        return self.since

    @property
    def waited_s(self) -> float:
        return self.mesh.loop.time() - self.since

    def fail(self, error: MeshError) -> None:
        self.errors.append(error)
        self.end()

    def end(self) -> None:
        self.ended_at = self.mesh.loop.time()
        self.trip.cancel()

    @property
    def error(self) -> MeshError:
        (error,) = self.errors
        return error


def serve(request: Request, lease: PeerLease) -> None:
    lease.answered()
    request.mesh.served.append(request.number)
    lease.release()
    request.end()


def refuses(kind: str, status: int = 503, *, after_s: float = 0.005) -> Callable[[Request, PeerLease], None]:
    """As ``Delivery.answer_refused`` does it, *after_s* later."""

    def refuse(request: Request, lease: PeerLease) -> None:
        lease.answered()
        lease.refused(kind)
        lease.release()
        if request.ended_at is not None:  # its client left meanwhile
            return
        request.trip.peer_refused(lease.endpoint.peer, status, kind, b'{"error":{"message":"no"}}')

    return lambda request, lease: void(request.mesh.loop.call_later(after_s, refuse, request, lease))


def fails(*, after_s: float, sent: bool = False) -> Callable[[Request, PeerLease], None]:
    """As ``Delivery._try_elsewhere`` does it."""

    def fail(request: Request, lease: PeerLease) -> None:
        lease.failed()
        lease.release()
        request.trip.peer_failed(lease.endpoint.peer, MeshError("lost"), sent=sent)

    return lambda request, lease: void(request.mesh.loop.call_later(after_s, fail, request, lease))


def void(_: object) -> None:
    pass


FULL = refuses("queue_full")


# --- nobody has room


async def test_full_peers_are_asked_about_once_a_second_whatever_waits() -> None:
    """Each attempt is an upload: forty requests that each try for themselves would be forty a second."""
    mesh = Mesh()
    for number in (1, 2):
        mesh.knows(number)
        mesh.answers[f"n{number}"] = FULL
    requests = [mesh.request(number, max_wait_s=None).go() for number in range(40)]
    await asyncio.sleep(10)
    mesh.asked.clear()
    await asyncio.sleep(60)
    asked = Counter(name for _, name, _ in mesh.asked)
    assert set(asked) == {"n1", "n2"}
    assert all(20 <= count <= 60 / FULL_S + 1 for count in asked.values()), asked
    assert mesh.forwarder.waiting(KEY) in (39, 40)  # one may be away asking
    for request in requests:
        request.end()
    await asyncio.sleep(2)
    assert not mesh.forwarder.lines


async def test_who_came_first_goes_first_when_there_is_room() -> None:
    mesh = Mesh()
    mesh.knows(1)
    mesh.answers["n1"] = FULL
    for number in range(40):
        mesh.request(number).go()
        await asyncio.sleep(0.1)
    del mesh.answers["n1"]
    await asyncio.sleep(2)
    for number in range(40, 60):  # though there is room for them at once
        mesh.request(number).go()
        await asyncio.sleep(0.01)
    await asyncio.sleep(5)
    assert mesh.served == list(range(60))


async def test_newcomers_wait_behind_the_others_and_not_for_nobody() -> None:
    """Else a busy minute's newcomers would take each place that comes free from those who wait for it."""
    mesh = Mesh()
    mesh.knows(1)
    mesh.answers["n1"] = FULL
    first = mesh.request(1).go()
    await asyncio.sleep(0.01)
    mesh.knows(1)  # it has room again, as its record says
    del mesh.answers["n1"]
    second = mesh.request(2).go()
    assert (mesh.served, mesh.forwarder.waiting(KEY)) == ([], 2)
    await asyncio.sleep(3)
    assert mesh.served == [1, 2]
    mesh.request(3).go()
    assert mesh.served == [1, 2, 3], "nobody waits any more"
    assert first.errors == second.errors == []


async def test_what_was_passed_on_waits_in_no_line() -> None:
    """Its sender has a line of its own, and the room may be anywhere."""
    mesh = Mesh()
    mesh.knows(1)
    mesh.answers["n1"] = FULL
    waiting = mesh.request(1).go()
    await asyncio.sleep(0.01)
    passed_on = mesh.request(2, sender=PeerIdentity(key_of(9), "n9", VERSION)).go()
    assert len(passed_on.errors) == 1
    waiting.end()


async def test_who_was_let_go_and_turned_away_keeps_its_place() -> None:
    """Though others came meanwhile, and the line is full."""
    mesh = Mesh()
    mesh.knows(1)
    mesh.answers["n1"] = refuses("queue_full", after_s=0.3)
    requests = [mesh.request(0, max_queue=2).go()]
    await asyncio.sleep(0.4)
    requests.append(mesh.request(1, max_queue=2).go())
    assert mesh.forwarder.waiting(KEY) == 2
    while mesh.forwarder.waiting(KEY) == 2:  # noqa: ASYNC110  # until one is let go
        await asyncio.sleep(0.01)
    requests.append(mesh.request(2, max_queue=2).go())
    assert mesh.forwarder.waiting(KEY) == 2
    await asyncio.sleep(0.4)
    assert mesh.forwarder.waiting(KEY) == 3
    del mesh.answers["n1"]
    await asyncio.sleep(5)
    assert mesh.served == [0, 1, 2]
    assert [request.errors for request in requests] == [[], [], []]


async def test_a_line_that_is_full_says_so() -> None:
    mesh = Mesh()
    mesh.knows(1)
    mesh.answers["n1"] = FULL
    requests = [mesh.request(number, max_queue=2).go() for number in range(2)]
    await asyncio.sleep(0.01)
    error = mesh.request(2, max_queue=2).go().error
    assert (error.type, error.status, error.retry_after_s) == ("queue_full", 503, 5)
    assert "2 requests already wait" in error.message
    for request in requests:
        request.end()


async def test_each_waits_as_long_as_it_may() -> None:
    mesh = Mesh()
    mesh.knows(1)
    mesh.answers["n1"] = FULL
    start = mesh.loop.time()
    short, long = mesh.request(1, max_wait_s=3.0).go(), mesh.request(2, max_wait_s=20.0).go()
    await asyncio.sleep(30)
    assert 3.0 <= (short.ended_at or 0.0) - start <= 4.0
    assert 20.0 <= (long.ended_at or 0.0) - start <= 21.0
    assert short.error.type == long.error.type == "queue_full"
    assert mesh.forwarder.waiting(KEY) == 0


async def test_the_last_one_that_had_it_leaves() -> None:
    """Nobody may come any more: no reason to wait out the wait."""
    mesh = Mesh()
    mesh.knows(1)
    mesh.answers["n1"] = FULL
    request = mesh.request(max_wait_s=None).go()
    await asyncio.sleep(5)
    mesh.members.clear()
    sync(mesh.peers)
    await asyncio.sleep(1.5)
    assert request.error.type == "queue_full"
    assert not mesh.forwarder.lines or mesh.forwarder.waiting(KEY) == 0


async def test_without_any_hops_nobody_is_waited_for() -> None:
    """max_hops: 0 means that nothing is passed on, so it need not wait for that."""
    mesh = Mesh(max_hops=0)
    mesh.knows(1)
    assert mesh.request().go().error.type == "no_capacity"


async def test_a_single_one_does_not_hammer_a_peer_that_is_not_there() -> None:
    """The circuit may be switched off: the pauses grow all the same."""
    mesh = Mesh(limits=Limits(enabled=False))
    mesh.knows(1)
    mesh.answers["n1"] = fails(after_s=0.001)
    request = mesh.request(max_wait_s=None).go()
    await asyncio.sleep(60)
    assert len(mesh.asked) < 125
    request.end()


async def test_this_node_is_tried_again_as_well() -> None:
    mesh = Mesh()
    mesh.knows(1)
    mesh.here = True
    mesh.answers["n1"] = FULL
    request = mesh.request(max_wait_s=5.0, max_instances=1).go()
    await asyncio.sleep(10)
    assert request.error.message == "full here"
    assert 2 <= len(mesh.asked) <= 6


async def test_a_full_peer_is_passed_over_for_a_moment() -> None:
    """What it said in person holds for the next request too, and not for long (trap 61)."""
    mesh = Mesh()
    mesh.knows(1, decode_tps=9999.0)
    mesh.knows(2)
    mesh.answers["n1"] = FULL
    for step, pause_s in enumerate((0.01, 0.5, FULL_S, 0.01)):
        mesh.request(step).go()
        await asyncio.sleep(pause_s)
    assert [(name, number) for _, name, number in mesh.asked] == [
        ("n1", 0), ("n2", 0), ("n2", 1), ("n2", 2), ("n1", 3), ("n2", 3),
    ]  # fmt: skip


# --- what counts as waiting


async def test_the_time_of_a_dial_is_waiting() -> None:
    """Of 1 s, 0.9 s went to a peer that could not be reached: the next one has 0.1 s."""
    mesh = Mesh()
    mesh.knows(1, decode_tps=9999.0)
    mesh.knows(2)
    mesh.answers["n1"] = fails(after_s=0.9)
    request = mesh.request(max_wait_s=1.0).go()
    await asyncio.sleep(2)
    assert mesh.served == [0]
    assert request.waits == [1.0, pytest.approx(0.1, abs=0.002)]


async def test_dials_do_not_go_on_beyond_the_wait() -> None:
    mesh = Mesh()
    mesh.knows(1)
    mesh.answers["n1"] = fails(after_s=0.8)
    request = mesh.request(max_wait_s=1.0).go()
    start = mesh.loop.time()
    await asyncio.sleep(10)
    assert request.error.type == "no_capacity"
    assert request.ended_at is not None
    assert request.ended_at - start < 2.0
    assert len(mesh.asked) == 2


@pytest.mark.parametrize(
    ("kind", "left_s"),
    [("upstream_error", 10.0), ("processing_failed", 10.0), ("queue_timeout", 4.0), ("queue_full", 4.0)],
)
async def test_the_time_an_instance_worked_on_it_is_not(kind: str, left_s: float) -> None:
    mesh = Mesh()
    mesh.knows(1, decode_tps=9999.0)
    mesh.knows(2)
    mesh.answers["n1"] = refuses(kind, 502, after_s=6.0)
    request = mesh.request(max_wait_s=10.0).go()
    await asyncio.sleep(7)
    assert mesh.served == [0]
    assert request.waits == [10.0, pytest.approx(left_s, abs=0.002)]


async def test_the_time_a_lost_peer_worked_on_it_is_not() -> None:
    mesh = Mesh()
    mesh.knows(1, decode_tps=9999.0)
    mesh.knows(2)
    mesh.answers["n1"] = fails(after_s=60.0, sent=True)
    request = mesh.request(max_wait_s=10.0).go()
    await asyncio.sleep(61)
    assert mesh.served == [0]
    assert request.waits == [10.0, 10.0]


async def test_the_time_in_the_line_is_waiting() -> None:
    mesh = Mesh()
    mesh.knows(1)
    mesh.answers["n1"] = FULL
    request = mesh.request(max_wait_s=30.0).go()
    await asyncio.sleep(20)
    del mesh.answers["n1"]
    await asyncio.sleep(3)
    assert mesh.served == [0]
    assert 30.0 - 23.0 <= request.waits[-1] <= 30.0 - 20.0


# --- refusals


async def test_a_request_that_took_too_long_at_a_peer_is_over() -> None:
    """max_request_duration_ms: the next one would work as long on it, and fail as well."""
    mesh = Mesh()
    mesh.knows(1)
    mesh.knows(2)
    mesh.answers["n1"] = mesh.answers["n2"] = refuses("request_timeout", 502)
    request = mesh.request().go()
    await asyncio.sleep(1)
    assert (request.error.type, request.error.status) == ("request_timeout", 502)
    assert len(mesh.asked) == 1


@pytest.mark.parametrize(("kind", "status"), [("request_timeout", 408), ("request_too_large", 413), ("x", 431)])
async def test_limits_of_a_peer_are_not_everybodys(kind: str, status: int) -> None:
    """And if they are, the client sees what they said. 408 is an upload that was too slow, not a request that was."""
    mesh = Mesh()
    mesh.knows(1, decode_tps=9999.0)
    mesh.knows(2)
    mesh.answers["n1"] = refuses(kind, status)
    mesh.request().go()
    await asyncio.sleep(1)
    assert mesh.served == [0]
    mesh.answers["n2"] = mesh.answers["n1"]
    request = mesh.request().go()
    await asyncio.sleep(1)
    assert (request.error.status, request.error.type) == (status, kind)


# --- a bug


async def test_a_bug_while_choosing_is_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    """In the first round and in a later one, which nobody's call is above of: no request hangs for it."""
    mesh = Mesh()
    mesh.knows(1)
    mesh.knows(2)
    mesh.answers["n1"] = mesh.answers["n2"] = FULL
    waiting = [mesh.request(number).go() for number in range(3)]
    await asyncio.sleep(0.02)
    assert mesh.forwarder.waiting(KEY) == 3
    mesh.bug = True
    await asyncio.sleep(10)
    assert [request.error.status for request in waiting] == [500] * 3
    assert mesh.request().go().error.status == 500
    assert caplog.text.count("a request failed unexpectedly") == 4
    assert not mesh.forwarder.lines
    assert not any(peer.forwards for peer in mesh.peers)


# --- very many


async def test_of_very_many_a_sample_is_compared() -> None:
    """A thousand candidates take tens of milliseconds to rank; 16 warm ones and 16 cold ones do as well."""
    mesh = Mesh()
    for number in range(100):
        mesh.knows(number, ready=number % 2, busy=4 if number < 50 else 0)
    mesh.request().go()
    (compared,) = mesh.compared
    assert len(compared) == len(set(compared)) == 32
    assert sum(int(name[1:]) % 2 for name in compared) == 16
    for _ in range(30):
        mesh.request().go()
    assert len({name for names in mesh.compared for name in names}) > 90, "not the same ones for ever"
    assert len({name for _, name, _ in mesh.asked}) > 1


async def test_a_sample_leaves_out_who_cannot_be_asked() -> None:
    """Or a mesh of which nearly all are full would look full."""
    mesh = Mesh()
    for number in range(100):
        mesh.knows(number)
    for number in range(99):
        mesh.peer(number).corrected(KEY, "queue_full", mesh.peer(number).stamp)
    mesh.request().go()
    assert [name for _, name, _ in mesh.asked] == ["n99"]


async def test_few_are_all_compared() -> None:
    mesh = Mesh()
    for number in range(32):
        mesh.knows(number, ready=1 if number < 20 else 0)
    mesh.request().go()
    assert len(mesh.compared[0]) == 32
