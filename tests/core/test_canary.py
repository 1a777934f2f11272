"""When a new build counts as too slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.canary import judge, rounds_order

rates = st.floats(0.01, 1e6)


@dataclass(frozen=True)
class Speed:
    prefill_tps: float
    decode_tps: float


def speeds(*decode: float, prefill: float = 1000.0) -> list[Speed]:
    return [Speed(prefill, tps) for tps in decode]


def test_the_best_rounds_are_compared() -> None:
    verdict = judge(speeds(40, 100, 20), speeds(10, 20, 60), 0.3)
    assert (verdict.decode.old_tps, verdict.decode.new_tps) == (100, 60)
    assert verdict.decode.loss == pytest.approx(0.4)
    assert verdict.too_slow == (verdict.decode,)
    assert not verdict.accepted
    assert str(verdict.decode) == "decode lost 40%: 100 tok/s before, 60 now"


def test_prefill_counts_as_much_as_decode() -> None:
    verdict = judge([Speed(1000, 10)], [Speed(500, 10)], 0.3)
    assert [change.what for change in verdict.too_slow] == ["prefill"]


def test_one_quiet_moment_of_the_old_one_rejects_nobody() -> None:
    verdict = judge(speeds(50, 50, 100, 50), speeds(50, 50, 50, 50), 0.3)
    assert verdict.accepted
    assert verdict.decode.loss == 0


def test_one_quiet_moment_of_the_new_one_saves_it_only_from_what_it_refutes() -> None:
    assert judge(speeds(100, 100, 100), speeds(50, 100, 50), 0.3).accepted
    assert not judge(speeds(100, 100, 100), speeds(40, 60, 40), 0.3).accepted


@pytest.mark.parametrize(("new", "limit", "accepted"), [(71, 0.3, True), (69, 0.3, False), (1, 1.0, True)])
def test_the_limit(new: float, limit: float, accepted: bool) -> None:
    assert judge(speeds(100), speeds(new), limit).accepted is accepted


@given(st.lists(st.builds(Speed, rates, rates), min_size=1), st.floats(0.01, 1))
def test_a_build_is_never_slower_than_itself(rounds: Sequence[Speed], limit: float) -> None:
    verdict = judge(rounds, rounds, limit)
    assert verdict.accepted
    assert verdict.prefill.loss == verdict.decode.loss == 0


@given(st.lists(st.builds(Speed, rates, rates), min_size=1), st.floats(0.05, 0.9))
def test_an_even_loss_is_found_whatever_the_machine_does(rounds: Sequence[Speed], left: float) -> None:
    slower = [Speed(speed.prefill_tps, speed.decode_tps * left) for speed in rounds]
    verdict = judge(rounds, slower, 0.99 * (1 - left))
    assert verdict.too_slow == (verdict.decode,)
    assert verdict.decode.loss == pytest.approx(1 - left)


def test_the_order_of_rounds_is_fair() -> None:
    assert rounds_order(4) == [False, True, True, False, False, True, True, False]
    for count in range(9):
        assert rounds_order(count).count(True) == rounds_order(count).count(False) == count
