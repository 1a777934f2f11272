"""Directories of children: private, gone with them, and cleared away after a node that was killed."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.errors import InstanceError
from mesh.host.scratch import FORGOTTEN_S, Leftovers, Scratch

#: takes a directory, fills it and dies as under ``kill -9``
DIES = """
import os, sys
from pathlib import Path
from mesh.host.scratch import Scratch
taken = Scratch(Path(sys.argv[1])).take("m-1")
(taken / "upload.wav").write_bytes(b"x")
print(taken)
sys.stdout.flush()
if sys.argv[2] == "die":
    os.kill(os.getpid(), 9)
sys.stdin.read()
"""


def test_each_is_empty_private_and_new(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "s")
    one, other = scratch.take("m-1"), scratch.take("m-1")
    assert one != other
    assert list(one.iterdir()) == []
    assert stat.S_IMODE(one.stat().st_mode) == stat.S_IMODE(one.parent.stat().st_mode) == 0o700
    (one / "left").write_text("x")
    scratch.give_back(one)
    scratch.give_back(one)
    assert not one.exists()
    assert other.exists()
    scratch.close()
    scratch.close()
    assert list(tmp_path.iterdir()) == []
    assert scratch.take("m-2").is_dir(), "it begins anew"
    scratch.close()


def test_what_a_killed_node_left_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    root = tmp_path / "s"
    dead = subprocess.run([sys.executable, "-c", DIES, root, "die"], capture_output=True, text=True, check=False)
    left = Path(dead.stdout.strip())
    assert (left / "upload.wav").exists()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", DIES, root, "live"], **pipes) as living:  # type: ignore[call-overload]
        theirs = Path(living.stdout.readline().strip())
        own = Scratch(root)
        mine = own.take("m-2")
        own.clear()
        assert not left.exists()
        assert theirs.is_dir()
        assert mine.is_dir()
        own.close()
        assert theirs.is_dir()
        living.stdin.close()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_a_request_left_goes_once_it_is_over_and_no_sooner(tmp_path: Path) -> None:
    left = Leftovers(tmp_path)
    number = left.begin()
    (tmp_path / "a.wav").write_bytes(b"x")
    left.clear()
    assert names(tmp_path) == ["a.wav"]
    left.end(number)
    left.end(number)
    left.clear()
    assert names(tmp_path) == []


def test_the_next_request_keeps_its_files_whatever_they_are_called(tmp_path: Path) -> None:
    left = Leftovers(tmp_path)
    left.end(left.begin())
    (tmp_path / "a.wav").write_bytes(b"x")  # as it may for a client that left
    left.clear()
    number = left.begin()
    (tmp_path / "a.wav").write_bytes(b"y")
    left.clear()
    assert names(tmp_path) == ["a.wav"]
    left.end(number)
    left.clear()
    assert names(tmp_path) == []


def test_where_one_request_follows_at_once_on_another_nothing_gathers(tmp_path: Path) -> None:
    """It is never looked while none goes on."""
    left, before = Leftovers(tmp_path), 0
    for number in range(1, 10):
        assert left.begin() == number
        left.end(before)
        left.clear()
        assert len(names(tmp_path)) <= 1, "it saw none of those before the last"
        (tmp_path / f"{number}.wav").write_bytes(b"x")
        before = number


def test_a_request_that_goes_on_for_long_keeps_what_came_after_it_and_not_what_was_before(tmp_path: Path) -> None:
    left = Leftovers(tmp_path)
    left.end(left.begin())
    (tmp_path / "before.wav").write_bytes(b"x")
    left.clear()
    assert names(tmp_path) == []
    long = left.begin()
    (tmp_path / "long.wav").write_bytes(b"x")
    left.end(left.begin())
    (tmp_path / "short.wav").write_bytes(b"x")
    left.clear()
    assert names(tmp_path) == ["long.wav", "short.wav"], "it cannot be told whose they are"
    left.end(long)
    left.clear()
    assert names(tmp_path) == []


def test_a_request_that_begins_while_it_is_looked_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, real = Leftovers(tmp_path), os.listdir
    left.end(left.begin())

    def listed(directory: Path) -> list[str]:
        left.begin()
        (tmp_path / "new.wav").write_bytes(b"x")
        return real(directory)

    (tmp_path / "old.wav").write_bytes(b"x")
    monkeypatch.setattr(os, "listdir", listed)
    left.clear()
    monkeypatch.undo()
    assert "new.wav" in names(tmp_path)


def test_what_cannot_be_removed_is_told_once_and_hinders_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = Leftovers(tmp_path)
    (tmp_path / "directory").mkdir()
    (tmp_path / "a.wav").write_bytes(b"x")
    for _ in range(3):
        left.clear()
    assert names(tmp_path) == ["directory"]
    (told,) = caplog.records
    assert told.getMessage().startswith("what a request left behind cannot be removed")
    (tmp_path / "directory").rmdir()
    (tmp_path / "b.wav").write_bytes(b"x")
    left.clear()
    assert names(tmp_path) == []
    Leftovers(tmp_path / "gone").clear()
    Leftovers(tmp_path / ("x" * 300)).clear()
    assert len(caplog.records) == 2


def test_one_in_a_directory_of_everybody_is_private(tmp_path: Path) -> None:
    scratch = Scratch.below(tmp_path)
    own = scratch.take("m-1")
    assert own.parents[1] == tmp_path / f"llama-mesh-scratch-{os.getuid()}"
    assert stat.S_IMODE(own.parents[1].stat().st_mode) == 0o700
    scratch.close()
    assert names(tmp_path) == []


def test_nothing_is_cleared_where_there_is_nothing(tmp_path: Path) -> None:
    Scratch(tmp_path / "none").clear()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_taken_away_comes_back(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "s")
    first = scratch.take("a")
    Scratch.give_back(scratch, first.parent)
    assert scratch.take("b").is_dir()
    scratch.close()


def test_what_is_put_away_has_another_name_at_once(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "s")
    own = scratch.take("m-1")
    (own / "upload.wav").write_text("x")
    left = scratch.put_away(own)
    assert not own.exists()
    assert ((left / "upload.wav").exists(), left.parent) == (True, own.parent), "so that it goes with the node"
    assert scratch.put_away(own) == own, "there is none any more"
    scratch.give_back(left)
    assert not left.exists()
    scratch.close()


def test_another_that_starts_removes_no_directory_that_is_just_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that starts at that very moment takes every lock that is free."""
    real = fcntl.flock

    def after_another_started(lock: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        Scratch(tmp_path / "s").clear()
        real(lock, operation)

    monkeypatch.setattr(fcntl, "flock", after_another_started)
    scratch = Scratch(tmp_path / "s")
    assert scratch.take("m-1").is_dir()
    scratch.close()
    assert list(tmp_path.iterdir()) == []


def test_what_was_half_made_or_half_removed_is_cleared(tmp_path: Path) -> None:
    for name in ("node-removed", ".new-old", ".new-young", "notes"):
        (tmp_path / name).mkdir()
    then = (tmp_path / ".new-old").stat().st_mtime - FORGOTTEN_S - 1
    os.utime(tmp_path / ".new-old", (then, then))
    Scratch(tmp_path).clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new-young", "notes"]


def test_where_others_may_write_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o770)
    with pytest.raises(InstanceError, match=f"others may write there; run: chmod 700 {tmp_path}/s"):
        Scratch(tmp_path / "s").take("a")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "s").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InstanceError, match="or is a link"):
        Scratch(tmp_path / "s").take("a")


def test_no_room_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("a file")
    with pytest.raises(InstanceError, match=r"cannot make a directory for it, .*/s: "):
        Scratch(tmp_path / "s").take("a")
