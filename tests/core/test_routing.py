"""The router: its properties on random candidates, pairs both ways round, and bursts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.node_state import Fit, Kind, PeerKey, ProfileState
from mesh.core.routing import NOISE, NOISE_S, Beside, Candidate, Ranked, Work, rank

MODEL = "chat:default"
WORK = Work(MODEL, prompt_tokens=1000, tokens=200.0)
WARM = ProfileState(
    key=MODEL, id="chat", ready=1, slots=4, load_s=20.0, prefill_tps=1000.0, decode_tps=50.0, service_s=5.0
)
COLD = msgspec.structs.replace(WARM, ready=0, slots=0)


def node(number: int, profile: ProfileState | None = WARM, **more: object) -> Candidate:
    base = Candidate(PeerKey(number.to_bytes(32, "big")), f"node{number}", profile, rtt_s=0.001)
    return replace(base, **more)  # type: ignore[arg-type]


def but(profile: ProfileState, **more: object) -> ProfileState:
    return msgspec.structs.replace(profile, **more)


def names(ranked: Sequence[Ranked]) -> list[str]:
    return [r.candidate.node_id for r in ranked]


def cost(candidate: Candidate, work: Work = WORK) -> float:
    (ranked,) = rank(work, [candidate])
    assert ranked.excluded is None
    return ranked.cost


# -- pairs, both ways round

BETTER_AND_WORSE = {
    "a model that is loaded": (node(2), node(1, COLD)),
    "a free slot": (node(2, but(WARM, busy=3)), node(1, but(WARM, busy=4))),
    "a short queue": (node(2, but(WARM, busy=4, queued=1)), node(1, but(WARM, busy=4, queued=5))),
    "a faster GPU": (node(2), node(1, but(WARM, decode_tps=20.0))),
    "a faster prefill": (node(2), node(1, but(WARM, prefill_tps=200.0))),
    "a short load": (node(2, but(COLD, load_s=5.0)), node(1, but(COLD, load_s=30.0))),
    "a load under way": (node(2, but(COLD, loading=1)), node(1, COLD)),
    "a load that began long ago": (
        node(2, but(COLD, loading=1), loading_for_s=15.0), node(1, but(COLD, loading=1), loading_for_s=2.0)
    ),
    "a load for the own request": (node(2, COLD, loading_for_s=12.0, own_now=1), node(1, COLD)),
    "free memory": (node(2, COLD), node(1, but(COLD, fit=Fit.EVICT))),
    "an idle victim": (node(2, but(COLD, fit=Fit.EVICT)), node(1, but(COLD, fit=Fit.WAIT))),
    "a small file": (
        node(2, but(COLD, load_s=None), size_mib=2000), node(1, but(COLD, load_s=None), size_mib=40_000)
    ),
    "own requests that ended": (node(2, but(WARM, busy=4), own_then=4), node(1, but(WARM, busy=4), own_then=0)),
    "none of the own ones there": (node(2), node(1, own_now=4)),
    "a cached prompt": (node(2, affinity=0.9), node(1)),
    "a near node": (node(2), node(1, rtt_s=0.9)),
    "the local node": (node(2, local=True, rtt_s=None), node(1, rtt_s=0.0001)),
    "a warm peer to a cold local node": (node(2), node(1, COLD, local=True)),
    "an idle local node to a busy peer": (node(2, local=True), node(1, but(WARM, busy=4))),
    "several instances": (node(2, but(WARM, ready=2, slots=8, busy=4)), node(1, but(WARM, busy=3))),
    "unlimited slots": (node(2, but(WARM, slots=0, busy=4)), node(1, but(WARM, busy=4, queued=9))),
    "another instance can start": (
        node(2, but(WARM, busy=4, queued=30, max_instances=2)), node(1, but(WARM, busy=4, queued=30))
    ),
    "a GPU for itself": (node(2), node(1, beside=Beside(computing=1, requests=2))),
    "memory that nobody waits for": (node(2), node(1, beside=Beside(contenders=1, starved=1))),
    "short answers of the others": (
        node(2, but(COLD, fit=Fit.WAIT), beside=Beside(computing=1, service_s=2)),
        node(1, but(COLD, fit=Fit.WAIT), beside=Beside(computing=1, service_s=60)),
    ),
    "room in the queue": (
        node(2, but(WARM, busy=4, queued=9, decode_tps=1.0), max_queue=10),
        node(1, but(WARM, busy=4, queued=10), max_queue=10),
    ),
    "an old record of a busy node": (
        node(2, but(WARM, busy=4, queued=20), age_s=600.0), node(1, but(WARM, busy=4, queued=20))
    ),
}  # fmt: skip


@pytest.mark.parametrize("pair", BETTER_AND_WORSE.values(), ids=BETTER_AND_WORSE.keys())
def test_the_better_one_is_first_both_ways_round(pair: tuple[Candidate, Candidate]) -> None:
    better, worse = pair
    for turn in range(3):
        work = replace(WORK, turn=turn)
        assert names(rank(work, [better, worse])) == names(rank(work, [worse, better])) == ["node2", "node1"]


EXCLUDED = {
    "draining": node(1, draining=True),
    "circuit open for another 3.0 s": node(1, circuit_s=3.0),
    "not reachable": node(1, reachable=False),
    "version 9.0 is not accepted": node(1, rejected="version 9.0 is not accepted"),
    "does not have chat:default": node(1, None),
    "cannot load it": node(1, but(COLD, fit=Fit.NEVER)),
    "chat:default is for embedding there, not for text": node(1, but(WARM, kind=Kind.EMBEDDING)),
}


@pytest.mark.parametrize(("why", "candidate"), EXCLUDED.items(), ids=EXCLUDED.keys())
def test_who_must_not_get_it_is_last_and_is_told_why(why: str, candidate: Candidate) -> None:
    """Traps 61, 64. However bad the other is."""
    bad = node(2, but(COLD, fit=Fit.WAIT, queued=500), own_now=50, max_queue=500)
    for order in ([bad, candidate], [candidate, bad]):
        first, second = rank(replace(WORK, kind=Kind.TEXT), order)
        assert (first.candidate, first.excluded) == (bad, None)
        assert (second.excluded, second.reasons, second.cost) == (why, (why,), 0.0)


def test_the_way_of_the_request_excludes() -> None:
    """Trap 60."""
    one, two, here = node(1), node(2), node(3, local=True)
    tried = rank(replace(WORK, tried=frozenset({one.key})), [one, two])
    assert (names(tried), tried[1].excluded) == (["node2", "node1"], "already tried")
    visited = rank(replace(WORK, visited=frozenset({one.key, here.key})), [one, two, here])
    assert visited[-1].excluded == "the request came through it"
    assert [r.excluded for r in visited[:2]] == [None, None]  # a request that came back is best served here
    tired = rank(replace(WORK, hops=1), [one, two, here])
    assert [r.excluded for r in tired] == [None, "hop limit of 1 reached", "hop limit of 1 reached"]


def test_a_loaded_model_is_used_where_no_other_instance_could_start() -> None:
    assert rank(WORK, [node(1, but(WARM, fit=Fit.NEVER))])[0].excluded is None


def test_a_forwarded_request_is_served_here_unless_that_is_impossible() -> None:
    """Trap 60."""
    slow = node(1, but(COLD, fit=Fit.WAIT, queued=50), local=True)
    forwarded = replace(WORK, forwarded=True, hops=1, max_hops=2)
    here, there = rank(forwarded, [node(2), slow])
    assert here.candidate is slow
    assert here.reasons[0] == "it was forwarded to this node, so it is served here"
    assert "forwarded" not in " ".join(there.reasons)
    assert names(rank(replace(forwarded, forwarded=False), [node(2), slow]))[0] == "node2"
    for impossible in (replace(slow, draining=True), replace(slow, profile=but(COLD, fit=Fit.NEVER))):
        assert names(rank(forwarded, [node(2), impossible])) == ["node2", "node1"]


# -- ties and bursts


def test_equals_take_turns() -> None:
    """Trap 51."""
    nodes = [node(n) for n in range(5)]
    first = [names(rank(replace(WORK, turn=turn), nodes))[0] for turn in range(50)]
    assert set(Counter(first).values()) == {10}


def test_nearly_equals_take_turns_and_the_biggest_does_not_take_everything() -> None:
    """Trap 51. Their figures differ by less than they are worth; one has twice the slots."""
    nodes = [node(1, but(WARM, slots=8, decode_tps=51.0)), node(2, but(WARM, decode_tps=50.0))]
    first = Counter(names(rank(replace(WORK, turn=turn), nodes))[0] for turn in range(10))
    assert first == {"node1": 5, "node2": 5}


def test_a_tie_with_the_local_node_is_no_reason_to_go_elsewhere() -> None:
    nodes = [node(1), node(2, local=True), node(3)]
    assert {names(rank(replace(WORK, turn=turn), nodes))[0] for turn in range(6)} == {"node2"}


@pytest.mark.parametrize("local", [False, True])
def test_a_quick_load_is_no_reason_to_load_twice(local: bool) -> None:
    """It takes less than figures are worth, but memory, too: who has the model loaded is asked, at every turn."""
    cold = node(1, but(COLD, load_s=0.05), local=local)
    for turn in range(6):
        for nodes in ([cold, node(2)], [node(2), cold]):
            first, second = rank(replace(WORK, turn=turn), nodes)
            assert names([first, second]) == ["node2", "node1"]
            assert second.cost < first.cost * (1 + NOISE) + NOISE_S, "it is a tie"


def send(nodes: list[Candidate], count: int, work: Work = WORK) -> Counter[str]:
    """Route *count* requests by the own requests in flight alone: no news arrives meanwhile."""
    sent: Counter[str] = Counter()
    for turn in range(count):
        chosen = rank(replace(work, turn=turn), nodes)[0].candidate
        sent[chosen.node_id] += 1
        nodes = [replace(n, own_now=n.own_now + 1) if n is chosen else n for n in nodes]
    return sent


@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 3), st.floats(0, 30))
def test_a_burst_spreads_over_equals_before_any_gossip(nodes: int, count: int, busy: int, age_s: float) -> None:
    """Trap 50."""
    sent = send([node(n, but(WARM, busy=busy), age_s=age_s) for n in range(nodes)], count)
    assert max(sent.values()) - min(sent[f"node{n}"] for n in range(nodes)) <= 1


def test_a_burst_spreads_by_speed_over_unequal_ones() -> None:
    slow = but(WARM, decode_tps=25.0, prefill_tps=500.0, service_s=10.0)
    sent = send([node(1), node(2, slow)], 60)
    assert 1.5 < sent["node1"] / sent["node2"] < 3.0


def test_a_burst_for_a_cold_model_loads_it_once_and_then_more_often() -> None:
    sent = send([node(1, COLD, loading_for_s=0.1, own_now=1), node(2, COLD)], 2)
    assert sent == {"node1": 2}
    many = send([node(1, COLD, loading_for_s=0.1, own_now=1), node(2, COLD)], 60)
    assert many["node2"] > 10


def test_own_requests_that_the_record_has_are_not_counted_twice() -> None:
    told = node(1, but(WARM, busy=4, queued=3), own_now=7, own_then=7)
    untold = node(1, WARM, own_now=7, own_then=0)
    assert cost(told) == pytest.approx(cost(untold))


# -- properties

rates = st.none() | st.floats(0.01, 1e6)
profiles = st.builds(
    ProfileState,
    key=st.just(MODEL), id=st.just("chat"), kind=st.sampled_from([Kind.TEXT, Kind.TEXT, Kind.EMBEDDING]),
    fit=st.sampled_from([*Fit, "from a later version"]), ready=st.integers(0, 3), loading=st.integers(0, 2),
    slots=st.integers(0, 16), busy=st.integers(0, 20), queued=st.integers(0, 50),
    load_s=st.none() | st.floats(0.1, 1000), prefill_tps=rates, decode_tps=rates,
    service_s=st.none() | st.floats(0.01, 1000), max_instances=st.integers(1, 3),
)  # fmt: skip
besides = st.builds(
    Beside, st.integers(0, 3), st.integers(0, 20), st.floats(0, 100), st.integers(0, 3), st.integers(0, 9)
)
candidates = st.builds(
    Candidate,
    key=st.integers(0, 5).map(lambda n: PeerKey(n.to_bytes(32, "big"))), node_id=st.sampled_from(["a", "b", "c"]),
    profile=st.none() | profiles, age_s=st.floats(0, 100), own_now=st.integers(0, 9), own_then=st.integers(0, 9),
    loading_for_s=st.none() | st.floats(0, 100), rtt_s=st.none() | st.floats(0, 1), affinity=st.floats(-0.5, 1.5),
    beside=besides, size_mib=st.none() | st.integers(1, 10**6), max_queue=st.none() | st.integers(0, 40),
    draining=st.sampled_from([False, False, True]), reachable=st.sampled_from([True, True, False]),
    circuit_s=st.none() | st.floats(0, 60), rejected=st.sampled_from([None, None, "version"]),
)  # fmt: skip
fleets = st.lists(candidates, max_size=6, unique_by=lambda c: c.key).map(
    lambda found: [replace(c, local=n == 0 and c.rtt_s is None) for n, c in enumerate(found)]
)
keys = st.frozensets(st.integers(0, 5).map(lambda n: PeerKey(n.to_bytes(32, "big"))), max_size=2)
works = st.builds(
    Work,
    profile=st.just(MODEL), kind=st.sampled_from([None, Kind.TEXT, Kind.EMBEDDING]),
    prompt_tokens=st.integers(0, 10**6), max_tokens=st.none() | st.integers(-1, 10**6),
    tokens=st.none() | st.floats(1, 1e5), forwarded=st.booleans(), hops=st.integers(0, 2), max_hops=st.integers(1, 2),
    visited=keys, tried=keys, turn=st.integers(0, 100),
)  # fmt: skip


@given(works, fleets, st.randoms(use_true_random=False))
def test_the_order_is_strict_and_that_of_the_input_does_not_matter(
    work: Work, fleet: list[Candidate], random: Random
) -> None:
    ranked = rank(work, fleet)
    assert Counter(r.candidate.key for r in ranked) == Counter(c.key for c in fleet)
    shuffled = fleet.copy()
    random.shuffle(shuffled)
    assert rank(work, shuffled) == ranked


@given(works, fleets)
def test_no_excluded_one_before_an_allowed_one_and_no_full_one_before_one_with_room(
    work: Work, fleet: list[Candidate]
) -> None:
    ranked = rank(work, fleet)
    allowed = [r for r in ranked if r.excluded is None]
    assert list(ranked[: len(allowed)]) == allowed
    free = [r for r in allowed if not (work.forwarded and r.candidate.local)]
    assert [r.full for r in free] == sorted(r.full for r in free)


@given(works, fleets)
def test_cheaper_comes_first_beyond_the_noise(work: Work, fleet: list[Candidate]) -> None:
    rest = [
        r for r in rank(work, fleet) if r.excluded is None and not r.full and not (work.forwarded and r.candidate.local)
    ]
    for n, r in enumerate(rest):
        assert all(r.cost <= later.cost * 1.05 + 0.0201 for later in rest[n + 1 :])


@given(works, fleets)
def test_costs_are_finite_and_the_reasons_tell_all_of_them(work: Work, fleet: list[Candidate]) -> None:
    for r in rank(work, fleet):
        assert isfinite(r.cost)
        assert all(seconds >= 0 for seconds in r.terms.values())
        assert r.cost == sum(r.terms.values())
        if r.excluded is not None:
            assert (dict(r.terms), r.reasons) == ({}, (r.excluded,))
            continue
        told = {text.split()[0]: float(text.split()[1]) for text in r.reasons if text.split()[0] in r.terms}
        assert told == pytest.approx({name: s for name, s in r.terms.items() if s}, rel=0.01)
        assert sum(told.values()) == pytest.approx(r.cost, rel=0.01)
        assert all(len(text) < 250 and text.isprintable() for text in r.reasons)


LOADS = ["busy", "queued", "own_now", "computing", "requests", "contenders", "starved"]


@given(works, candidates, st.sampled_from(LOADS), st.integers(1, 20))
def test_more_load_never_makes_it_cheaper(work: Work, candidate: Candidate, figure: str, more: int) -> None:
    able = replace(candidate, draining=False, reachable=True, circuit_s=None, rejected=None)
    if able.profile is None:
        return
    able = replace(able, profile=but(able.profile, fit=Fit.NOW if able.profile.fit == Fit.NEVER else able.profile.fit))
    work = replace(work, kind=None, tried=frozenset(), visited=frozenset(), hops=0)
    assert able.profile is not None
    if figure in Beside._fields:
        value = getattr(able.beside, figure)
        worse = replace(able, beside=able.beside._replace(**{figure: value + more}))
    elif figure == "own_now":
        worse = replace(able, own_now=able.own_now + more)
    else:
        worse = replace(able, profile=but(able.profile, **{figure: getattr(able.profile, figure) + more}))
    assert cost(worse, work) >= cost(able, work)


@given(works, candidates, st.floats(0, 1))
def test_a_longer_answer_is_never_cheaper(work: Work, candidate: Candidate, part: float) -> None:
    able = node(1, but(candidate.profile or WARM, fit=Fit.NOW))
    work = replace(work, kind=None, tried=frozenset(), visited=frozenset(), hops=0, max_tokens=None, tokens=1000.0)
    assert cost(able, replace(work, tokens=1000.0 * part)) <= cost(able, work)
    assert cost(able, replace(work, prompt_tokens=int(work.prompt_tokens * part))) <= cost(able, work)
