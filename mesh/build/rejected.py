"""The error that says: this build works for nobody, or is too slow. Raised by whoever tests it."""

from __future__ import annotations

from collections.abc import Sequence

from mesh.build.status import Comparison
from mesh.errors import BuildError


class RejectedError(BuildError):
    """A finished build failed its test or lost too much speed; it is kept out of use, and its commit is remembered.

    ``comparisons`` are what was measured before that was clear.
    """

    type = "build_rejected"

    def __init__(
        self,
        message: str,
        *,
        exit_status: int | None = None,
        log_tail: Sequence[str] = (),
        comparisons: Sequence[Comparison] = (),
    ) -> None:
        super().__init__(message, exit_status=exit_status, log_tail=log_tail)
        self.comparisons = tuple(comparisons)
