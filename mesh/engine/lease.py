"""The seam between the supervisor, which decides who is served where, and the data plane, which carries the bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from mesh.config.profile import Profile
from mesh.engine.kind import FormAdapter
from mesh.engine.kinds import kind_of
from mesh.errors import MeshError


@dataclass(slots=True, eq=False)
class Endpoint:
    """Where one instance listens. Lives exactly as long as the instance; a restart is a new endpoint (trap 26)."""

    instance_id: str
    profile: Profile
    host: str
    port: int
    api_key: str | None = None
    #: False from the moment the process exited or was told to stop: nobody may open a connection to it any more
    alive: bool = True
    #: called once each, right before SIGTERM or right after an exit: close every connection to the instance
    closers: list[Callable[[], None]] = field(default_factory=list)
    #: the data plane's connection pool for this instance; nobody else touches it
    pool: Any = None
    #: the newest lines of its log, as many as are asked for, with all that it wrote up to now
    log_tail: Callable[[int], list[str]] = lambda count: []
    #: how many lines its log has had so far: what came since is ``log_tail(log_lines() - before)``
    log_lines: Callable[[], int] = lambda: 0
    #: called right before a form is sent there; it returns what to call, once, when that request is over, however it
    #: ended: from then on the instance's files of it may go
    begin_upload: Callable[[], Callable[[], None]] = lambda: _nothing
    keeps_alive: bool = field(init=False)  #: False: one request for each connection
    adapter: FormAdapter | None = field(init=False)  #: of forms for it; None = they are passed on as they are

    def __post_init__(self) -> None:
        kind = kind_of(self.profile)
        self.keeps_alive, self.adapter = kind.keeps_alive, kind.adapter

    def close(self) -> None:
        """Refuse new connections and close the open ones. Idempotent."""
        self.alive = False
        while self.closers:
            self.closers.pop()()


def _nothing() -> None:
    """What the end of an upload calls for where it leaves nothing."""


class Target(Protocol):
    """What can be connected to: an instance's ``Endpoint``, or another node."""

    @property
    def instance_id(self) -> str: ...
    @property
    def closers(self) -> list[Callable[[], None]]: ...

    alive: bool
    pool: Any


class Lease(Protocol):
    """A request's right to use an instance, counted from the moment of the decision. Ends exactly once."""

    @property
    def endpoint(self) -> Target: ...

    def release(self) -> None:
        """The answer is complete (or the child is known to have dropped the request): its slot is free. Idempotent."""

    def abandon(self, *, streaming: bool = False) -> None:
        """The client left before the end: the upstream connection was closed, but the child may still be computing.

        The slot stays counted until the child is seen to have stopped (trap 9). *streaming* says that its answer was
        flowing, so that it notices within a token. Idempotent, and exclusive with release.
        """


class Waiter(Protocol):
    """A request that asks for an instance. Exactly one of the two is called, unless its ticket is cancelled first.

    Both may be called inside ``submit`` itself, and both must return quickly and not raise.
    """

    @property
    def only_looks(self) -> bool:
        """Whether it takes no slot and is no use of the instance either: one that is idle stays idle."""

    def admitted(self, lease: Lease) -> None:
        """An instance is ready and a place in it is taken for this request."""

    def refused(self, error: MeshError) -> None:
        """It will not be served here; *error* says why and is the answer for the client."""


class Ticket(Protocol):
    """A place in the queue."""

    def cancel(self) -> None:
        """Give the place up (the client left). Idempotent; after it neither ``Waiter`` method is called."""


class Admission(Protocol):
    """What the data plane needs of the supervisor."""

    def submit(
        self,
        profile: Profile,
        waiter: Waiter,
        *,
        since: float,
        deadline: float | None,
        needs_slot: bool = True,
    ) -> Ticket:
        """Queue *waiter* for an instance of *profile*, or admit it at once.

        *since* is the loop time at which the request first arrived: a request that is sent again after a crash keeps
        its place. *deadline* is the loop time at which it is refused with ``QueueTimeoutError``; None waits for ever.
        *needs_slot* is False for requests that only tokenize or read: they are not counted against concurrency.
        """
