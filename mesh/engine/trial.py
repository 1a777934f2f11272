"""Use one instance for a while, as a request does: a profile's own, or one of the same profile with another binary.

With a binary of its own, the instance belongs to a *hidden* profile: no client can ask for it, but it goes through the
same queue, budget and evictions as every other, and it is gone when the trial is over, however that ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Final, Protocol

from mesh.config.profile import Profile
from mesh.engine.instances import ActiveLease
from mesh.engine.lease import Admission, Lease
from mesh.errors import CapacityError, MeshError
from mesh.tasks import spawn

#: How long a trial waits for room and the load: a hidden one always, others if requests would wait for ever.
LONGEST_WAIT_S: Final = 600.0
#: How often is asked whether a trial is in the way of requests.
ASK_EVERY_S: Final = 0.5


class DisplacedError(CapacityError):
    """The trial had to end: requests need the place."""

    type = "displaced"


class House(Admission, Protocol):
    """What a trial needs of the supervisor."""

    async def hide(self, profile: Profile) -> None:
        """Know *profile* beside the catalog, from now on; wait until no other is hidden."""

    async def forget(self, profile: Profile) -> None:
        """Drain its instances, wait for their exits, and know it no longer."""


@dataclass(slots=True)
class Guest:
    """Waits for an instance; nobody else does: a node that stops need not let it in."""

    only_looks: ClassVar[bool] = False
    lease: asyncio.Future[Lease]

    def admitted(self, lease: Lease) -> None:
        if self.lease.done():  # it has left
            lease.release()
        else:
            self.lease.set_result(lease)

    def refused(self, error: MeshError) -> None:
        if not self.lease.done():
            self.lease.set_exception(error)


@asynccontextmanager
async def visit(house: House, profile: Profile) -> AsyncIterator[ActiveLease]:
    """Hold a place in an instance of *profile*. Raise the refusal (a ``MeshError``) if there is none in time."""
    loop = asyncio.get_running_loop()
    guest, now = Guest(loop.create_future()), loop.time()
    limit_s = LONGEST_WAIT_S if profile.engine_path else 0.0  # its load is no queue
    deadline = now + max(limit_s, profile.max_wait_s or LONGEST_WAIT_S)
    ticket = house.submit(profile, guest, since=now, deadline=deadline)
    try:
        lease = await guest.lease
        assert isinstance(lease, ActiveLease), "the supervisor gives no others"
    except BaseException:
        ticket.cancel()
        if guest.lease.done() and not guest.lease.cancelled() and guest.lease.exception() is None:
            guest.lease.result().release()  # it was let in and cancelled in the same moment
        raise
    try:
        yield lease
    except BaseException:
        lease.abandon()  # a request may have been cut off: its slot counts until the child has noticed
        raise
    else:
        lease.release()


@asynccontextmanager
async def stay(house: House, profile: Profile) -> AsyncIterator[ActiveLease]:
    """As ``visit``, for a hidden profile: when it ends, in whichever way, no process of it is left."""
    await house.hide(profile)
    try:
        async with visit(house, profile) as lease:
            yield lease
    finally:
        await asyncio.shield(spawn(house.forget(profile), f"end of the trial of {profile.id}"))


@asynccontextmanager
async def while_not(unwelcome: Callable[[], bool]) -> AsyncIterator[None]:
    """Cancel what is done inside once *unwelcome*, and raise ``DisplacedError`` for it."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as limit:

            async def ask() -> None:
                times = 0
                while times < 2:  # once may be before the next plan
                    await asyncio.sleep(ASK_EVERY_S)
                    times = times + 1 if unwelcome() else 0
                limit.reschedule(loop.time())

            asking = spawn(ask(), "is the trial in the way")
            try:
                yield
            finally:
                asking.cancel()
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DisplacedError("requests wait for this model, so the trial made way for them") from error


def hidden(profile: Profile, binary: Path) -> Profile:
    """Return *profile* as it is run with *binary*, under a name that no client can ask for."""
    return replace(profile, key=f"{profile.key}#canary", id=f"{profile.id} (canary)", engine_path=str(binary),
                   aliases=(), pinned=False, max_instances=1)  # fmt: skip
