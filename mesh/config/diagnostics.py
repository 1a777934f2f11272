"""What a wrong configuration is reported as: every problem of every file at once, each with its place.

Never reads a file and never decides what is valid; it only carries and prints findings.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from mesh.errors import ConfigError

#: Keys and list indices from the top of a file to a value.
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong at *path*; which file and line that is, the caller knows."""

    path: KeyPath
    message: str
    other: KeyPath | None = None  #: the second place of a contradiction


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """A problem with its place. *file* is a file name as given, or the variable or flag that set the value."""

    file: str
    line: int | None
    path: str
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class ConfigErrors(ConfigError):
    """All that is wrong with the configuration, and what was remarked beside it. Nothing of it may be used."""

    def __init__(self, diagnostics: Iterable[Diagnostic], warnings: Iterable[Diagnostic] = ()) -> None:
        self.diagnostics = tuple(diagnostics)
        self.warnings = tuple(warnings)
        super().__init__("\n".join(map(str, self.diagnostics)))


def dotted(path: KeyPath) -> str:
    """Return e.g. ``models[0].profiles[1].id``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def suggestion(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ``"; did you mean 'x'?"`` if something in *known* is close to *word*, else an empty string."""
    by_fold = {name.lower().replace("-", "_"): name for name in known}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), by_fold, n=1, cutoff=cutoff)
    return f"; did you mean '{by_fold[close[0]]}'?" if close else ""
