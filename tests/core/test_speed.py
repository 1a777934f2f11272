"""Learned figures: they find the truth under noise, and nonsense does not move them far."""

from __future__ import annotations

from math import inf, isfinite, nan
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.speed import Figures, Speed, State, slowdown


def learn(
    speed: Speed, count: int, *, prefill: float = 1000, decode: float = 50, others: int = 0, at: float = 0
) -> None:
    """Let *speed* see *count* requests on a machine of these rates, each with *others* beside it."""
    slow = slowdown(others)
    for n in range(count):
        speed.observe_request(
            now=at + n, prompt_tokens=500, ttft_s=500 / prefill * slow, generated=101, decode_s=100 / decode * slow,
            slot_s=2.5 * slow, concurrency=1 + others,
        )  # fmt: skip


def test_nothing_is_known_at_first() -> None:
    assert Speed().figures() == Figures(None, None, None, None, None)


def test_one_request_and_one_load_are_enough() -> None:
    speed = Speed()
    learn(speed, 1)
    speed.observe_load(12.0, 5.0)
    assert speed.figures() == pytest.approx((12.0, 1000, 50, 2.5, 101))


def test_a_popular_node_does_not_look_slow() -> None:
    alone, crowded = Speed(), Speed()
    learn(alone, 20)
    learn(crowded, 20, others=3)
    assert crowded.figures().decode_tps == pytest.approx(alone.figures().decode_tps)
    assert crowded.figures().prefill_tps == pytest.approx(alone.figures().prefill_tps)
    assert crowded.figures().service_s == pytest.approx(2.5 * slowdown(3))  # a place is held for longer, though
    shared = Speed()
    shared.observe_request(now=0, generated=101, decode_s=2 * slowdown(0, 1), shared=2)
    assert shared.figures().decode_tps == pytest.approx(50)


def test_noise_averages_out() -> None:
    random, speed = Random(3), Speed()
    for n in range(400):
        speed.observe_load(20 * random.lognormvariate(0, 0.4), float(n))
        speed.observe_request(now=float(n), generated=200, decode_s=200 / 40 * random.lognormvariate(0, 0.4))
    assert speed.figures().load_s == pytest.approx(20, rel=0.25)
    assert speed.figures().decode_tps == pytest.approx(40, rel=0.25)


@pytest.mark.parametrize("factor", [1000.0, 0.001])
def test_a_single_absurd_sample_moves_it_little(factor: float) -> None:
    speed = Speed()
    learn(speed, 20)
    speed.observe_load(10.0, 0.0)
    learn(speed, 1, prefill=1000 * factor, decode=50 * factor, at=20)
    figures = speed.figures()
    assert figures.decode_tps == pytest.approx(50, rel=0.1)
    assert figures.prefill_tps == pytest.approx(1000, rel=0.1)


def test_a_real_change_comes_through() -> None:
    speed = Speed()
    learn(speed, 200)
    learn(speed, 60, decode=10, prefill=8000, at=200)
    assert speed.figures().decode_tps == pytest.approx(10, rel=0.25)
    prefill = speed.figures().prefill_tps
    assert prefill is not None
    assert prefill > 2000  # slower, because it looks like cached prompts
    learn(speed, 3, decode=40, at=40_000)  # after a night the past says little
    assert speed.figures().decode_tps == pytest.approx(40, rel=0.05)


def test_a_cached_prompt_is_not_a_fast_gpu() -> None:
    told, untold = Speed(), Speed()
    learn(told, 10)
    learn(untold, 10)
    for n in range(10):  # every other request continues a conversation
        told.observe_request(now=10.0 + n, prompt_tokens=4000, processed_tokens=40, ttft_s=0.04)
        untold.observe_request(now=10.0 + n, prompt_tokens=4000, ttft_s=0.04)
        learn(told, 1, at=10.0 + n)
        learn(untold, 1, at=10.0 + n)
    assert told.figures().prefill_tps == pytest.approx(1000, rel=0.01)
    assert untold.figures().prefill_tps == pytest.approx(1000, rel=0.5)


def test_short_prompts_and_answers_say_little_of_the_speed() -> None:
    """What they take is mostly the overhead of a request."""
    speed = Speed()
    learn(speed, 3)
    for n in range(3):
        speed.observe_request(now=3.0 + n, prompt_tokens=8, ttft_s=0.1, generated=2, decode_s=0.1)
    assert speed.figures().prefill_tps == pytest.approx(1000, rel=0.1)
    assert speed.figures().decode_tps == pytest.approx(50, rel=0.2)


def test_embeddings_have_no_answer() -> None:
    speed = Speed()
    speed.observe_request(now=0, prompt_tokens=512, ttft_s=0.1, slot_s=0.1)
    assert speed.figures() == pytest.approx((None, 5120, None, 0.1, None))


@pytest.mark.parametrize("nonsense", [0.0, -1.0, inf, nan, 1e300])
def test_nonsense_is_not_learned(nonsense: float) -> None:
    speed = Speed()
    speed.observe_load(nonsense, 0.0)
    speed.observe_request(
        now=0, prompt_tokens=100, ttft_s=nonsense, generated=100, decode_s=nonsense, slot_s=nonsense, concurrency=1
    )
    assert speed.figures() == Figures(None, None, None, None, 100)
    speed.observe_request(now=0, prompt_tokens=-5, ttft_s=1.0, generated=-5, decode_s=1.0, processed_tokens=-1)
    speed.observe_request(now=0, generated=10**400)
    assert speed.figures() == Figures(None, None, None, None, 100)


seconds = st.floats(allow_nan=True, allow_infinity=True)
numbers = st.integers(-(10**12), 10**12)


@given(st.lists(st.tuples(numbers, seconds, numbers, seconds, seconds, seconds, seconds, st.none() | numbers)))
def test_whatever_comes_the_figures_can_be_divided_by(samples: list[tuple[Any, ...]]) -> None:
    speed, now = Speed(), 0.0
    for prompt, ttft, generated, decode, slot, concurrency, load, processed in samples:
        now += 1
        speed.observe_load(load, now)
        speed.observe_request(
            now=now, prompt_tokens=prompt, ttft_s=ttft, generated=generated, decode_s=decode, slot_s=slot,
            concurrency=concurrency, shared=concurrency, processed_tokens=processed,
        )  # fmt: skip
        assert all(f is None or (isfinite(f) and f > 0) for f in speed.figures())


@given(st.lists(st.floats(0.001, 1000), min_size=1))
def test_a_mean_lies_between_its_samples(loads: list[float]) -> None:
    speed = Speed()
    for n, load in enumerate(loads):
        speed.observe_load(load, float(n))
    found = speed.figures().load_s
    assert found is not None
    assert min(loads) * 0.999 <= found <= max(loads) * 1.001


def test_it_survives_a_restart() -> None:
    speed = Speed()
    learn(speed, 50)
    speed.observe_load(7.0, 1.0)
    text = msgspec.json.encode(speed.saved())
    again = Speed.restore(msgspec.json.decode(text, type=State), now=3.0)
    assert again.figures() == pytest.approx(speed.figures())
    learn(again, 10, decode=100, at=3.0)  # what is seen now soon outweighs it
    decode = again.figures().decode_tps
    assert decode is not None
    assert decode > 80
    assert speed.figures().decode_tps == pytest.approx(50)  # a copy


def test_a_damaged_file_leaves_figures_out() -> None:
    state = Speed().saved()
    for name, value, weight in (("load_s", nan, 1.0), ("decode_tps", 700.0, 3.0), ("service_s", -1.0, 3.0)):
        mean = getattr(state, name)
        mean.value, mean.weight = value, weight
    state.tokens.value, state.tokens.weight = 120.0, nan
    assert Speed.restore(state, now=0.0).figures() == Figures(None, None, None, None, None)
