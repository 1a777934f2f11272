"""Says once per source that its links fail, and once that they work again: a flood of attempts is no flood of lines."""

from __future__ import annotations

import re

from mesh.logs import Log
from mesh.net.rate_limit import Rate, RateLimiter

_log = Log(__name__)

_MAX_SOURCES = 1024
_MAX_REASONS = 8  # that one source is heard with before it succeeds
_MAX_EXCUSED = 64
_MAPPED = re.compile(r"\[::ffff:([0-9.]+)\]")  # an IPv4 address as a socket for both kinds has it
_LINES = Rate(per_s=1.0, burst=20)  # over all sources: who has many addresses makes no flood either


class FailureLog:
    """What was said about each source; the one that failed first is forgotten when there are too many."""

    def __init__(self) -> None:
        self._failing: dict[str, set[str]] = {}  # reasons by source
        self._excused: dict[str, None] = {}  # addresses of single connections; the latest last
        self._lines = RateLimiter(_LINES)

    def excuse(self, address: str) -> None:
        """Say nothing of the connection from *address*: this node dialled itself, and knows at the other end."""
        self._excused[_MAPPED.sub(r"\1", address)] = None
        if len(self._excused) > _MAX_EXCUSED:
            del self._excused[next(iter(self._excused))]

    def failed(self, source: str, address: str, reason: str, now: float) -> None:
        if self._excused.pop(_MAPPED.sub(r"\1", address), self) is None:
            return
        reasons = self._failing.setdefault(source, set())
        if len(self._failing) > _MAX_SOURCES:
            del self._failing[next(iter(self._failing))]
        if reason in reasons or len(reasons) >= _MAX_REASONS:
            return
        reasons.add(reason)
        if self._lines.allow("", now):
            _log.warning("a peer's link was refused or failed; said once until it works", peer=address, reason=reason)

    def worked(self, source: str, address: str) -> None:
        if self._failing.pop(source, None):
            _log.info("links from this peer work again", peer=address)
