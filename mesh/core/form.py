"""A multipart body by offsets: what its parts are called and where their contents are. Copies nothing. Values only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FormFile:
    """A part with a file name; its content is ``body[start:end]``."""

    name: str
    filename: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Form:
    """The parts of a body, each kind in the order in which they stood there."""

    fields: tuple[tuple[str, str], ...] = ()  #: those without a file name: name and text
    files: tuple[FormFile, ...] = ()

    def get(self, name: str) -> str | None:
        """Return the text of the last field of that name; None without one."""
        return next((text for field, text in reversed(self.fields) if field == name), None)
