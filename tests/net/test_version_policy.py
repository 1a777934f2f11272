"""Versions of other nodes: who takes part, and that each difference is told of once."""

from __future__ import annotations

import pytest

from mesh.net.version_policy import Action, VersionPolicy
from tests.members import key_of

ONE, TWO = key_of(1), key_of(2)
SAID = "a node has another version"


@pytest.mark.parametrize(
    ("own", "other", "rejected_by"),
    [
        ("0.5.0", "0.5.0", ""),
        ("0.5.0", "0.5.9", "any"),
        ("0.5.0", "0.6.0", "any major"),  # before 1.0 the minor version breaks things
        ("1.2.0", "1.9.9", "any"),
        ("1.2.0", "2.0.0", "any major"),
        ("0.5.0", "1.5.0", "any major"),
        ("1.2.0", "", "any major"),
        ("1.2.0", "1", "any"),
        ("0.5.0", "0.50.0", "any major"),
        ("1.2.0", "10.2.0", "any major"),
        ("1.2.0", "nonsense", "any major"),
    ],
)
def test_who_takes_part(own: str, other: str, rejected_by: str) -> None:
    actions: list[Action] = ["warn", "reject_major", "reject_any"]
    for action in actions:
        why = VersionPolicy(own, action).judge(ONE, "n", other)
        if action.removeprefix("reject_") in rejected_by.split():
            assert why == f"its version {other or '?'} is rejected (version_mismatch_action: {action})"
        else:
            assert why is None


def test_a_difference_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """trap 65: it is judged with every exchange of state, thousands of times a day."""
    policy = VersionPolicy("0.5.0", "warn")
    for _ in range(3):
        policy.judge(ONE, "n", "0.5.1")
    assert caplog.text.count(SAID) == 1
    assert caplog.records[0].__dict__["fields"]["version"] == "0.5.1"
    policy.judge(ONE, "n", "0.5.2")
    assert caplog.text.count(SAID) == 2


def test_it_is_told_again_once_it_was_over(caplog: pytest.LogCaptureFixture) -> None:
    """trap 65"""
    policy = VersionPolicy("0.5.0", "reject_any")
    policy.judge(ONE, "n", "0.5.1")
    policy.judge(ONE, "n", "0.5.0")
    policy.judge(ONE, "n", "0.5.1")
    policy.forget(ONE)
    policy.judge(ONE, "n", "0.5.1")
    assert caplog.text.count(SAID) == 3
    assert caplog.records[0].__dict__["fields"]["action"] == "gets no requests"


def test_an_old_and_a_new_key_of_one_name_do_not_take_turns(caplog: pytest.LogCaptureFixture) -> None:
    """trap 65: a node that was upgraded and got a new key is there twice until the old record expires."""
    policy = VersionPolicy("0.5.0", "warn")
    for _ in range(3):
        policy.judge(ONE, "n", "0.4.0")
        policy.judge(TWO, "n", "0.4.1")
    assert caplog.text.count(SAID) == 2


def test_the_same_version_is_not_worth_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert VersionPolicy("0.5.0", "reject_any").judge(ONE, "n", "0.5.0") is None
    assert caplog.text == ""
