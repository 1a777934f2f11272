"""Lines as git 2.39, cmake 3.25, ninja 1.11 and make 4.3 really print them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.build_progress import Progress, advance, is_transient, parse


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[12/345] Building CXX object src/CMakeFiles/llama.dir/llama.cpp.o", (12, 345)),
        ("[345/345] Linking CXX executable bin/llama-server", (345, 345)),
        ("[ 12%] Building C object ggml/src/CMakeFiles/ggml-base.dir/ggml.c.o", (12, 100)),
        ("[100%] Built target llama-server", (100, 100)),
        ("Receiving objects:  45% (123/456), 1.20 MiB | 2.00 MiB/s", (123, 456)),
        ("remote: Compressing objects: 100% (3/3), done.", (3, 3)),
        ("Resolving deltas:   0% (0/7)", (0, 7)),
        ("Updating files: 100% (2345/2345), done.", (2345, 2345)),
        ("-- Configuring done", (1, 3)),
        ("-- Configuring done (0.6s)", (1, 3)),
        ("-- Generating done", (2, 3)),
        ("-- Build files have been written to: /tmp/b", (3, 3)),
    ],
)
def test_progress(line: str, expected: tuple[int, int]) -> None:
    assert parse(line) == Progress(*expected)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "-- Found OpenMP: TRUE",
        "ninja: no work to do.",
        "[1/0] division",
        "[7/3] more than all",
        "[101%] more than all",
        "remote: Enumerating objects: 42, done.",
        "ptxas info    : [12/345] in the middle",
        "/x/y.cpp:12:3: warning: unused [-Wunused]",
        "[ 12 ] something",
    ],
)
def test_no_progress(line: str) -> None:
    assert parse(line) is None


def test_what_git_writes_over_itself_is_not_kept() -> None:
    assert is_transient("Receiving objects:  45% (123/456)")
    assert is_transient("remote: Enumerating objects: 42, done.")
    assert not is_transient("fatal: repository 'x' not found")
    assert not is_transient("[12/345] Building CXX object")
    assert not is_transient("Submodule path 'a': checked out '1234567'")


def test_a_build_within_the_build_does_not_set_the_bar_back() -> None:
    outer = Progress(100, 345)
    assert advance(None, outer) == outer
    assert advance(outer, Progress(1, 5)) == outer
    assert advance(outer, Progress(101, 340)) == Progress(101, 340)


@given(st.text())
def test_any_line_is_read(line: str) -> None:
    progress = parse(line)
    assert progress is None or 0 <= progress.done <= progress.total > 0
    assert is_transient(line) in (True, False)
