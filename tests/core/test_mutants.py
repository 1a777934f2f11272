"""Proof that the tests of the scheduler and the placement can fail: every planted bug is caught by something."""

from __future__ import annotations

import pytest

from tests.core.catching import caught_by
from tests.core.mutants import MUTANTS, Mutant
from tests.core.subject import broken


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.breaks.replace(" ", "-"))
def test_a_planted_bug_is_caught(mutant: Mutant) -> None:
    assert caught_by(broken(mutant)) is not None


def test_the_edited_copies_behave_like_the_original() -> None:
    """Else everything would be caught for no reason."""
    assert caught_by(broken(Mutant("world.py", "class Vet:", "class Vet:", "nothing"))) is None
