"""A node's whole life at random: every event that a supervisor may see, in any order, and what must always hold.

``Life`` runs the plan after each event and checks every rule; at the end nothing new comes, time is given, and whatever
can be served must have been, within the bound. Hypothesis looks for the shortest life that breaks a rule; the seeded
lives are many more, since they are made in a tenth of the time.
"""

from __future__ import annotations

from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mesh.core.scheduler import plan
from tests.core.node_life import EVENTS, Life
from tests.core.worlds import Planner, make_world

seeds = st.integers(0, 10**9)


class Node(RuleBasedStateMachine):
    life: Life

    @initialize(seed=seeds)
    def start(self, seed: int) -> None:
        self.life = Life(make_world(Random(seed).randint), plan)
        self.life.settle()

    @rule(event=st.sampled_from(EVENTS), seed=seeds)
    def something_happens(self, event: str, seed: int) -> None:
        self.life.happen(event, Random(seed).randint)

    @invariant()
    def it_is_at_rest(self) -> None:
        assert plan(self.life.world).decisions == ()

    @invariant()
    def nobody_waits_for_what_is_not_there(self) -> None:
        assert {d.key for d in self.life.world.demands} <= set(self.life.world.recipes)

    def teardown(self) -> None:
        if hasattr(self, "life"):
            self.life.end()


Node.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestNode = Node.TestCase


def seeded_lives(planner: Planner, number: int, steps: int = 40) -> None:
    for seed in range(number):
        rng = Random(seed)
        life = Life(make_world(rng.randint), planner)
        life.settle()
        for _ in range(steps):
            life.happen(rng.choice(EVENTS), rng.randint)
        life.end()


def test_the_rules_hold_through_many_lives() -> None:
    seeded_lives(plan, 300)
