"""What went wrong last, per profile, and until when it is left alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from mesh.config.profile import Catalog
from mesh.core.backoff import Failure, after_failure
from mesh.engine.instances import launch_identity


@dataclass(frozen=True, slots=True)
class FailureInfo:
    """A failure for people."""

    kind: str  #: "load", "crash" or "engine" (there is none to run)
    reason: str
    count: int  #: in a row
    retry_in_s: float  #: 0 = with the next request
    log_tail: tuple[str, ...]


#: Ports that a load may find taken, one after the other, before it has failed.
MAX_PORTS: Final = 4


class FailureBook:
    """Written by the supervisor. *clock* is event-loop time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._by_key: dict[str, Failure] = {}
        self._lost_ports: dict[str, int] = {}  #: how often in a row somebody else had the port of a load, by key

    def lost_port(self, key: str) -> bool:
        """Whether one more try, on another port, is better than a failure: somebody else took this one meanwhile."""
        self._lost_ports[key] = count = self._lost_ports.get(key, 0) + 1
        return count < MAX_PORTS

    def record(self, key: str, kind: str, reason: str, log_tail: tuple[str, ...], lived_s: float) -> Failure:
        failure = after_failure(self._by_key.get(key), kind, reason, log_tail, lived_s=lived_s, now=self._clock())
        self._by_key[key] = failure
        self._lost_ports.pop(key, None)
        return failure

    def get(self, key: str) -> Failure | None:
        return self._by_key.get(key)

    def failing(self, key: str) -> bool:
        """Whether *key* is to be left alone for now."""
        failure = self._by_key.get(key)
        return failure is not None and self._clock() < failure.retry_at

    def forget(self, key: str) -> None:
        self._by_key.pop(key, None)

    def started(self, key: str) -> None:
        """A load succeeded: earlier load failures are history. Crashes are not: it may crash again at once."""
        self._lost_ports.pop(key, None)
        if (failure := self._by_key.get(key)) is not None and failure.kind != "crash":
            del self._by_key[key]

    def forget_changed(self, old: Catalog, new: Catalog) -> set[str]:
        """Give every profile whose launch was edited a clean slate; return those and the ones that vanished."""
        changed = set()
        for key in old.names.keys() | self._by_key.keys():
            before, after = old.names.get(key), new.names.get(key)
            if after is None or before is None or launch_identity(before) != launch_identity(after):
                changed.add(key)
                self._by_key.pop(key, None)
        return changed

    def all(self) -> Mapping[str, FailureInfo]:
        now = self._clock()
        return {
            key: FailureInfo(f.kind, f.reason, f.count, max(0.0, f.retry_at - now), f.log_tail)
            for key, f in self._by_key.items()
        }
