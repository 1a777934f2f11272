"""The circuit breaker: its rules one by one, and any sequence of events against a naive oracle."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.breaker import TRANSITIONS, Breaker, Event, Limits, Permit, Phase, diagram

LIMITS = Limits(failure_threshold=3, success_threshold=2, open_base_s=5, open_max_s=60, probe_interval_s=1, permit_s=30)


def phase(breaker: Breaker) -> Phase:
    return breaker.phase


def granted(breaker: Breaker, now: float) -> Permit:
    permit = breaker.allows(now)
    assert permit is not None
    return permit


def fail(breaker: Breaker, now: float) -> None:
    breaker.failed(granted(breaker, now), now)


def succeed(breaker: Breaker, now: float) -> None:
    breaker.succeeded(granted(breaker, now), now)


def opened(limits: Limits = LIMITS, now: float = 0.0) -> Breaker:
    breaker = Breaker(limits)
    for _ in range(limits.failure_threshold):
        fail(breaker, now)
    assert phase(breaker) is Phase.OPEN
    return breaker


def test_failures_in_a_row_open_it() -> None:
    breaker = Breaker(LIMITS)
    for result in (fail, fail, succeed, fail, fail):
        result(breaker, 0.0)
    assert phase(breaker) is Phase.CLOSED
    fail(breaker, 0.0)
    assert phase(breaker) is Phase.OPEN
    assert breaker.allows(4.9) is None
    assert breaker.refusal_s(4.0) == pytest.approx(1.0)


def test_asking_whether_it_refuses_takes_nothing() -> None:
    breaker = opened()
    assert [breaker.refusal_s(5.0) for _ in range(3)] == [None] * 3
    assert phase(breaker) is Phase.OPEN
    assert breaker.allows(5.0) is not None


def test_it_closes_with_no_client_traffic() -> None:
    """Trap 52: gossip asks every five seconds, the peer is back after 17."""
    breaker, now = opened(), 0.0
    while phase(breaker) is not Phase.CLOSED:
        now += 5.0
        assert now < 60
        if (permit := breaker.allows(now)) is not None:
            (breaker.succeeded if now >= 17 else breaker.failed)(permit, now)
    assert breaker.refusal_s(now) is None


def test_every_failed_probe_doubles_the_pause() -> None:
    breaker, now = opened(), 0.0
    for pause in (5, 10, 20, 40, 60, 60):
        assert breaker.allows(now + pause - 0.1) is None
        now += pause
        fail(breaker, now)
    now += 60
    succeed(breaker, now)
    succeed(breaker, now + 1)
    for _ in range(3):
        fail(breaker, now + 2)
    assert breaker.refusal_s(now + 2) == pytest.approx(5.0)  # and a circuit that was closed begins anew


def test_a_base_beyond_the_maximum_and_a_long_outage() -> None:
    assert replace(LIMITS, open_base_s=90.0).pause_s(3) == 90.0
    assert LIMITS.pause_s(100_000) == 60.0


def test_results_from_before_it_opened_are_ignored() -> None:
    """Trap 53: the requests that were under way when it opened end one after another."""
    breaker = Breaker(LIMITS)
    early = [granted(breaker, 0.0) for _ in range(8)]
    for permit in early[:3]:
        breaker.failed(permit, 1.0)
    for permit in early[3:5]:
        breaker.succeeded(permit, 2.0)
    assert phase(breaker) is Phase.OPEN
    probe = granted(breaker, 6.0)
    breaker.failed(early[5], 6.1)
    breaker.succeeded(early[6], 6.2)
    breaker.succeeded(early[7], 6.2)
    assert phase(breaker) is Phase.HALF_OPEN
    breaker.succeeded(probe, 6.5)
    succeed(breaker, 7.5)
    assert phase(breaker) is Phase.CLOSED
    for permit in early:
        breaker.failed(permit, 8.0)
    assert phase(breaker) is Phase.CLOSED


def test_a_success_from_before_it_opened_does_not_hide_failures() -> None:
    """Trap 53, the other way round: closed again, failures in a row are those of now."""
    breaker = Breaker(LIMITS)
    early = granted(breaker, 0.0)
    for _ in range(LIMITS.failure_threshold):
        fail(breaker, 0.0)
    for now in (6.0, 7.5):
        succeed(breaker, now)
    assert phase(breaker) is Phase.CLOSED
    for _ in range(LIMITS.failure_threshold - 1):
        fail(breaker, 8.0)
    breaker.succeeded(early, 8.5)
    fail(breaker, 9.0)
    assert phase(breaker) is Phase.OPEN


def test_one_probe_at_a_time_and_paced() -> None:
    breaker = opened()
    probe = granted(breaker, 5.0)
    assert breaker.allows(6.5) is None  # it is out
    breaker.succeeded(probe, 6.5)
    second = granted(breaker, 6.5)
    breaker.succeeded(second, 6.6)
    assert phase(breaker) is Phase.CLOSED
    breaker = opened()
    breaker.succeeded(granted(breaker, 5.0), 5.1)
    assert breaker.refusal_s(5.1) == pytest.approx(0.9)
    unpaced = opened(replace(LIMITS, probe_interval_s=0.0))
    succeed(unpaced, 5.0)
    succeed(unpaced, 5.0)
    assert phase(unpaced) is Phase.CLOSED


def test_a_probe_that_is_never_reported_does_not_block_it() -> None:
    breaker = opened()
    lost = granted(breaker, 5.0)
    assert breaker.allows(34.9) is None
    succeed(breaker, 35.0)
    breaker.failed(lost, 35.5)  # found after all: it is not the probe any more
    succeed(breaker, 36.0)
    assert phase(breaker) is Phase.CLOSED


def test_a_probe_whose_client_left_is_given_back() -> None:
    breaker = opened(replace(LIMITS, probe_interval_s=0.0))
    probe = granted(breaker, 5.0)
    breaker.dropped(probe)
    assert phase(breaker) is Phase.HALF_OPEN
    assert breaker.allows(5.0) is not None
    breaker.dropped(probe)  # twice: the next probe is not touched
    assert breaker.allows(5.0) is None


def test_disabled_it_never_refuses() -> None:
    breaker = Breaker(replace(LIMITS, enabled=False))
    for _ in range(50):
        fail(breaker, 0.0)
    assert phase(breaker) is Phase.CLOSED


def test_thresholds_of_zero_count_as_one() -> None:
    breaker = Breaker(replace(LIMITS, failure_threshold=0, success_threshold=0))
    fail(breaker, 0.0)
    assert phase(breaker) is Phase.OPEN
    succeed(breaker, 5.0)
    assert phase(breaker) is Phase.CLOSED


def test_every_phase_is_left_and_the_diagram_has_every_row() -> None:
    assert {phase for phase, _ in TRANSITIONS} == set(Phase) == set(TRANSITIONS.values())
    assert {event for _, event in TRANSITIONS} == set(Event)
    assert diagram().count("-->") == len(TRANSITIONS) + 1


# -- against a naive oracle


@dataclass
class Oracle:
    """The same rules, by looking through everything that ever happened; knows nothing of generations."""

    limits: Limits
    phase: str = "closed"
    changed: int = 0  #: how many changes of phase there were
    relapses: int = 0
    opened_at: float = 0.0
    asked: list[tuple[int, bool, float]] = field(default_factory=list)  #: per permit: changes before it, probe, when
    results: list[tuple[int, str]] = field(default_factory=list)  #: in order, those that counted
    since: int = 0  #: results before the present phase

    def ask(self, now: float) -> bool:
        if self.phase == "open":
            if now < self.opened_at + min(60.0, 5.0 * 2**self.relapses):
                return False
            self.change("half_open")
        if self.phase == "half_open":
            mine = [n for n, (changed, _, _) in enumerate(self.asked) if changed == self.changed]
            for n in mine:
                if now < self.asked[n][2] + self.limits.probe_interval_s:
                    return False
            if mine and not any(n == mine[-1] for n, _ in self.results) and now < self.asked[mine[-1]][2] + 30.0:
                return False
        self.asked.append((self.changed, self.phase == "half_open", now))
        return True

    def report(self, number: int, what: str, now: float) -> None:
        changed, probe, _ = self.asked[number]
        if changed != self.changed or any(n == number for n, _ in self.results):
            return
        if probe and number != len(self.asked) - 1:
            return
        if what == "dropped" and not probe:
            return
        self.results.append((number, what))
        recent = [w for _, w in self.results[self.since :] if w != "dropped"]
        if self.phase == "closed" and recent[-3:] == ["failed"] * 3:
            self.relapses, self.opened_at = 0, now
            self.change("open")
        elif self.phase == "half_open" and what == "failed":
            self.relapses, self.opened_at = self.relapses + 1, now
            self.change("open")
        elif self.phase == "half_open" and recent.count("succeeded") == 2:
            self.change("closed")

    def change(self, phase: str) -> None:
        self.phase, self.changed, self.since = phase, self.changed + 1, len(self.results)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.sampled_from([0.25, 1.0, 5.0, 30.0, 60.0])),
        st.tuples(st.just("ask"), st.just(0.0)),
        st.tuples(st.sampled_from(["succeeded", "failed", "failed", "dropped"]), st.integers(-1, 12)),
    ),
    max_size=120,
)


@given(steps)
def test_any_sequence_agrees_with_the_oracle(sequence: list[tuple[str, float]]) -> None:
    """A number says whose result arrives, counted back from the last permit: most are late. Each arrives once."""
    breaker, oracle, now = Breaker(LIMITS), Oracle(LIMITS), 0.0
    permits: list[Permit] = []
    reported: set[int] = set()
    for what, number in sequence:
        if what == "wait":
            now += number
        elif what == "ask":
            refuses = breaker.refusal_s(now) is not None
            permit = breaker.allows(now)
            assert (permit is None) == refuses == (not oracle.ask(now))
            permits += [permit] if permit is not None else []
        elif (index := len(permits) - 1 - max(0, int(number))) >= 0 and index not in reported:
            reported.add(index)
            match what:
                case "succeeded":
                    breaker.succeeded(permits[index], now)
                case "failed":
                    breaker.failed(permits[index], now)
                case _:
                    breaker.dropped(permits[index])
            oracle.report(index, what, now)
        assert phase(breaker) == oracle.phase
    for _ in range(3):  # whatever happened: a peer that answers is asked again
        now += 61.0
        succeed(breaker, now)
    assert phase(breaker) is Phase.CLOSED
