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
from mesh.host.scratch import FORGOTTEN_S, Scratch

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


def test_forgotten_files_are_swept_away(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "s")
    own = scratch.take("m-1")
    for name in ("old.wav", "new.wav"):
        (own / name).write_bytes(b"x")
    then = (own / "old.wav").stat().st_mtime - FORGOTTEN_S - 1
    os.utime(own / "old.wav", (then, then))
    scratch.sweep(own)
    assert [path.name for path in own.iterdir()] == ["new.wav"]
    scratch.close()
    scratch.sweep(own)


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
