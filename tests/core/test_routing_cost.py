"""The router's figures and the texts that tell them; its order is test_routing's."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isfinite

import pytest

from mesh.core.node_state import Kind, ProfileState
from mesh.core.routing import Beside, beside, rank
from tests.core.test_routing import MODEL, WARM, WORK, but, cost, node


def test_the_terms_of_an_idle_warm_peer() -> None:
    (ranked,) = rank(replace(WORK, max_tokens=100), [node(1)])
    assert dict(ranked.terms) == pytest.approx(
        {"queue": 0, "load": 0, "prefill": 1.0, "decode": 2.0, "network": 0.003, "crowding": 0}
    )
    assert ranked.reasons == (
        "prefill 1 s: 1000 tokens at 1e+03/s",
        "decode 2 s: 100 tokens at 50/s, at most 100",
        "network 0.003 s: round trip",
    )


def test_embeddings_have_no_answer_to_generate() -> None:
    (ranked,) = rank(replace(WORK, kind=Kind.EMBEDDING), [node(1, but(WARM, kind=Kind.EMBEDDING))])
    assert ranked.terms["decode"] == 0


def test_what_nobody_knows_is_guessed_alike_and_what_others_know_is_borrowed() -> None:
    unknown = ProfileState(key=MODEL, id="chat", ready=1, slots=4)
    one, two = rank(WORK, [node(1, unknown), node(2, unknown)])
    assert one.cost == two.cost
    assert any("(a guess)" in text for text in one.reasons)
    known, guessed = rank(WORK, [node(1, but(WARM, decode_tps=10.0, prefill_tps=100.0)), node(2, unknown)])
    assert known.cost == pytest.approx(guessed.cost)  # not better for being unknown


def test_an_old_record_counts_less() -> None:
    idle, busy = WARM, but(WARM, busy=4, queued=8)
    gaps = [cost(node(1, busy, age_s=age)) - cost(node(1, idle, age_s=age)) for age in (0.0, 5.0, 30.0, 1e6)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] == pytest.approx(0)
    own = cost(node(1, idle, age_s=1e6, own_now=8)) - cost(node(1, idle, age_s=1e6))
    assert own > 5  # what is known for certain always counts


def test_beside_tells_what_else_a_node_does() -> None:
    other = ProfileState(key="other:x", id="other", ready=1, busy=2, queued=1, service_s=9.0)
    waiting = ProfileState(key="big:x", id="big", queued=3)
    idle = ProfileState(key="idle:x", id="idle", ready=1, service_s=99.0)
    assert beside([but(WARM, busy=4), other, waiting, idle], MODEL) == Beside(1, 3, 9.0, 1, 3)
    assert beside([other, idle], MODEL, {"other:x": -9, "idle:x": 1}) == Beside(1, 1, 99.0, 0, 0)
    assert beside([], MODEL) == Beside()


def test_absurd_figures_of_a_peer_stay_numbers() -> None:
    absurd = but(WARM, prefill_tps=1e-300, decode_tps=1e-300, service_s=1e11, load_s=1e11, busy=2**63, queued=2**63)
    assert isfinite(cost(node(1, absurd), replace(WORK, prompt_tokens=10**9)))
    assert cost(node(1, absurd)) < inf


def test_what_else_a_node_does_is_told() -> None:
    busy = node(1, but(WARM, busy=4, queued=2), age_s=3.0, own_now=2, beside=Beside(1, 2, 9.0, 1, 3))
    texts = " | ".join(rank(WORK, [busy])[0].reasons)
    for part in (
        "2 of them sent from here",
        "as of 3.0 s ago",
        "wait for the memory: 1",
        "at work: 1",
        "3 wait longer",
    ):
        assert part in texts
