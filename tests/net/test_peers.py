"""What is known of the others: records and what corrects them, own forwards, names, and who cannot be asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.breaker import Limits, Phase
from mesh.core.node_state import ProfileState
from mesh.net.peer import Peer
from mesh.net.peers import REMEMBERED_S, Peers
from tests.members import Clock, Member, key_of, made_peers, member, profile, state, sync

QWEN = "qwen:default"


@pytest.fixture
def now() -> Clock:
    return Clock()


def only(peers: Peers) -> Peer:
    (peer,) = peers
    return peer


# --- records


def test_a_record_is_read_once(now: Clock) -> None:
    peer = Peer(key_of(1), Limits(), now)
    first = member(1, profile(ready=1))
    assert peer.update(first)
    assert (peer.node_id, peer.status, peer.alive, peer.has(QWEN)) == ("n1", "alive", True, True)
    assert not peer.update(replace(first, status="suspect", payload=b"not even read"))
    assert (peer.status, peer.alive) == ("suspect", True)
    assert peer.update(first.later(state("n1"), status="dead"))
    assert (peer.alive, peer.has(QWEN)) == (False, False)
    assert peer.update(replace(first, incarnation=2, version=0))  # after a restart it counts from the beginning
    assert peer.has(QWEN)


def test_age_is_that_of_the_record(now: Clock) -> None:
    peers = made_peers(now, member(1))
    now.time += 7
    assert only(peers).age_s == 7
    now.time -= 100
    assert only(peers).age_s == 0


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x81\xa7node_id\xa0", b"\x80"])
def test_a_record_that_cannot_be_read_hides_nobody_else(
    now: Clock, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Its last good one stays; the log tells of each bad one once, though they are all looked at with every change."""
    good, bad = member(1, profile()), replace(member(2), payload=payload)
    peers = made_peers(now, bad, good)
    assert [peer.node_id for peer in peers] == ["n1"]
    for _ in range(3):
        sync(peers, bad, good)
    assert caplog.text.count("a record cannot be read") == 1
    sync(peers, bad.later(), good.later(payload=payload, status="suspect"))
    assert caplog.text.count("a record cannot be read") == 3
    assert (only(peers).status, only(peers).has(QWEN)) == ("suspect", True)
    sync(peers, bad.later(state("n2")), good)
    assert [peer.node_id for peer in peers] == ["n1", "n2"]


def test_who_is_no_member_any_more_is_told_of(now: Clock) -> None:
    """trap 63: whoever holds links or endpoints of it lets them go."""
    peers = made_peers(now, member(1), member(2))
    gone: list[str] = []
    peers.on_gone = lambda peer: gone.append(peer.node_id)
    epoch = peers.epoch
    sync(peers, member(2))
    assert (gone, len(peers), peers.get(key_of(1))) == (["n1"], 1, None)
    assert peers.epoch > epoch


def test_many_that_come_and_go_leave_nothing(now: Clock) -> None:
    """trap 63"""
    peers = made_peers(now)
    for number in range(200):
        sync(peers, member(number, profile(f"m{number}:default")))
        assert peers.profile(f"m{number}") is not None
        now.time += REMEMBERED_S / 4
    sync(peers)
    now.time += REMEMBERED_S
    assert peers.profile("m199") is None
    sizes = {name: len(value) for name, value in vars(peers).items() if hasattr(value, "__len__")}
    assert max(sizes.values()) <= 50, sizes


# --- order and names


def test_the_order_is_that_of_the_names(now: Clock) -> None:
    """trap 80"""
    members = [member(3, node_id="b"), member(1, node_id="c"), member(2, node_id="a"), member(4, node_id="a")]
    for order in (members, members[::-1]):
        peers = made_peers(now, *order)
        assert [(peer.node_id, peer.key[0]) for peer in peers] == [("a", 2), ("a", 4), ("b", 3), ("c", 1)]


def test_of_two_with_one_name_the_live_one_is_meant(now: Clock) -> None:
    old, new = member(1, node_id="n", status="dead"), member(2, node_id="n")
    for order in ((old, new), (new, old)):
        peers = made_peers(now, *order)
        named = peers.named("n")
        assert named is not None
        assert named.key == key_of(2)
        assert peers.by_name() == {"n": named}
    peers = made_peers(now, old)
    assert peers.named("n") is only(peers)
    assert peers.named("m") is None


# --- own forwards


def test_own_forwards_count_from_the_decision_to_the_end(now: Clock) -> None:
    """trap 50"""
    peers = made_peers(now, member(1, profile(ready=1, slots=4, busy=2)))
    peer = only(peers)
    permits = [peer.begin(QWEN) for _ in range(3)]
    assert (peer.candidate(QWEN).own_now, peer.candidate(QWEN).own_then, peer.forwards_total) == (3, 0, 3)
    assert peer.candidate("other:default").own_now == 0
    peer.end(QWEN, permits[0])
    assert peer.candidate(QWEN).own_now == 2
    for permit in permits[1:]:
        peer.end(QWEN, permit)
    assert peer.candidate(QWEN).own_now == 0
    assert not peer.forwards
    assert peer.forwards_total == 3


def test_a_record_includes_what_was_in_flight_when_it_came(now: Clock) -> None:
    """What ended since is in its figures still, and must not be counted as the work of others."""
    first = member(1, profile(ready=1, slots=4))
    peers = made_peers(now, first)
    peer = only(peers)
    permit = peer.begin(QWEN)
    second = first.later(state("n1", profile(ready=1, slots=4, busy=1)))
    sync(peers, second)
    assert (peer.candidate(QWEN).own_now, peer.candidate(QWEN).own_then, peer.candidate(QWEN).reported) == (1, 1, 0)
    peer.end(QWEN, permit)
    assert (peer.candidate(QWEN).own_now, peer.candidate(QWEN).own_then) == (0, 1)
    sync(peers, second)  # nothing new: the accounting stays
    assert peer.candidate(QWEN).own_then == 1
    sync(peers, second.later(state("n1", profile(ready=1, slots=4, busy=1))))
    assert (peer.candidate(QWEN).own_then, peer.candidate(QWEN).reported) == (0, 1)


def test_since_when_a_load_is_under_way(now: Clock) -> None:
    """Since the request that made it necessary, or the first record that told of it; not since the last one."""
    first = member(1, profile())
    peers = made_peers(now, first)
    peer = only(peers)
    assert peer.candidate(QWEN).loading_for_s is None
    peer.begin(QWEN)
    now.time += 3
    assert peer.candidate(QWEN).loading_for_s == 3
    peer.begin(QWEN)
    second = first.later(state("n1", profile(loading=1)))
    sync(peers, second)
    now.time += 2
    sync(peers, second.later(state("n1", profile(loading=1))))
    assert peer.candidate(QWEN).loading_for_s == 5
    sync(peers, second.later(state("n1", profile(ready=1)), version=9))
    assert peer.candidate(QWEN).loading_for_s is None
    peer.begin(QWEN)
    assert peer.candidate(QWEN).loading_for_s is None


# --- the circuit breaker

TRIPPY = Limits(failure_threshold=2, success_threshold=1, open_base_s=5.0)


def test_failures_open_the_circuit_and_a_probe_closes_it(now: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """traps 52, 53"""
    caplog.set_level("INFO")
    peers = made_peers(now, member(1, profile(ready=1)), limits=TRIPPY)
    peer = only(peers)
    for _ in range(2):
        permit = peer.begin(QWEN)
        peer.failed(permit)
        peer.end(QWEN, permit)
    assert (peer.gauge().circuit, peer.candidate(QWEN).circuit_s, peer.failures_total) == ("open", 5.0, 2)
    assert peer.in_the_way(QWEN) == "not reachable, tried again in 5 s"
    assert peer.begin(QWEN) is None
    peer.succeeded(None)  # a late answer moves nothing
    peer.end(QWEN, None)
    now.time += 5
    assert peer.in_the_way(QWEN) is None
    probe = peer.begin(QWEN)
    peer.succeeded(probe)
    peer.end(QWEN, probe)
    assert peer.breaker.phase is Phase.CLOSED
    assert not peer.forwards
    assert caplog.text.count("circuit breaker") == 2


def test_a_probe_whose_client_left_makes_way_for_the_next(now: Clock) -> None:
    """trap 53: nothing was learned; else nobody could ask again for two minutes."""
    peers = made_peers(now, member(1, profile(ready=1)), limits=TRIPPY)
    peer = only(peers)
    for _ in range(2):
        peer.failed(peer.begin(QWEN))
    now.time += 5
    probe = peer.begin(QWEN)
    assert probe is not None
    now.time += 2
    assert peer.begin(QWEN) is None
    peer.end(QWEN, probe)
    assert peer.begin(QWEN) is not None


def test_a_failed_probe_of_gossip_is_no_failed_forward(now: Clock) -> None:
    peers = made_peers(now, member(1))
    peer = only(peers)
    peer.failed(peer.breaker.allows(now()), counts=False)
    assert (peer.failures_total, peer.forwards_total) == (0, 0)


def test_round_trips_are_a_moving_mean(now: Clock) -> None:
    peer = only(made_peers(now, member(1)))
    assert peer.candidate(QWEN).rtt_s is None
    peer.measured(0.1)
    assert peer.rtt_s == 0.1
    peer.measured(0.5)
    assert peer.rtt_s == pytest.approx(0.2)


def test_the_address_that_worked_comes_first(now: Clock) -> None:
    peer = only(made_peers(now, member(1, addresses=("a:1", "b:2"))))
    assert peer.addresses() == ("a:1", "b:2")
    peer.good_address = "b:2"
    assert peer.addresses() == ("b:2", "a:1")
    peer.good_address = "found:3"
    assert peer.addresses() == ("found:3", "a:1", "b:2")


# --- versions


def test_a_node_of_a_rejected_version_is_known_and_not_asked(now: Clock) -> None:
    """Its models still exist: they are 503, not 404 (trap 62)."""
    peers = made_peers(now, member(1, profile(), version="0.6.0"), action="reject_major")
    peer = only(peers)
    assert "its version 0.6.0 is rejected" in (peer.candidate(QWEN).rejected or "")
    assert peers.profile("qwen") is not None
    assert not peers.may_come(QWEN, set())
    sync(peers, member(1).later(state("n1", profile())))  # it was upgraded
    assert peer.rejected is None
    assert peers.may_come(QWEN, set())


# --- who has what


def test_holders_are_alive(now: Clock) -> None:
    peers = made_peers(now, member(2, profile()), member(1, profile()), member(3, profile(), status="dead"), member(4))
    assert [peer.node_id for peer in peers.holders(QWEN)] == ["n1", "n2"]
    assert peers.holders(QWEN) is peers.holders(QWEN)
    for number in range(5000):
        assert peers.holders(f"asked-{number}:default") == ()
    assert len(peers._holders) == 1, "anybody may ask for anything"
    sync(peers, member(1, profile()))
    assert [peer.node_id for peer in peers.holders(QWEN)] == ["n1"]


def test_only_news_of_names_make_the_indices_new(now: Clock) -> None:
    """At a thousand nodes somebody gets busy or idle all the time; what was found stays found."""
    peers = made_peers(now, member(1, profile()), member(2, profile()))
    epoch, found = peers.epoch, peers.holders(QWEN)
    sync(peers, member(1, profile()), member(2, profile()))
    sync(peers, member(1).later(state("n1", profile(busy=3))), member(2, profile()))
    assert (peers.epoch, peers.holders(QWEN)) == (epoch, found)
    assert peers.holders(QWEN)[0].profiles[QWEN].busy == 3
    busy = member(1).later(state("n1", profile(busy=3)))
    for news in (
        [busy, member(2, profile(), status="dead")],
        [busy, member(2, profile())],
        [busy, member(2, profile()), member(3)],
        [busy, member(2, profile())],
        [busy.later(state("n1", profile(), profile("phi:default"))), member(2, profile())],
    ):
        sync(peers, *news)
        assert peers.epoch > epoch, news
        epoch = peers.epoch


def test_what_is_gone_is_forgotten_without_any_news(now: Clock) -> None:
    """trap 62: for ten minutes it is 503, then 404; in a quiet mesh nothing else happens meanwhile."""
    peers = made_peers(now, member(1, profile()))
    sync(peers)
    assert peers.profile("qwen") is not None
    epoch = peers.epoch
    now.time += REMEMBERED_S - 1
    assert peers.epoch == epoch
    now.time += 1
    assert peers.epoch > epoch, "else whoever remembers what was found goes on saying 503"
    assert peers.epoch == peers.epoch
    assert peers.profile("qwen") is None
    assert len(peers._models) == 0


def test_what_is_gone_is_remembered_from_its_last_end(now: Clock) -> None:
    peers = made_peers(now, member(1, profile()), member(2, profile()))
    sync(peers, member(2, profile()))
    now.time += REMEMBERED_S / 2
    sync(peers)
    now.time += REMEMBERED_S - 1
    assert peers.profile("qwen") is not None
    sync(peers, member(3, profile()))
    now.time += REMEMBERED_S
    assert peers.profile("qwen") is not None, "somebody has it again"


def test_one_change_touches_one_node(now: Clock) -> None:
    """At a thousand nodes there is one every few milliseconds."""
    peers = made_peers(now, member(1, profile(), profile("phi:default")), member(2, profile()), member(3))
    others = peers.holders("phi:default")
    gone: list[str] = []
    peers.on_gone = lambda peer: gone.append(peer.node_id)
    peers.changed(key_of(2), replace(member(2, profile()), status="dead"))
    assert [peer.node_id for peer in peers.holders(QWEN)] == ["n1"]
    assert peers.who_has(QWEN) == ["n1 (has no room)", "n2 (gone)"]
    peers.changed(key_of(3), member(3).later(state("n3", profile())))
    peers.changed(key_of(4), member(4, profile(), node_id="a"))
    assert [peer.node_id for peer in peers.holders(QWEN)] == ["a", "n1", "n3"]
    assert [peer.node_id for peer in peers] == ["a", "n1", "n2", "n3"]
    assert peers.holders("phi:default") is others
    peers.changed(key_of(2), None)
    peers.changed(key_of(3), replace(member(3), status="left"))
    for key in (key_of(2), key_of(9)):
        peers.changed(key, None)
    assert gone == ["n2", "n3"]
    assert [peer.node_id for peer in peers.holders(QWEN)] == ["a", "n1"]


def test_a_node_that_changes_its_name_changes_its_place(now: Clock) -> None:
    peers = made_peers(now, member(1, profile()), member(2, profile()))
    peers.changed(key_of(1), member(1).later(state("z", profile())))
    assert [peer.node_id for peer in peers] == ["n2", "z"]
    assert [peer.node_id for peer in peers.holders(QWEN)] == ["n2", "z"]


def test_a_node_that_dies_with_a_record_that_cannot_be_read(now: Clock) -> None:
    peers = made_peers(now, member(1, profile()))
    assert peers.holders(QWEN)
    peers.changed(key_of(1), replace(member(1).later(), payload=b"\xc1", status="dead"))
    assert peers.holders(QWEN) == ()


MODELS = [profile(), profile(id="Qwen", aliases=("gpt",)), profile("phi:default", aliases=("GPT", "qwen"))]
MODELS += [profile("phi:default", description="small"), profile("gpt:default", kind="embedding")]
STEPS = st.tuples(
    st.integers(0, 4),
    st.sampled_from(["alive", "suspect", "dead", "left", "gone", "unreadable"]),
    st.lists(st.sampled_from(MODELS), max_size=3),
    st.sampled_from("ab"),
)


@given(st.lists(STEPS, max_size=25), st.booleans())
def test_it_is_as_if_made_anew(steps: list[tuple[int, str, list[ProfileState], str]], at_once: bool) -> None:
    now, members = Clock(), dict[Any, Member]()
    peers = made_peers(now)
    for version, (number, what, models, name) in enumerate(steps):
        key = key_of(number)
        made = replace(member(number, *models, node_id=name), version=version)
        if what in ("left", "gone"):
            members.pop(key, None)
            peers.changed(key, replace(made, status="left") if what == "left" else None)
        elif what == "unreadable":
            peers.changed(key, replace(made, payload=b"\xc1", status=members[key].status if key in members else "dead"))
        else:
            members[key] = replace(made, status=what)
            peers.changed(key, members[key])
        if at_once:
            peers.profile("gpt")
            peers.profiles()
    now.time += REMEMBERED_S
    anew = made_peers(now, *members.values())
    assert [peer.key for peer in peers] == [peer.key for peer in anew]
    assert peers.profiles() == anew.profiles()
    for model in ("qwen:default", "phi:default", "gpt:default"):
        assert [peer.key for peer in peers.holders(model)] == [peer.key for peer in anew.holders(model)]
        assert peers.who_has(model) == anew.who_has(model)
    for name in ("qwen", "Qwen:default", "gpt", "phi", "PHI:default", "gpt:default", "nobody"):
        assert peers.profile(name) == anew.profile(name)
    sync(peers)
    now.time += REMEMBERED_S
    assert not peers.epoch - peers.epoch
    assert (len(peers._models), peers._having, peers._filed, peers._models._names) == (0, {}, {}, {})


def test_who_may_still_come(now: Clock) -> None:
    """Whoever was asked does not count, nor who takes no work at all."""
    peers = made_peers(now, member(1, profile()), member(2, profile(), draining=True), member(3, status="dead"))
    assert peers.may_come(QWEN, set())
    assert not peers.may_come(QWEN, {key_of(1)})
    assert not peers.may_come("other:default", set())


def test_why_nobody_serves_it(now: Clock) -> None:
    """trap 62: the 503 names each node and its reason."""
    peers = made_peers(
        now,
        member(1, profile(), status="dead"),
        member(2, profile(), draining=True),
        member(3, profile(ready=1)),
        member(4, profile()),
        member(5),
        limits=replace(TRIPPY, failure_threshold=1),
    )
    broken = peers.named("n4")
    assert broken is not None
    broken.failed(broken.begin(QWEN))
    assert peers.who_has(QWEN) == [
        "n1 (gone)",
        "n2 (draining)",
        "n3 (has no room)",
        "n4 (not reachable, tried again in 5 s)",
    ]
    assert peers.who_has("other:default") == []


@pytest.mark.parametrize("name", ["qwen", "QWEN", "qwen:default", "Qwen:Default", "gpt-4o", "GPT-4O"])
def test_every_name_leads_to_the_profile(now: Clock, name: str) -> None:
    peers = made_peers(now, member(1, profile(id="Qwen", aliases=("GPT-4o",))))
    found = peers.profile(name)
    assert found is not None
    assert (found.key, found.id, found.aliases) == (QWEN, "Qwen", ("GPT-4o",))
    assert found.max_instances == 0, "never started here"
    assert (found.max_wait_s, found.max_queue) == (60.0, 9)
    assert peers.profile(name) is found


def test_what_kind_of_model_it_is_can_be_told_from_the_stand_in(now: Clock) -> None:
    kinds = {"text": (False, False), "embedding": (True, False), "rerank": (False, True), "new-kind": (False, False)}
    for kind, expected in kinds.items():
        found = made_peers(now, member(1, profile(kind=kind))).profile("qwen")
        assert found is not None
        assert (found.embeddings, found.rerank) == expected


def test_a_key_wins_over_an_id_and_an_id_over_an_alias(now: Clock) -> None:
    shadow = profile("x:default", id="x", aliases=("a:default", "b"))
    peers = made_peers(now, member(1, shadow), member(2, profile("a:default"), profile("b:default")))
    for name, key in (("a:default", "a:default"), ("b", "b:default"), ("x", "x:default")):
        found = peers.profile(name)
        assert found is not None
        assert found.key == key


@pytest.mark.parametrize("how", ["dead", "gone"])
def test_a_model_whose_node_is_gone_is_known_for_a_while(now: Clock, how: str) -> None:
    """trap 62: 503 and try again, not 404; once it is surely gone, 404."""
    first = member(1, profile())
    peers = made_peers(now, first)
    sync(peers, *([replace(first, status="dead")] if how == "dead" else []))
    assert peers.profile("qwen") is not None
    assert peers.holders(QWEN) == ()
    assert peers.profiles() == []
    sync(peers)
    now.time += REMEMBERED_S - 1
    sync(peers)
    assert peers.profile("qwen") is not None
    now.time += 2
    sync(peers)
    assert peers.profile("qwen") is None


def test_what_lives_wins_over_what_is_remembered(now: Clock) -> None:
    peers = made_peers(now, member(1, profile(id="OLD", aliases=("a",))))
    sync(peers, member(2, profile(id="New")))
    found = peers.profile("qwen:default")
    assert found is not None
    assert found.id == "New"


def test_an_unknown_name_is_nobodys(now: Clock) -> None:
    peers = made_peers(now, member(1, profile()))
    assert peers.profile("nobody") is None
    assert peers.profile("") is None


def test_stand_ins_are_not_kept_for_ever(now: Clock) -> None:
    """trap 63: a node may tell of other aliases with every record."""
    first = member(1, profile())
    peers = made_peers(now, first)
    for number in range(100):
        sync(peers, first.later(state("n1", profile(aliases=(f"a{number}",))), version=number + 2))
        assert peers.profile("qwen") is not None
    assert len(peers._models) < 20


def test_the_union_is_in_one_order_whoever_came_first(now: Clock) -> None:
    """trap 80"""
    members = [
        member(1, profile("b:default"), profile("a:default")),
        member(2, profile("a:default", description="the second's")),
        member(3, profile("z:default"), status="dead"),
    ]

    def union(*order: Member) -> list[tuple[ProfileState, tuple[str, ...]]]:
        return list(made_peers(now, *order).profiles())

    expected: list[Any] = [(profile("a:default"), ("n1", "n2")), (profile("b:default"), ("n1",))]
    assert union(*members) == union(*members[::-1]) == expected
