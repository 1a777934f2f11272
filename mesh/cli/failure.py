"""What a command raises when it cannot do its work: the cause, and what the user can do about it."""

from __future__ import annotations

from typing import Any

from mesh.errors import MeshError

OK = 0
FAILED = 1
USAGE = 2
#: What shells report for a process that SIGINT ended.
INTERRUPTED = 130


class CliError(MeshError):
    """A command failed. *fix* is the next thing to try, as a full sentence.

    *http_status* is what a node answered, and *answer* the JSON that came with it.
    """

    type = "cli_error"

    def __init__(
        self,
        message: str,
        *,
        fix: str | None = None,
        exit_code: int = FAILED,
        http_status: int | None = None,
        answer: Any = None,
    ) -> None:
        super().__init__(message)
        self.fix = fix
        self.exit_code = exit_code
        self.http_status = http_status
        self.answer = answer
