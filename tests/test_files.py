"""Files that are replaced whole, and files that nobody else may read: modes, races, crashes at every step."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.errors import ConfigError
from mesh.files import create_file, locked, private_directory, read_file, read_private, replace_file


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0, 0o022, 0o077], ids=["umask 0", "umask 022", "umask 077"])
def _umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_umask")
class TestModes:
    """Trap 103: exact, whatever the umask."""

    def test_of_a_new_file(self, tmp_path: Path) -> None:
        assert create_file(tmp_path / "key", b"secret")
        assert mode_of(tmp_path / "key") == 0o600

    def test_of_a_replaced_file(self, tmp_path: Path) -> None:
        path = tmp_path / "key"
        path.write_bytes(b"old")
        path.chmod(0o666)
        replace_file(path, b"secret", mode=0o600)
        assert (path.read_bytes(), mode_of(path)) == (b"secret", 0o600)

    def test_of_a_directory_and_what_is_above_it(self, tmp_path: Path) -> None:
        private_directory(tmp_path / "a/b/c")
        assert [mode_of(tmp_path / path) for path in ("a", "a/b", "a/b/c")] == [0o700] * 3

    def test_of_a_lock(self, tmp_path: Path) -> None:
        with locked(tmp_path / "key"):
            assert mode_of(tmp_path / "key.lock") == 0o600

    @pytest.mark.parametrize("write", ["create", "replace"])
    def test_at_every_moment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str) -> None:
        """Whatever is in the directory, at each system call that makes progress, is closed to others."""
        seen: list[int] = []
        for name in ("fchmod", "fsync", "link", "replace"):
            real = getattr(os, name)

            def watched(*args: object, real: object = real, **options: object) -> object:
                seen.extend(mode_of(path) for path in tmp_path.iterdir())
                return real(*args, **options)  # type: ignore[operator]

            monkeypatch.setattr(os, name, watched)
        if write == "create":
            create_file(tmp_path / "key", b"secret")
        else:
            replace_file(tmp_path / "key", b"secret", mode=0o600)
        assert len(seen) >= 3
        assert set(seen) == {0o600}


def test_a_leftover_that_somebody_has_open_does_not_get_the_secret(tmp_path: Path) -> None:
    leftover = tmp_path / "key.tmp"
    leftover.write_bytes(b"")
    leftover.chmod(0o666)
    with leftover.open("rb") as spy:
        replace_file(tmp_path / "key", b"secret", mode=0o600)
        assert spy.read() == b""


def test_a_file_that_is_there_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert create_file(path, b"first")
    assert not create_file(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_dangling_link_counts_as_a_file(tmp_path: Path) -> None:
    """It would be followed by a plain open; the key must not land where the link points."""
    (tmp_path / "key").symlink_to(tmp_path / "elsewhere")
    assert not create_file(tmp_path / "key", b"secret")
    assert not (tmp_path / "elsewhere").exists()


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "key"
    assert create_file(path, b"first")
    assert not create_file(path, b"second")
    assert (path.read_bytes(), mode_of(path)) == (b"first", 0o600)


_CRASH = """
import os, sys
from pathlib import Path
from mesh.files import create_file, replace_file
step, write, path = sys.argv[1:]
calls = 0
real = getattr(os, step)
def crash(*args, **options):
    os._exit(9)
setattr(os, step, crash)
if write == "create":
    create_file(Path(path), b"whole content")
else:
    replace_file(Path(path), b"whole content", mode=0o600)
"""


@pytest.mark.parametrize(
    ("write", "step", "expected"),
    [
        ("create", "fchmod", None),
        ("create", "fsync", None),
        ("create", "link", None),
        ("create", "unlink", b"whole content"),
        ("replace", "fchmod", b"old"),
        ("replace", "fsync", b"old"),
        ("replace", "replace", b"old"),
    ],
)
def test_a_crash_leaves_all_or_nothing(tmp_path: Path, write: str, step: str, expected: bytes | None) -> None:
    """Trap 97: the process dies at this very call; the next attempt works."""
    path = tmp_path / "key"
    if write == "replace":
        path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", _CRASH, step, write, str(path)], check=False)
    assert done.returncode == 9
    assert (path.read_bytes() if path.exists() else None) == expected
    if write == "create":
        assert create_file(path, b"second try") is (expected is None)
    else:
        replace_file(path, b"second try", mode=0o600)
        assert path.read_bytes() == b"second try"


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        create_file(tmp_path / "key", b"secret")
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "key", b"secret", mode=0o600)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_one(tmp_path: Path) -> None:
    with locked(tmp_path / "file"), (tmp_path / "file.lock").open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / "file.lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_keeps_out_others(tmp_path: Path) -> None:
    entered = threading.Event()
    order: list[str] = []

    def other() -> None:
        entered.set()
        with locked(tmp_path / "file"):
            order.append("other")

    thread = threading.Thread(target=other)
    with locked(tmp_path / "file"):
        thread.start()
        entered.wait()
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


class TestReading:
    def test_refuses_what_others_may_access(self, tmp_path: Path) -> None:
        """Trap 103. The message says what to run."""
        path = tmp_path / "key"
        path.write_bytes(b"secret")
        for mode in (0o640, 0o604, 0o620, 0o666):
            path.chmod(mode)
            with pytest.raises(ConfigError, match=rf"mode {mode:04o}\); run: chmod 600 {path}"):
                read_private(path)
        for mode in (0o600, 0o400):
            path.chmod(mode)
            assert read_private(path) == b"secret"

    def test_a_pipe_does_not_hang_and_a_directory_is_no_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe", 0o600)
        for path in (tmp_path / "pipe", tmp_path):
            with pytest.raises(ConfigError, match="cannot read"):
                read_private(path)

    def test_leaves_nothing_open(self, tmp_path: Path) -> None:
        open_before = len(os.listdir("/dev/fd"))
        for _ in range(3):
            with pytest.raises(OSError, match="not a regular file"):
                read_file(tmp_path)
        assert len(os.listdir("/dev/fd")) == open_before

    def test_what_is_absent_is_the_callers_business(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            read_private(tmp_path / "none")

    def test_has_a_limit(self, tmp_path: Path) -> None:
        (tmp_path / "big").write_bytes(b"x" * 11)
        with pytest.raises(OSError, match="larger than 10 bytes"):
            read_file(tmp_path / "big", largest=10)
        assert read_file(tmp_path / "big", largest=11)[0] == b"x" * 11


def test_a_directory_that_is_there_is_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    private_directory(tmp_path)
    assert mode_of(tmp_path) == 0o755
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        private_directory(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_writes_belongs_to_the_nodes_user(tmp_path: Path) -> None:
    """`sudo llama-mesh keys revoke` must not lock the node out of its own files."""
    directory = tmp_path / "state"
    directory.mkdir()
    os.chown(directory, 12345, 12346)
    path = directory / "known_peers"
    with locked(path):
        create_file(path, b"a")
    replace_file(path, b"b", mode=0o600)
    for file in (path, directory / "known_peers.lock"):
        assert (file.stat().st_uid, file.stat().st_gid) == (12345, 12346)
