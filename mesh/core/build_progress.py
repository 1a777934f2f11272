"""How far a build is, read from what git, cmake, ninja and make print. Pure.

These lines are for people and change with versions: one that is not understood is no progress, and never an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: "Receiving objects:  45% (123/456), 1.20 MiB | 2 MiB/s"; "remote: Compressing objects: 100% (3/3), done."
_GIT = re.compile(
    r"(?:remote: )?(?P<what>[A-Z][a-z]+(?: [a-z]+)?):\s+\d{1,3}% \((?P<done>\d{1,12})/(?P<total>\d{1,12})\)"
)
#: "remote: Enumerating objects: 42, done.": git is alive, but does not say how far it is
_GIT_COUNTS = re.compile(r"(?:remote: )?[A-Z][a-z]+ [a-z]+: \d+(?:, done\.)?\s*$")
_NINJA = re.compile(r"\[(?P<done>\d{1,9})/(?P<total>\d{1,9})\]")
_MAKE = re.compile(r"\[ {0,2}(?P<percent>\d{1,3})%\]")
#: cmake says when its three parts are over, and nothing in between
_CMAKE = ("-- Configuring done", "-- Generating done", "-- Build files have been written")


@dataclass(frozen=True, slots=True)
class Progress:
    done: int
    total: int


def parse(line: str) -> Progress | None:
    """Return how far the tool that printed *line* says it is; None if it does not."""
    if found := _NINJA.match(line) or _GIT.match(line):
        return _sane(int(found["done"]), int(found["total"]))
    if found := _MAKE.match(line):
        return _sane(int(found["percent"]), 100)
    return next((Progress(i, len(_CMAKE)) for i, text in enumerate(_CMAKE, 1) if line.startswith(text)), None)


def is_transient(line: str) -> bool:
    """Whether git would have written the next line over *line*: no use to anybody who reads a log."""
    return bool(_GIT.match(line) or _GIT_COUNTS.match(line))


def advance(previous: Progress | None, new: Progress) -> Progress:
    """Return what to show: a build within the build counts its own few steps, and those say nothing of the whole."""
    return previous if previous is not None and new.total * 2 < previous.total else new


def _sane(done: int, total: int) -> Progress | None:
    return Progress(done, total) if 0 <= done <= total and total > 0 else None
