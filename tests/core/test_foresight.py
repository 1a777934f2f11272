"""What is foretold comes true, in random and in seeded worlds."""

from __future__ import annotations

from hypothesis import given, settings

from mesh.core.scheduler import next_wakeup, outlook, plan
from mesh.core.world import Snapshot
from tests.core.foresight import nothing_changes_before_the_wakeup, the_outlook_is_what_the_plan_does
from tests.core.worlds import seeded_worlds, worlds


@given(worlds())
@settings(deadline=None, max_examples=400)
def test_next_wakeup_is_in_the_future_and_no_plan_changes_before_it(w: Snapshot) -> None:
    nothing_changes_before_the_wakeup(plan, next_wakeup, w)


def test_the_outlook_is_what_the_plan_does_in_seeded_worlds() -> None:
    for w in seeded_worlds(1500, seed=5):
        the_outlook_is_what_the_plan_does(plan, outlook, w)
