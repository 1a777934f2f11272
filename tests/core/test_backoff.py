"""Crash loops back off; a single failure does not (traps 24, 25)."""

from __future__ import annotations

from mesh.core.backoff import MAX_BACKOFF_S, SOUND_LIFE_S, Failure, after_failure, delay_s


def fail(previous: Failure | None, lived_s: float = 0.1) -> Failure:
    return after_failure(previous, "load", "no", (), lived_s=lived_s, now=100.0)


def test_the_first_failure_may_be_tried_again_at_once() -> None:
    assert fail(None).retry_at == 100.0


def test_failures_in_a_row_double_the_pause_up_to_a_bound() -> None:
    pauses = [delay_s(n) for n in range(1, 12)]
    assert pauses[:5] == [0, 1, 2, 4, 8]
    assert pauses[-1] == delay_s(10_000) == MAX_BACKOFF_S


def test_a_process_that_lived_long_starts_a_new_count() -> None:
    row = fail(fail(fail(None)))
    assert row.count == 3
    assert fail(row, lived_s=SOUND_LIFE_S).count == 1
