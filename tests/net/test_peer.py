"""One other node: what it says in person corrects its record, for a while, and how old what is known of it counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.core.node_state import Fit
from mesh.core.routing import Work, rank
from mesh.net.peer import BELIEVED_S, FULL_S, SETTLED_S, Peer
from mesh.net.peers import Peers
from tests.members import Clock, made_peers, member, profile, state, sync

QWEN = "qwen:default"
ABSENT = [
    ("model_not_found", "does not have the model"),
    ("model_too_large", "too large"),
    ("engine_missing", "no engine"),
    ("instance_failed", "does not start"),
]


@pytest.fixture
def now() -> Clock:
    return Clock()


def only(peers: Peers) -> Peer:
    (peer,) = peers
    return peer


# --- corrections


@pytest.mark.parametrize(("kind", "said"), ABSENT)
def test_what_it_says_in_person_counts_at_once_and_until_its_next_record(now: Clock, kind: str, said: str) -> None:
    """trap 61"""
    first = member(1, profile(ready=1), profile("b:default"))
    peers = made_peers(now, first)
    peer = only(peers)
    peer.corrected(QWEN, kind, peer.stamp)
    assert said in (peer.candidate(QWEN).rejected or "")
    assert said in (peer.in_the_way(QWEN) or "")
    assert not peers.may_come(QWEN, set())
    assert peer.candidate("b:default").rejected is None
    assert peers.may_come("b:default", set())
    sync(peers, replace(first, status="suspect"))  # not a record
    assert peer.candidate(QWEN).rejected is not None
    sync(peers, first.later())
    assert peer.candidate(QWEN).rejected is None
    assert peer.refusals_total == 1


@pytest.mark.parametrize(("kind", "said"), ABSENT)
def test_it_is_not_believed_for_ever(now: Clock, kind: str, said: str) -> None:
    """A record that was right does not change, and a refusal may be about a moment: its instance failed once."""
    peers = made_peers(now, member(1, profile(ready=1)))
    peer = only(peers)
    peer.corrected(QWEN, kind, peer.stamp)
    now.time += BELIEVED_S - 0.1
    assert said in (peer.in_the_way(QWEN) or "")
    now.time += 0.2
    assert peer.in_the_way(QWEN) is None
    assert peer.candidate(QWEN).rejected is None
    assert peers.may_come(QWEN, set())


@pytest.mark.parametrize("kind", ["model_not_found", "draining", "queue_full"])
def test_a_newer_record_than_the_one_that_led_there_knows_better(now: Clock, kind: str) -> None:
    """The answer of a request that was sent before it says nothing of now."""
    first = member(1, profile(ready=1))
    peers = made_peers(now, first)
    peer = only(peers)
    led_there = peer.stamp
    sync(peers, first.later())
    peer.corrected(QWEN, kind, led_there)
    assert peer.in_the_way(QWEN) is None
    assert (peer.draining, peer.refusals_total) == (False, 1)


def test_a_node_that_says_it_drains_is_out_at_once(now: Clock) -> None:
    """trap 61"""
    first = member(1, profile(ready=1), profile("b:default"))
    peers = made_peers(now, first)
    peer = only(peers)
    peer.corrected(QWEN, "draining", peer.stamp)
    assert peer.candidate(QWEN).draining
    assert peer.in_the_way(QWEN) == peer.in_the_way("b:default") == "draining"
    assert not peers.may_come(QWEN, set())
    sync(peers, first.later())
    assert not peer.candidate(QWEN).draining


def test_a_drain_that_was_ended_before_anybody_was_told_is_forgotten(now: Clock) -> None:
    """No record of it ever came, so none takes it back."""
    peers = made_peers(now, member(1, profile(ready=1)))
    peer = only(peers)
    peer.corrected(QWEN, "draining", peer.stamp)
    now.time += BELIEVED_S - 0.1
    assert peer.draining
    now.time += 0.2
    assert not peer.draining
    assert peers.may_come(QWEN, set())


def test_a_record_that_drains_does_so_until_the_next_one(now: Clock) -> None:
    first = member(1, profile(ready=1), draining=True)
    peers = made_peers(now, first)
    now.time += 10 * BELIEVED_S
    assert only(peers).draining
    sync(peers, first.later(state("n1", profile(ready=1))))
    assert not only(peers).draining


@pytest.mark.parametrize("kind", ["queue_full", "no_capacity"])
def test_a_full_node_is_left_alone_for_a_moment(now: Clock, kind: str) -> None:
    """trap 59: it is healthy, and only has no room now; so it may come, and is no failure."""
    peers = made_peers(now, member(1, profile(ready=1), profile("b:default")))
    peer = only(peers)
    peer.corrected(QWEN, kind, peer.stamp)
    assert "full" in (peer.in_the_way(QWEN) or "")
    assert peer.candidate(QWEN).rejected == peer.in_the_way(QWEN)
    assert peer.in_the_way("b:default") is None
    assert peers.may_come(QWEN, set())
    now.time += FULL_S - 0.01
    assert peer.in_the_way(QWEN) is not None
    now.time += 0.02
    assert peer.in_the_way(QWEN) is None
    assert (peer.refusals_total, peer.failures_total) == (1, 0)


@pytest.mark.parametrize("kind", ["queue_timeout", "upstream_error", "whatever"])
def test_a_refusal_of_one_request_keeps_nobody_else_away(now: Clock, kind: str) -> None:
    """trap 59"""
    peer = only(made_peers(now, member(1, profile(ready=1))))
    peer.corrected(QWEN, kind, peer.stamp)
    assert peer.in_the_way(QWEN) is None
    assert peer.refusals_total == 1


def test_a_gauge(now: Clock) -> None:
    peer = only(made_peers(now, member(1, profile(ready=1), profile("b:default"))))
    now.time += 4
    peer.failed(peer.begin(QWEN))
    peer.begin("b:default")
    peer.corrected(QWEN, "queue_full", peer.stamp)
    gauge = peer.gauge()
    assert (gauge.node_id, gauge.up, gauge.circuit, gauge.rtt_s, gauge.record_age_s) == ("n1", True, "closed", None, 4)
    assert (gauge.in_flight, gauge.forwards_total, gauge.failures_total, gauge.refusals_total) == (2, 2, 1, 1)


# --- age


def test_a_record_that_does_not_change_is_still_true(now: Clock) -> None:
    """An idle node's record stays as it is for hours, and is no worse than that of a busy one that is just new."""
    idle, busy = member(1, profile(ready=1, slots=4)), member(2, profile(ready=1, slots=4, busy=4))
    peers = made_peers(now, idle, busy)
    now.time += 3600
    sync(peers, idle, busy.later(updated_at=now.time))
    (first, second) = peers
    assert (first.candidate(QWEN).age_s, second.candidate(QWEN).age_s) == (SETTLED_S, 0)
    ranked = rank(Work(profile=QWEN), [first.candidate(QWEN), second.candidate(QWEN)])
    assert [entry.candidate.node_id for entry in ranked] == ["n1", "n2"]
    assert first.gauge().record_age_s == 3600


def test_a_record_of_a_suspect_is_as_old_as_it_is(now: Clock) -> None:
    """Nothing has been heard of it: what it said last may have changed long ago."""
    first = member(1, profile(ready=1))
    peers = made_peers(now, first)
    now.time += 60
    assert only(peers).candidate(QWEN).age_s == SETTLED_S
    sync(peers, replace(first, status="suspect"))
    assert only(peers).candidate(QWEN).age_s == 60


# --- loads that requests of ours made necessary


def test_a_load_that_never_began_is_forgotten(now: Clock) -> None:
    """The forward that would have caused it never got there: ten minutes later the load still takes its whole time."""
    peer = only(made_peers(now, member(1, profile(load_s=40.0))))
    permit = peer.begin(QWEN)
    now.time += 3
    assert peer.candidate(QWEN).loading_for_s == 3
    peer.failed(permit)
    peer.end(QWEN, permit)
    assert peer.candidate(QWEN).loading_for_s is None


def test_a_load_is_remembered_while_anybody_waits_for_it(now: Clock) -> None:
    peer = only(made_peers(now, member(1, profile(load_s=40.0))))
    first, second = peer.begin(QWEN), peer.begin(QWEN)
    now.time += 3
    peer.end(QWEN, first)
    assert peer.candidate(QWEN).loading_for_s == 3
    peer.end(QWEN, second)
    assert peer.candidate(QWEN).loading_for_s is None


def test_a_load_that_its_record_tells_of_goes_on_without_us(now: Clock) -> None:
    first = member(1, profile())
    peers = made_peers(now, first)
    peer = only(peers)
    permit = peer.begin(QWEN)
    now.time += 3
    sync(peers, first.later(state("n1", profile(loading=1))))
    peer.end(QWEN, permit)
    assert peer.candidate(QWEN).loading_for_s == 3


def test_a_node_that_has_to_wait_for_memory_first_loads_nothing_yet(now: Clock) -> None:
    peer = only(made_peers(now, member(1, profile(fit=Fit.WAIT))))
    peer.begin(QWEN)
    assert peer.candidate(QWEN).loading_for_s is None
