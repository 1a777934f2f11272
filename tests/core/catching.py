"""What catches a planted bug: every rule, property and case of the core's tests, tried on edited functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from random import Random

from tests.core import (
    foresight,
    liveness,
    placement_rules,
    replacing_rules,
    rules,
    test_draft,
    test_replacing,
    test_scheduler,
    test_worked_case,
)
from tests.core.node_life import EVENTS, Life
from tests.core.placement_rules import seeded_cases
from tests.core.subject import Subject
from tests.core.worlds import make_world, remembering, seeded_worlds

Try = tuple[str, Callable[[], object]]


def caught_by(subject: Subject) -> str | None:
    """Return the name of what failed on *subject*, quick checks first; None if nothing did."""
    for name, check in _tries(subject):
        try:
            check()
        except Exception:  # a broken plan may also simply crash
            return name
    return None


def _tries(subject: Subject) -> Iterator[Try]:
    yield from _plans(subject, 200)
    yield from _placements(subject, 100)
    yield from _cases(subject)
    yield from _plans(subject, 2000)
    yield from _placements(subject, 1000)
    yield from _lives(subject, 40)


def _plans(subject: Subject, number: int) -> Iterator[Try]:
    wakeups, outlooks = foresight.nothing_changes_before_the_wakeup, foresight.the_outlook_is_what_the_plan_does
    for world in seeded_worlds(number):
        plan = remembering(subject.plan)
        for rule in rules.RULES:
            yield rule.__name__, partial(rule, plan, world)
        yield wakeups.__name__, partial(wakeups, plan, subject.next_wakeup, world)
        yield outlooks.__name__, partial(outlooks, subject.plan, subject.outlook, world)
    for at_last in (liveness.everything_feasible_is_served, replacing_rules.what_can_be_replaced_is):
        for world in seeded_worlds(number // 10, seed=11):
            yield at_last.__name__, partial(at_last, subject.plan, world)


def _placements(subject: Subject, number: int) -> Iterator[Try]:
    for case in seeded_cases(number):
        for rule in placement_rules.RULES:
            yield rule.__name__, partial(rule, subject.placer, case)


def _cases(subject: Subject) -> Iterator[Try]:
    """The tests that take a planner."""
    for module in (test_scheduler, test_draft, test_replacing, test_worked_case):
        for name, test in vars(module).items():
            if name.startswith("test_") and list(signature(test).parameters) == ["planner"]:
                yield name, partial(test, subject.plan)


def _lives(subject: Subject, number: int) -> Iterator[Try]:
    for seed in range(number):
        yield a_whole_life.__name__, partial(a_whole_life, subject, Random(seed))


def a_whole_life(subject: Subject, rng: Random) -> None:
    life = Life(make_world(rng.randint), subject.plan)
    for _ in range(40):
        life.happen(rng.choice(EVENTS), rng.randint)
    life.end()
