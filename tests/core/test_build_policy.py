"""What is kept, gone back to and held."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from mesh.core.build_policy import (
    BOOT_DELAYS_S,
    MAX_HELD,
    MAX_HISTORY,
    SCHEDULED_DELAYS_S,
    Hold,
    Installed,
    OnDisk,
    hold_reason,
    remembered,
    replaced_by_hand,
    rollback_targets,
    to_prune,
    with_hold,
    without_hold,
)

A, B, C = (Installed(f"/{name}/bin/llama-server", name * 40) for name in "abc")
builds = st.lists(
    st.builds(OnDisk, st.sampled_from("abcdefghij"), st.floats(0, 100), st.booleans(), st.booleans()),
    unique_by=lambda build: build.directory,
)
names = st.sets(st.sampled_from("abcdefghij"))


def _disk(*directories: str, finished: bool = True) -> list[OnDisk]:
    return [OnDisk(name, float(age), finished) for age, name in enumerate(directories)]


def test_the_newest_stay() -> None:
    found = _disk("oldest", "older", "previous", "live", "used", "new")
    kept = {"live", "used"}
    assert to_prune(found, kept=kept, previous=None, keep=2) == ("oldest", "older")
    assert to_prune(found, kept=kept, previous="oldest", keep=1) == ("older", "previous", "new")
    assert to_prune(found, kept=kept, previous="oldest", keep=0) == ("older", "previous", "new", "oldest")
    assert to_prune(found, kept=kept, previous="oldest", keep=9) == ()


def test_half_built_ones_go_first_and_do_not_count() -> None:
    found = [*_disk("a", "b"), *_disk("half", "newer half", finished=False)]
    assert to_prune(found, kept=(), previous=None, keep=2) == ("half", "newer half")


def test_rejected_ones_push_no_good_one_out() -> None:
    rejected = [replace(build, held=True, made_at=9.0) for build in _disk("r1", "r2", "r3")]
    found = [*_disk("older", "old", "live"), *rejected]
    assert to_prune(found, kept={"live"}, previous=None, keep=2) == ("r1", "r2", "r3")
    assert to_prune(found, kept={"live"}, previous=None, keep=3) == ("r1", "r2")
    assert to_prune(found, kept={"live"}, previous="r1", keep=1) == ("r2", "r3", "older", "old")


@given(builds, names, st.none() | st.sampled_from("abcdefghij"), st.integers(0, 12))
def test_pruning(found: list[OnDisk], kept: set[str], previous: str | None, keep: int) -> None:
    doomed = to_prune(found, kept=kept, previous=previous, keep=keep)
    assert len(set(doomed)) == len(doomed)
    assert not set(doomed) & kept
    left = [build for build in found if build.directory not in doomed and build.directory not in kept]
    assert all(build.finished for build in left)
    candidates = [build for build in found if build.finished and build.directory not in kept]
    assert len(left) == min(keep, len(candidates))
    gone = [build for build in candidates if build.directory in doomed and build.directory != previous]
    rest = [build for build in left if build.directory != previous]
    assert all((not b.held, b.made_at) <= (not stays.held, stays.made_at) for b in gone for stays in rest)
    if keep and any(build.directory == previous for build in candidates):
        assert previous not in doomed


def test_history_ends_with_what_is_in_force() -> None:
    assert remembered((), None) == ()
    assert remembered((), A) == (A,)
    assert remembered((A,), B) == (A, B)
    assert remembered((A, B), B) == (A, B)
    assert remembered((A, B, C), A) == (A,), "what a rollback left is not a way back"
    long = tuple(Installed(str(number), "") for number in range(100))
    assert len(remembered(long, A)) == MAX_HISTORY
    assert remembered(long, A)[-1] == A


def test_what_ran_before() -> None:
    assert rollback_targets((), None) == rollback_targets((A,), A.binary) == ()
    assert rollback_targets((A, B), B.binary) == (A,)
    assert rollback_targets((A, B, C), C.binary) == (B, A)
    assert rollback_targets((A, B, A, C), C.binary) == (A, B)
    assert rollback_targets((A, B), A.binary) == (), "killed between the swap and its record: B was left"
    assert rollback_targets((A, B), "/by/hand") == (B, A)
    assert rollback_targets((A, B), None) == (B, A)


def test_holds() -> None:
    held = {"c1": Hold("does not compile", ("-DX=1",)), "abc1234": Hold("rolled back")}
    assert hold_reason(held, "c1", ["-DX=1"]) == "does not compile"
    assert hold_reason(held, "c1", []) is None
    assert hold_reason(held, "abc1234fffff", ["-DX=1"]) == "rolled back", "llamesh's: only the beginning is known"
    assert hold_reason(held, "other", []) is None
    assert list(without_hold(held, "abc1234fffff")) == ["c1"]


def test_holds_of_command_arguments() -> None:
    """One that was written down before there were any holds whatever they are."""
    held = {"c1": Hold("does not compile", ("-DX=1",), ("-j", "2")), "c2": Hold("does not compile", ("-DX=1",))}
    assert hold_reason(held, "c1", ["-DX=1"], ["-j", "2"]) == "does not compile"
    assert hold_reason(held, "c1", ["-DX=1"], ["-j", "4"]) is None
    assert hold_reason(held, "c1", ["-DX=1"], []) is None
    assert hold_reason(held, "c1", [], ["-j", "2"]) is None
    assert hold_reason(held, "c1", ["-DX=1"]) == "does not compile"
    assert hold_reason(held, "c2", ["-DX=1"], ["-j", "4"]) == "does not compile"


def test_what_is_held_when_somebody_chooses() -> None:
    assert replaced_by_hand(A, A.commit, B.commit) == (A.commit,)
    assert replaced_by_hand(A, C.commit, B.commit) == (A.commit, C.commit), "the branch has moved on already"
    assert replaced_by_hand(A, "", B.commit) == (A.commit,)
    assert replaced_by_hand(A, B.commit, B.commit) == (), "the branch is there: nothing would undo it"
    assert replaced_by_hand(Installed("/llameshs", B.commit[:7]), "", B.commit) == (), "the same, built anew"
    assert replaced_by_hand(Installed("/by/hand", ""), "", B.commit) == replaced_by_hand(None, "", B.commit) == ()


def test_the_oldest_holds_are_forgotten() -> None:
    held: dict[str, Hold] = {}
    for number in range(MAX_HELD + 5):
        held = with_hold(held, str(number), Hold("x"))
    held = with_hold(held, "7", Hold("again"))
    assert len(held) == MAX_HELD
    assert "4" not in held
    assert list(held)[-1] == "7"


def test_seven_attempts_at_boot_and_four_on_schedule() -> None:
    assert (len(BOOT_DELAYS_S), len(SCHEDULED_DELAYS_S)) == (6, 3)
    assert list(BOOT_DELAYS_S) == sorted(BOOT_DELAYS_S)
