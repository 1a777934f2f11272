"""Nodes that meet, tell each other what changes, and part; each is whole but for its processes. On both loops."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop

import mesh.member
from mesh.config.profile import Profile
from mesh.config.settings import ModelDefaults, Settings
from mesh.core.gossip_record import MAX_PAYLOAD_BYTES
from mesh.core.lifecycle import State
from mesh.core.node_state import PeerIdentity
from mesh.engine.memory_report import ModelFit
from mesh.errors import ConfigError, PeerError, PeerRefusalError, RequestError, UnknownModelError
from mesh.files import locked as held
from mesh.net import known_peers
from mesh.net.discovery import Discovery
from mesh.net.keys import key_text
from tests.api.node import SLASHED, SMOL
from tests.fakes_supervisor import FakeInstance
from tests.members import key_of, profile
from tests.net.outreach_members import AN_HOUR_S, MemberNode, Nodes, know_each_other, nodes_in, timers, until

TOKEN = "a token for tests"
TODAY = "2026-11-27"
SOON_S = 0.05  #: between two ticks, where they matter


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def _asyncio_loop_factory(request: pytest.FixtureRequest) -> Any:
    """pytest-asyncio's own fixture: its hook belongs into a conftest."""
    return request.param


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at everything more often, so that nobody waits; and have a token, and no key."""
    for name, seconds in (("LOOK_EVERY_S", 0.01), ("LOAD_NEWS_EVERY_S", 0.02), ("TRUST_EVERY_S", 0.05)):
        monkeypatch.setattr(mesh.member, name, seconds)
    monkeypatch.setenv("CLUSTER_TOKEN", TOKEN)
    monkeypatch.delenv("NODE_PRIVATE_KEY", raising=False)


@pytest.fixture
async def nodes(tmp_path: Path, _asyncio_loop_factory: Any) -> AsyncIterator[Nodes]:
    loop = type(asyncio.get_running_loop()).__module__
    assert ("uvloop" in loop) == (_asyncio_loop_factory is uvloop.new_event_loop), "the loop that was asked for"
    async with nodes_in(tmp_path) as made:
        yield made


def told(caplog: pytest.LogCaptureFixture, text: str) -> list[dict[str, Any]]:
    """Return the fields of each line that has *text* in it."""
    return [getattr(record, "fields", {}) for record in caplog.records if text in record.getMessage()]


def open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def ready(node: MemberNode, other: MemberNode, key: str = SMOL.key) -> int:
    """Return how many instances *other* has, as *node* knows it."""
    return node.sees(other).profiles[key].ready


# --- meeting


async def test_three_nodes_meet_and_know_what_each_has(nodes: Nodes) -> None:
    a, b, c = await nodes.met("a", "b", "c", profiles={"a": [SMOL], "b": [SLASHED], "c": [SMOL, SLASHED]})
    for one in (a, b, c):
        assert one.ctx.mesh is one.member
        for other in {a, b, c} - {one}:
            peer = one.sees(other)
            assert (peer.node_id, peer.status, peer.rejected) == (other.name, "alive", None)
            assert (peer.state.addresses, peer.state.engine_version) == ((other.address,), "b123")
            assert list(peer.profiles) == [p.key for p in other.profiles]
            assert {p.fit for p in peer.profiles.values()} == {"now"}
    smol = b.member.peers.profile("GPT-4o")
    assert smol is not None
    assert (smol.key, smol.max_instances) == (SMOL.key, 0)
    assert [p.node_id for p in b.member.peers.holders(SMOL.key)] == ["a", "c"]
    assert b.known_peers.read_text().count("trusted") == 2


async def test_who_knows_one_gets_to_know_all(nodes: Nodes) -> None:
    a = await nodes.started("a")
    b = await nodes.started("b", peers=[a])
    c = await nodes.started("c", peers=[b])
    await until(lambda: know_each_other(a, b, c))


async def test_another_token(nodes: Nodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    a = await nodes.started("a")
    monkeypatch.setenv("CLUSTER_TOKEN", "quite another token")
    b = await nodes.started("b", peers=[a])
    await until(lambda: told(caplog, "contact cannot be reached"))
    assert "cluster tokens differ" in told(caplog, "contact cannot be reached")[0]["error"]
    assert not len(a.member.peers) + len(b.member.peers)


async def test_a_name_that_leads_back_here_is_tried_once(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    """All nodes may have the same ``cluster.peers``. A node does not become its own peer."""
    caplog.set_level("INFO", "mesh")
    a = await nodes.listening("a")
    a.make(f"localhost:{a.listener.port}", interval_s=SOON_S)
    await a.start()
    await until(lambda: told(caplog, "a contact is not another node"))
    b = await nodes.started("b", peers=[a], interval_s=SOON_S)
    await until(lambda: know_each_other(a, b))
    assert not told(caplog, "contact cannot be reached")
    assert len(told(caplog, "a contact is not another node")) == 1


# --- what changes


async def test_a_model_that_got_ready_is_known_at_once(nodes: Nodes) -> None:
    a, b, c = await nodes.met("a", "b", "c")
    b.supervisor.views = [FakeInstance("i", SMOL.key, SMOL.id, state=State.SPAWNING)]
    await until(lambda: all(node.sees(b).profiles[SMOL.key].loading for node in (a, c)))
    b.supervisor.views = [FakeInstance("i", SMOL.key, SMOL.id)]
    await until(lambda: all(ready(node, b) for node in (a, c)))
    assert a.sees(b).profiles[SMOL.key].load_s == 10.0  # as the instance's times have it
    b.supervisor.views = []
    await until(lambda: not any(ready(node, b) for node in (a, c)))


async def test_who_is_full_and_who_is_not_is_known_at_once(nodes: Nodes) -> None:
    a, b = await nodes.met("a", "b")

    def load() -> tuple[int, int]:
        smol = a.sees(b).profiles[SMOL.key]
        return smol.busy, smol.queued

    for expected in ((4, 0), (4, 3), (1, 0)):
        busy, queued = expected
        b.supervisor.views = [FakeInstance("i", SMOL.key, SMOL.id, busy=busy)]
        b.supervisor.waiting = {SMOL.key: queued} if queued else {}
        await until(partial(lambda wanted: load() == wanted, expected))


async def test_what_changes_while_it_looks_is_urgent_too(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at the models takes its time. News of that moment must not wait for the next tick."""
    monkeypatch.setattr(mesh.member, "LOOK_EVERY_S", AN_HOUR_S)
    a, b = await nodes.met("a", "b")
    looked = b.supervisor.model_fits

    async def look() -> Sequence[ModelFit]:
        b.supervisor.views = [FakeInstance("i", SMOL.key, SMOL.id)]
        return await looked()

    b.supervisor.model_fits = look  # type: ignore[method-assign]
    b.member._look_at = 0.0  # it is time for a look, and there is no news
    await b.member._announce()
    await until(lambda: ready(a, b))


async def test_another_address_is_urgent_news(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh.member, "LOOK_EVERY_S", AN_HOUR_S)
    a, b = await nodes.met("a", "b")
    found = (b.address, "192.0.2.7:8080")
    monkeypatch.setattr(mesh.member, "own_addresses", lambda *_: found)
    b.member._look_at = 0.0
    await b.member._announce()
    await until(lambda: a.sees(b).state.addresses == found)


async def test_load_news_that_came_too_soon_is_told_later(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if what is not urgent was told in between."""
    a, b = await nodes.met("a", "b")
    b.supervisor.views = [FakeInstance("i", SMOL.key, SMOL.id)]
    await until(lambda: ready(a, b))
    monkeypatch.setattr(mesh.member, "LOAD_NEWS_EVERY_S", AN_HOUR_S)
    b.supervisor.views = [FakeInstance("i", SMOL.key, SMOL.id, busy=4)]
    b.member._look_at = 0.0
    await until(lambda: b.member._look_at)
    assert a.sees(b).profiles[SMOL.key].busy == 0
    monkeypatch.setattr(mesh.member, "LOAD_NEWS_EVERY_S", 0.0)
    await until(lambda: a.sees(b).profiles[SMOL.key].busy == 4)


async def test_the_rest_comes_with_a_tick(nodes: Nodes) -> None:
    a, b = await nodes.met("a", "b", interval_s=SOON_S)
    b.ctx.metrics.current_requests = 7
    await until(lambda: a.sees(b).state.current_requests == 7)


async def test_drain_and_undrain(nodes: Nodes) -> None:
    """From another node, over a link; all learn of it at once."""
    a, b, c = await nodes.met("a", "b", "c")
    answer = await a.member.call("b", "/admin/drain", {}, timeout_s=10)
    assert (answer["status"], answer["drained"], b.ctx.drained) == ("ok", True, True)
    await until(lambda: a.sees(b).draining and c.sees(b).draining)
    await a.member.call("b", "/admin/undrain", {}, timeout_s=10)
    await until(lambda: not (a.sees(b).draining or c.sees(b).draining))
    assert not b.ctx.drained


async def test_a_node_that_stops_says_so_before_it_has_stopped(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh.member, "LOOK_EVERY_S", AN_HOUR_S)
    a, b = await nodes.met("a", "b")
    b.begin_drain()
    await until(lambda: a.sees(b).draining)
    assert a.sees(b).alive


async def test_the_goodbye_of_discovery_is_not_cut_short(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that has nothing to finish has stopped sooner than mDNS has told everybody."""
    may_end, ended = asyncio.Event(), asyncio.Event()

    class Slow(Discovery):
        async def close(self) -> None:
            await may_end.wait()
            await super().close()
            ended.set()

    monkeypatch.setattr(mesh.member, "Discovery", Slow)
    a = await nodes.started("a")
    stopping = asyncio.get_running_loop().create_task(a.stop())
    await until(lambda: a.member._gossip._core.has_left)
    may_end.set()
    await stopping
    assert ended.is_set()


# --- asking


async def test_explain_counts_in_the_others(nodes: Nodes) -> None:
    only_b = Profile(key="large:default", id="large", model="large", profile="default", args=(), args_hash="c3")
    a, b = await nodes.met("a", "b", profiles={"a": [SMOL], "b": [SMOL, only_b]})
    profile, ranked = a.member.explain("TINY", prompt_tokens=1000, max_tokens=None)
    assert (profile, len(ranked)) == (SMOL, 2)
    assert {(entry.candidate.node_id, entry.candidate.local) for entry in ranked} == {("a", True), ("b", False)}
    profile, ranked = a.member.explain("Large", prompt_tokens=10, max_tokens=5)
    assert (profile.key, profile.max_instances) == (only_b.key, 0)
    assert [(entry.candidate.node_id, entry.excluded) for entry in ranked] == [("b", None)]
    b.ctx.drained = True
    await until(lambda: a.sees(b).draining)
    (entry,) = a.member.explain("large", prompt_tokens=10, max_tokens=5)[1]
    assert entry.excluded is not None
    with pytest.raises(UnknownModelError):
        a.member.explain("unheard of", prompt_tokens=1, max_tokens=None)
    with pytest.raises(RequestError, match="default_model"):
        a.member.explain(None, prompt_tokens=1, max_tokens=None)


async def test_a_call_that_another_node_refuses(nodes: Nodes) -> None:
    a, b = await nodes.met("a", "b")
    with pytest.raises(PeerRefusalError, match="node b: Model not found") as caught:
        await a.member.call("b", "/admin/prewarm", {"model": "unheard of"}, timeout_s=10)
    assert (caught.value.status, caught.value.type) == (404, "model_not_found")
    with pytest.raises(PeerRefusalError, match="not a route for other nodes") as caught:
        await a.member.call("b", "/admin/instances", {}, timeout_s=10)
    assert caught.value.status == 403
    b.ctx.draining = True
    with pytest.raises(PeerRefusalError, match="draining") as caught:
        await a.member.call("b", "/admin/prewarm", {"model": "smol"}, timeout_s=10)
    assert (caught.value.status, caught.value.retry_after_s) == (503, 5)


async def test_a_call_to_nobody(nodes: Nodes) -> None:
    a, b = await nodes.met("a", "b")
    with pytest.raises(RequestError, match="there is no node 'x'; there are: a, b") as caught:
        await a.member.call("x", "/admin/drain", {}, timeout_s=10)
    assert caught.value.param == "node"
    await b.kill()
    with pytest.raises(PeerError, match="cannot be reached"):
        await a.member.call("b", "/admin/drain", {}, timeout_s=10)


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", b"{}", b"\x81\xa1v\x63", b"\x00" * 300_000],
    ids=["none", "no_msgpack", "text", "no_version", "too_long"],
)
async def test_gossip_that_is_malformed(nodes: Nodes, body: bytes) -> None:
    a, b = await nodes.met("a", "b")
    with pytest.raises(RequestError) as caught:
        a.member.gossip(PeerIdentity(b.key, "b"), body)
    assert caught.value.status == 400
    answer = await b.member._client.request(a.address, "POST", "/cluster/gossip", body)
    assert answer.status in (400, 413)
    assert know_each_other(a, b)


# --- parting


async def test_a_goodbye_is_forgotten_at_once(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mesh")
    a, b, c = await nodes.met("a", "b", "c")
    await b.stop()
    await until(lambda: a.peer(b) is None and c.peer(b) is None)
    await until(lambda: not a.links_with(b) + c.links_with(b))
    assert know_each_other(a, c)
    assert [fields["node"] for fields in told(caplog, "node left")] == ["b", "b"]
    assert not told(caplog, "node is gone")
    assert a.member.peers.profile("smol") is not None  # 503 for a while, not 404 (trap 62)


async def test_a_crash_is_found_out_and_a_restart_too(nodes: Nodes) -> None:
    a, b, c = await nodes.met("a", "b", "c", interval_s=SOON_S)
    await b.kill()
    await until(lambda: not (a.sees(b).alive or c.sees(b).alive))
    again = await nodes.started("b", peers=[a], interval_s=SOON_S)
    assert again.key == b.key
    await until(lambda: know_each_other(a, again, c))
    assert a.sees(again).state.addresses == (again.address,)


async def test_a_live_link_is_a_sign_of_life(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    """trap 55: a node that has no time for gossip, and answers, is not gone."""
    a = await nodes.started("a", interval_s=SOON_S)
    b = await nodes.started("b", peers=[a])
    await until(lambda: know_each_other(a, b))
    b.ctx.mesh = None  # gossip gets 400 there
    refused = b.node.access_log.lines
    await until(lambda: len(refused) >= 40)
    assert not told(caplog, "node is gone")
    assert a.sees(b).alive


async def test_whom_it_met_is_written_down_before_it_ends(nodes: Nodes) -> None:
    """Even if the disk, or somebody who edits the file, lets it wait."""
    a = await nodes.started("a")
    b = await nodes.listening("b")
    with held(a.known_peers):
        b.make(a.address)
        await b.start()
        await until(lambda: know_each_other(a, b))
        stopping = asyncio.get_running_loop().create_task(a.stop())
        await until(lambda: a.member._links.closed and not a.member._links.links)
        assert not a.known_peers.exists()
    await stopping
    assert key_text(b.key) in a.known_peers.read_text()


async def test_two_nodes_of_one_name_refuse_each_other_and_say_why(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    """Two boxes that were set up alike: neither could be told from the other, and requests would go anywhere."""
    a = await nodes.started("ubuntu")
    b = await nodes.started("ubuntu", peers=[a], directory="other", interval_s=SOON_S)
    why = "this node is called 'ubuntu', too: give one of them another node_id"
    await until(lambda: any(why in str(getattr(record, "fields", "")) for record in caplog.records))
    assert not a.known_peers.exists()
    assert not b.known_peers.exists()


async def test_a_revoked_key_is_cut_off_and_forgotten(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    a, b, c = await nodes.met("a", "b", "c", interval_s=SOON_S)
    await until(lambda: a.links_with(b))
    known_peers.update(a.known_peers, partial(known_peers.revoke, key=b.key, today=TODAY))
    await until(lambda: a.peer(b) is None and not a.links_with(b))
    assert told(caplog, "a key is not trusted any more")
    c.ctx.drained = True  # what c tells from now on does not bring it back, though c knows it
    await until(lambda: a.sees(c).draining)
    assert a.peer(b) is None
    assert c.sees(b).alive
    with pytest.raises(PeerError, match="refused this node"):
        await b.member.call("a", "/admin/drain", {}, timeout_s=10)
    assert not a.ctx.drained
    assert a.member.peers.named("b") is None


async def test_twenty_lives_leave_nothing(nodes: Nodes) -> None:
    """trap 63: of a node that comes and goes, neither here nor on those who stay."""
    a = await nodes.started("a", interval_s=SOON_S)

    async def live() -> None:
        b = await nodes.started("b", peers=[a], interval_s=SOON_S)
        await until(lambda: know_each_other(a, b))
        b.supervisor.views = [FakeInstance("i", SMOL.key, SMOL.id)]
        await until(lambda: ready(a, b))
        await b.stop()
        await until(lambda: a.peer(b) is None and not a.links_with(b))
        nodes.made.remove(b)

    async def rest() -> tuple[int, int]:
        await until(lambda: not a.member._gossip._tasks)
        return open_descriptors(), len(asyncio.all_tasks())

    for _ in range(3):
        await live()
    before = await rest()
    for _ in range(20):
        await live()
    await until(lambda: (open_descriptors(), len(asyncio.all_tasks())) == before)
    await a.stop()
    await until(lambda: not timers())


async def test_closing_what_was_never_started(nodes: Nodes) -> None:
    a = await nodes.listening("a")
    a.make()
    await a.member.close()
    await a.member.close()


# --- starting in vain


def open_to_all(directory: Path) -> None:
    (directory / "node.key").write_text("ed25519-seed:" + "A" * 43 + "=\n")
    (directory / "node.key").chmod(0o644)


def no_key(directory: Path) -> None:
    (directory / "node.key").write_text("something else\n")
    (directory / "node.key").chmod(0o600)


def no_peers(directory: Path) -> None:
    (directory / "known_peers").write_text("b no-key\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(open_to_all, "node.key"), (no_key, "is not a private key"), (no_peers, "known_peers:1")],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_files_that_cannot_be_used(nodes: Nodes, spoil: Callable[[Path], None], message: str) -> None:
    a = await nodes.listening("a")
    a.directory.mkdir(mode=0o700)
    spoil(a.directory)
    await cannot_start(a, message)


async def test_allowed_keys_that_are_none(nodes: Nodes) -> None:
    a = await nodes.listening("a")
    await cannot_start(a, r"cluster\.noise\.allowed_keys\[1\]", noise={"allowed_keys": [key_text(key_of(1)), "x"]})


async def test_no_token(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to do, and leaves no file either."""
    monkeypatch.delenv("CLUSTER_TOKEN")
    a = await nodes.listening("a")
    await cannot_start(a, "'llama-mesh token new'.*'llama-mesh join HOST --token -'.*CLUSTER_TOKEN")
    assert not a.directory.exists()
    monkeypatch.setenv("CLUSTER_TOKEN", "short")
    await cannot_start(a, "at least 16")


async def test_a_token_in_its_file(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    a = await nodes.started("a")
    monkeypatch.delenv("CLUSTER_TOKEN")
    b = await nodes.listening("b")
    b.directory.mkdir(mode=0o700)
    (b.directory / "cluster.token").write_text(f"{TOKEN}\n")
    (b.directory / "cluster.token").chmod(0o600)
    b.make(a.address)
    await b.start()
    await until(lambda: know_each_other(a, b))


async def cannot_start(node: MemberNode, message: str, **options: Any) -> None:
    before = open_descriptors(), asyncio.all_tasks(), timers()
    with pytest.raises(ConfigError, match=message):
        node.make(**options)
    assert (open_descriptors(), asyncio.all_tasks(), timers()) == before


# --- what is too much, and what is too many


async def test_a_cookbook_that_is_too_long_is_told_in_part(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    many = [
        Profile(key=f"m{i}:default", id=f"m{i}", model=f"m{i}", profile="default", args=(), description="\u00e4" * 300)
        for i in range(3000)
    ]
    a, b = await nodes.met("a", "b", profiles={"a": many, "b": [SMOL]})
    heard = b.sees(a).profiles
    assert list(heard) == [profile.key for profile in many[: len(heard)]]
    assert len(a.member._payload()) <= MAX_PAYLOAD_BYTES
    assert 100 < len(heard) < 200  # there is no room for one more of these
    (fields,) = told(caplog, "the cookbook is too long")
    assert fields["models"] == 3000
    assert abs(fields["untold"] - (3000 - len(heard))) < 10  # of its first record, which had fewer figures
    a.supervisor.views = [FakeInstance("i", many[0].key, many[0].id)]
    await until(lambda: ready(b, a, many[0].key))
    b.ctx.drained = True
    await until(lambda: a.sees(b).draining)
    assert len(told(caplog, "the cookbook is too long")) == 1
    assert a.member.explain("m2999", prompt_tokens=1, max_tokens=1)[0] is many[2999]  # which a itself has


async def test_a_copied_key_is_reported_once(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    """By each of the two; they learn of it from a third. Neither gives way, and the third node is not harmed."""
    c = await nodes.started("c", interval_s=SOON_S)
    a = await nodes.started("a", peers=[c], interval_s=SOON_S)
    await until(lambda: know_each_other(a, c))
    copy = await nodes.started("copy", peers=[c], interval_s=SOON_S, directory="a")
    assert copy.key == a.key
    await until(lambda: {fields["node"] for fields in told(caplog, "another process uses")} == {"a", "copy"})
    age = c.sees(a).stamp[0]
    await until(lambda: c.sees(a).stamp[0] >= age + 8)  # they go on and on
    assert len(told(caplog, "another process uses")) == 2
    assert c.sees(a).alive
    assert not told(caplog, "background task")


@pytest.mark.parametrize(("kind", "wait_s"), [("text", 60.0), ("audio", 600.0)])
def test_what_only_others_have_is_waited_for_as_long_as_there(kind: str, wait_s: float) -> None:
    stand_in = mesh.member._stand_in(Settings())
    assert stand_in(profile(kind=kind)).max_wait_s == wait_s
    chosen = mesh.member._stand_in(Settings(model_defaults=ModelDefaults(max_wait_in_queue_ms=5)))
    assert chosen(profile(kind=kind)).max_wait_s == 0.005
