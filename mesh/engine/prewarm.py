"""Start a model without a request: a waiter that takes a place and gives it back at once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import ClassVar

from mesh.config.profile import Profile
from mesh.engine.lease import Admission, Lease
from mesh.errors import MeshError


@dataclass(slots=True)
class Prewarm:
    """Waits for an instance, but has nothing to be served: a node that stops need not wait for it."""

    only_looks: ClassVar[bool] = False
    ready: asyncio.Future[str]

    def admitted(self, lease: Lease) -> None:
        lease.release()
        if not self.ready.done():
            self.ready.set_result(lease.endpoint.instance_id)

    def refused(self, error: MeshError) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)


def unattended() -> Prewarm:
    """Return one whose outcome nobody asks for: it is in the log."""
    waiter = Prewarm(asyncio.get_running_loop().create_future())
    waiter.ready.add_done_callback(lambda f: f.cancelled() or f.exception())
    return waiter


async def prewarm(admission: Admission, profile: Profile, *, wait: bool, deadline: float | None) -> str | None:
    """Start *profile* unless it runs. With *wait*, return the instance's id once it is ready; else None at once.

    Raise the refusal (a ``MeshError``) if it cannot be started or is not ready by *deadline* (event-loop time). What
    is known at once is raised without *wait* too.
    """
    loop = asyncio.get_running_loop()
    waiter = Prewarm(loop.create_future())
    ticket = admission.submit(profile, waiter, since=loop.time(), deadline=deadline, needs_slot=False)
    if not wait and not waiter.ready.done():
        waiter.ready.add_done_callback(lambda f: f.cancelled() or f.exception())  # nobody asks: it is in the log
        return None
    try:
        return await waiter.ready
    finally:
        ticket.cancel()
