"""Whether this node serves a request itself, and what it tells of that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mesh.api.own_state import OwnState
from mesh.api.placing import MUCH_FASTER, Placing
from mesh.api.routes import BY_PATH
from mesh.core.node_state import PeerKey, ProfileState
from mesh.net.peer import Peer
from tests.api.exchanges import served
from tests.api.node import SLASHED, SMOL, Node
from tests.fakes_supervisor import FakeInstance
from tests.members import Clock, key_of, made_peers, member, profile


class Here:
    """A node and its placing, with an own decode rate if asked for."""

    def __init__(self, *profiles: Any, decode_tps: float | None = None, key: PeerKey | None = None) -> None:
        self.node = Node(*profiles)
        self.own = OwnState(self.node.ctx, boot="b", addresses=lambda: ())
        self.placing = Placing(self.node.ctx, self.own, key or key_of(99))
        if decode_tps is not None:
            self.own.finished(served(first_byte_at=103.0), 103.0 + 100 / decode_tps, (1000, 101))

    def loaded(self, **changes: Any) -> Here:
        self.node.supervisor.views = [FakeInstance("i-1", SMOL.key, "Smol", **changes)]
        return self


def others(*profiles: ProfileState) -> list[Peer]:
    """Return one peer for each of *profiles*: n1, n2, ..."""
    return list(made_peers(Clock(), *(member(number, p) for number, p in enumerate(profiles, 1))))


def warm(**changes: Any) -> ProfileState:
    return profile(SMOL.key, **{"ready": 1, "slots": 4, "decode_tps": 100.0, "prefill_tps": 1000.0, **changes})


# --- whether it may


def test_this_node_serves_what_its_cookbook_has() -> None:
    here = Here(SMOL, replace(SLASHED, max_instances=0))
    assert here.placing.serves(SMOL.key)
    assert not here.placing.serves(SLASHED.key), "never started here"
    assert not here.placing.serves("other:default")
    assert not here.placing.serves("gpt-4o"), "an alias is no key"


def test_a_drained_node_serves_nothing_new() -> None:
    here = Here()
    here.node.ctx.drained = True
    assert not here.placing.serves(SMOL.key)


# --- the short way


def test_an_idle_warm_node_does_not_compare() -> None:
    assert Here().loaded().placing.good_enough(SMOL.key, others(warm()))


@pytest.mark.parametrize("changes", [{"busy": 1}, {"busy": 4}])
def test_a_busy_one_does(changes: dict[str, Any]) -> None:
    assert not Here().loaded(**changes).placing.good_enough(SMOL.key, others(warm()))


def test_a_cold_one_does_and_one_where_others_wait() -> None:
    assert not Here().placing.good_enough(SMOL.key, others(warm()))
    here = Here().loaded()
    here.node.supervisor.waiting = {SMOL.key: 1}
    assert not here.placing.good_enough(SMOL.key, [])


@pytest.mark.parametrize(
    ("factor", "enough"), [(None, True), (1.0, True), (0.9 * MUCH_FASTER, True), (1.1 * MUCH_FASTER, False)]
)
def test_a_peer_must_be_much_faster_to_be_compared_with(factor: float | None, enough: bool) -> None:
    rate = None if factor is None else 10.0 * factor
    here = Here(decode_tps=10.0).loaded()
    assert here.placing.good_enough(SMOL.key, others(warm(decode_tps=rate), warm(decode_tps=1.0))) is enough
    assert here.placing.good_enough(SMOL.key, others(profile("x:default", decode_tps=9999.0)))


# --- the order


def names(ranked: Any) -> list[str]:
    return [entry.candidate.node_id for entry in ranked]


def test_a_warm_peer_goes_before_a_cold_start_here() -> None:
    here = Here()
    peers = others(warm(), warm(busy=4, queued=9, service_s=30.0))
    assert names(here.placing.rank(served(), peers, here=True)) == ["n1", "node-a", "n2"]
    assert names(here.loaded().placing.rank(served(), peers, here=True))[0] == "node-a"


def test_this_node_is_no_candidate_if_it_was_ruled_out() -> None:
    ranked = Here().loaded().placing.rank(served(), others(warm()), here=False)
    assert names(ranked) == ["n1"]


def test_the_bytes_of_audio_are_no_prompt() -> None:
    """Ten minutes of it would be millions of tokens, and every queue short beside that."""
    route = BY_PATH[b"/v1/audio/transcriptions"][b"POST"]
    (ranked,) = Here().placing.rank(served(route=route, bytes_in=20_000_000), others(warm()), here=False)
    assert (ranked.terms["prefill"], ranked.terms["decode"]) == (0.0, 0.0)


def test_a_drained_node_says_why_it_is_out() -> None:
    here = Here().loaded()
    here.node.ctx.drained = True
    first, last = here.placing.rank(served(), others(warm()), here=True)
    assert (first.candidate.node_id, first.excluded) == ("n1", None)
    assert (last.candidate.node_id, last.excluded) == ("node-a", "draining")


def test_a_prompts_length_is_estimated_from_its_bytes() -> None:
    here = Here()
    short, long = (here.placing.rank(served(bytes_in=n), others(warm()), here=False)[0] for n in (400, 400_000))
    assert short.terms["prefill"] == pytest.approx(0.1, rel=0.5)
    assert long.terms["prefill"] == pytest.approx(1000 * short.terms["prefill"])


def test_equals_take_turns() -> None:
    """trap 51"""
    here = Here()
    peers = others(warm(), warm(), warm())
    firsts = [names(here.placing.rank(served(), peers, here=False))[0] for _ in range(6)]
    assert sorted(firsts) == ["n1", "n1", "n2", "n2", "n3", "n3"]
    assert firsts[:3] == firsts[3:]


def test_turns_are_counted_for_each_profile() -> None:
    """trap 51: or A, B, A, B would give all of A to one node and all of B to the other."""
    here = Here()
    peers = list(made_peers(Clock(), *(member(n, warm(), profile(SLASHED.key, ready=1, slots=4)) for n in (1, 2))))
    firsts: dict[str, list[str]] = {SMOL.key: [], SLASHED.key: []}
    for _ in range(4):
        for what in (SMOL, SLASHED):
            firsts[what.key].append(names(here.placing.rank(served(profile=what), peers, here=False))[0])
    assert all(sorted(found) == ["n1", "n1", "n2", "n2"] for found in firsts.values())


def test_nodes_do_not_all_begin_with_the_same_one() -> None:
    """trap 51: a burst of first requests at many nodes spreads too."""
    peers = others(warm(), warm(), warm())
    firsts = {
        names(Here(key=PeerKey(bytes([0, n]) * 16)).placing.rank(served(), peers, here=False))[0] for n in range(3)
    }
    assert firsts == {"n1", "n2", "n3"}


# --- explaining


def test_an_explanation_is_what_a_request_would_find() -> None:
    here = Here()
    peers = others(warm(), warm())
    explained = [
        names(here.placing.explain(SMOL, peers, prompt_tokens=1000, max_tokens=None)) for _ in range(3)
    ]  # fmt: skip
    assert explained[0] == explained[1] == explained[2], "it takes nobody's turn"
    assert explained[0][-1] == "node-a"
    elsewhere = replace(SMOL, key="x:default")
    assert names(here.placing.explain(elsewhere, [], prompt_tokens=0, max_tokens=None)) == []


def test_an_answers_limit_counts() -> None:
    here = Here()
    peers = others(warm())
    one, many = (
        here.placing.explain(SMOL, peers, prompt_tokens=0, max_tokens=limit)[0].terms["decode"] for limit in (1, 100)
    )
    assert many == pytest.approx(100 * one)
