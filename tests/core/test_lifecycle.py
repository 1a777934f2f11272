"""The instance's life: every pair is decided once, every life ends, and memory is released by the exit alone."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.lifecycle import IGNORED, TRANSITIONS, Effect, Event, IllegalTransitionError, State, step


def test_every_pair_is_decided_exactly_once_and_one_of_them_is_a_bug() -> None:
    undecided = [p for p in product(State, Event) if p not in TRANSITIONS and p not in IGNORED]
    assert undecided == [(State.STOPPED, Event.EXITED)]
    assert not IGNORED & set(TRANSITIONS)


def test_a_bug_is_told_with_the_story() -> None:
    with pytest.raises(IllegalTransitionError, match="exited in state stopped; story: spawning\\+healthy"):
        step(State.STOPPED, Event.EXITED, ("spawning+healthy",))


@given(st.lists(st.sampled_from(list(Event))))
def test_memory_is_released_once_and_only_by_the_exit(events: list[Event]) -> None:
    state, released = State.SPAWNING, 0
    for event in events:
        if (state, event) == (State.STOPPED, Event.EXITED):
            continue  # a process exits once
        state, effects = step(state, event)
        released += effects.count(Effect.RELEASE)
        assert (Effect.RELEASE in effects) == (event is Event.EXITED)
    assert released == (state is State.STOPPED)


@pytest.mark.parametrize("start", [s for s in State if s is not State.STOPPED])
def test_each_state_can_reach_the_end(start: State) -> None:
    seen, frontier = {start}, [start]
    while frontier:
        state = frontier.pop()
        new = {target for (source, _), (target, _) in TRANSITIONS.items() if source is state} - seen
        seen |= new
        frontier += new
    assert State.STOPPED in seen
