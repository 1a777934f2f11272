"""Uploads in memory and in files without a name; nothing stays, and nobody else gets in."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mesh.api import spool
from mesh.api.spool import Spool, SpoolError, SpoolFullError, spool_directory


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("parts", [[b""], [b"a" * 10], [b"a" * 6, b"b" * 4]])
def test_what_is_small_stays_in_memory(parts: list[bytes]) -> None:
    kept = Spool(10)
    for part in parts:
        kept.write(part)
    body = kept.finish()
    assert bytes(body.view) == b"".join(parts)
    assert body.view.readonly
    assert not spool_directory().exists()


@pytest.mark.parametrize("tmpfile", [True, False])
def test_what_is_large_goes_to_a_file_without_a_name(tmpfile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not tmpfile:
        monkeypatch.delattr(os, "O_TMPFILE")
    before = open_files()
    kept = Spool(10)
    kept.write(b"a" * 9)
    kept.write(b"b" * 9)
    assert spool_directory().stat().st_mode & 0o777 == 0o700
    assert list(spool_directory().iterdir()) == []
    kept.write(b"c" * 5000)
    body = kept.finish()
    assert bytes(body.view) == b"a" * 9 + b"b" * 9 + b"c" * 5000
    assert open_files() == before + 1
    body.close()
    body.close()
    assert open_files() == before


def test_a_slice_that_is_in_use_keeps_the_body_and_no_longer() -> None:
    before = open_files()
    kept = Spool(0)
    kept.write(b"abc")
    body = kept.finish()
    part = body.view[1:]
    body.close()
    assert bytes(part) == b"bc"
    del part
    assert open_files() == before


def test_one_that_is_given_up_leaves_nothing() -> None:
    before = open_files()
    kept = Spool(0)
    kept.write(b"abc")
    kept.close()
    kept.close()
    assert open_files() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_a_507_and_leaves_nothing(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> int:
        raise OSError(code, os.strerror(code))

    before = open_files()
    kept = Spool(0)
    kept.write(b"a")
    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(SpoolError, match=str(spool_directory())) as caught:
        kept.write(b"b")
    assert (caught.value.status, isinstance(caught.value, SpoolFullError)) == (
        (500, False) if code == errno.EIO else (507, True)
    )
    assert open_files() == before


def test_too_many_open_files_are_not_the_directory_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(SpoolError, match="Too many open files; raise the limit of this node"):
        Spool(0).write(b"a")


def test_a_write_that_takes_only_a_part_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    kept = Spool(0)
    kept.write(b"0123456789" * 10)
    assert bytes(kept.finish().view) == b"0123456789" * 10


def test_a_directory_of_others_is_refused(temporary: Path) -> None:
    spool_directory().mkdir(mode=0o755)
    with pytest.raises(SpoolError, match="others may use"):
        Spool(0).write(b"a")


def test_a_directory_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = spool_directory()
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(spool, "spool_directory", lambda: directory)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(SpoolError, match="others may use"):
        Spool(0).write(b"a")


def test_links_and_files_are_refused(temporary: Path) -> None:
    (temporary / "elsewhere").mkdir(mode=0o700)
    spool_directory().symlink_to(temporary / "elsewhere")
    with pytest.raises(SpoolError, match="is not a directory"):
        Spool(0).write(b"a")
    spool_directory().unlink()
    spool_directory().write_text("")
    with pytest.raises(SpoolError, match="is not a directory"):
        Spool(0).write(b"a")
    assert list((temporary / "elsewhere").iterdir()) == []
