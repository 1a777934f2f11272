"""Gossip on the wire: carries what ``mesh.core.membership`` orders, verifies what comes in, and tells who asked.

Exchanges are tasks of their own, at most ``max_concurrent`` of a kind at once: peers that do not answer hold up nobody
(trap 58), and when half of the mesh is gone, probes of the dead do not hold up the news. The core is called only here,
never across an ``await``. Contacts (addresses without a name yet) are tried at once when the node starts, and again
while nobody known lives there. Whatever is done after every message costs the same in a mesh of any size.
"""

from __future__ import annotations

import asyncio
import contextlib
import random as random_module
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Protocol

from mesh.core.gossip_contacts import Contact, Contacts
from mesh.core.gossip_message import Message, decode_message, encode_message
from mesh.core.gossip_record import Record
from mesh.core.membership import Change, Kind, Membership, MemberView, Order, Status, Tuning
from mesh.core.node_state import PeerIdentity, PeerKey
from mesh.errors import PeerError
from mesh.logs import Log
from mesh.net.gossip_addresses import AddressBook
from mesh.net.gossip_events import Story
from mesh.net.gossip_records import Allows, Gate, Verify
from mesh.tasks import spawn

_log = Log(__name__)

_FAREWELLS = 8
_LONGEST_SLEEP_S = 3600.0  # once it has left, nothing is due any more
#: The exchange has time limits of its own (trap 56); this one holds even if it forgets them.
_EXCHANGE_LIMIT_S = 15.0


class Identity(Protocol):
    """This node's key, and what is proven with it."""

    @property
    def key(self) -> PeerKey: ...
    @property
    def rotation(self) -> bytes | None: ...
    def sign(self, message: bytes) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to reach: *key* (whoever answers, if None) at the first of *addresses* that works."""

    key: PeerKey | None
    addresses: tuple[str, ...]


Exchange = Callable[[Target, bytes], Awaitable[tuple[PeerIdentity, bytes]]]
OnChange = Callable[[Change, MemberView], None]


class Gossip:
    """Made inside the running loop; *payload* is this node's first state, *incarnation* the wall clock's seconds."""

    def __init__(
        self,
        *,
        identity: Identity,
        payload: bytes,
        incarnation: int,
        verify: Verify,
        allows: Allows,
        exchange: Exchange,
        contacts: Callable[[], Iterable[str]],
        own_addresses: Callable[[], Iterable[str]] = tuple,
        on_change: OnChange | None = None,
        interval_s: float = 5.0,
        max_concurrent: int = 16,
        random: Callable[[], float] = random_module.random,
        tuning: Tuning | None = None,
    ) -> None:
        self._now = asyncio.get_running_loop().time
        self._key = identity.key
        self._core = Membership(
            identity.key,
            incarnation=incarnation,
            sign=identity.sign,
            random=random,
            now=self._now(),
            payload=payload,
            rotation=identity.rotation,
            tuning=tuning or Tuning(interval_s=interval_s),
        )
        self._gate = Gate(verify, allows, lambda key: self._core.view(key) is not None)
        self._exchange = exchange
        self._discovered = contacts
        self._contacts = Contacts(random)
        self._contacts_at = -inf  #: when to look at them again
        self._interval_s = self._core.tuning.interval_s
        self._own_addresses = own_addresses
        self._on_change = on_change
        self._story = Story(self._changed, lambda: self._core.own.payload)
        self._slots = {kind: asyncio.Semaphore(max_concurrent) for kind in Kind}
        self._contact_slots = asyncio.Semaphore(max_concurrent)
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._addresses = AddressBook()

    # --- for the node

    def publish(self, payload: bytes, *, urgent: bool) -> None:
        """This node's state changed. Raise ``ValueError`` if it is too large to travel."""
        self._core.publish(payload, urgent=urgent)
        self._woken()

    def members(self) -> Mapping[PeerKey, MemberView]:
        """Return the others: ALIVE, SUSPECT, and for a while the DEAD."""
        return self._core.views()

    def receive(self, peer: PeerIdentity, body: bytes) -> bytes:
        """Answer a message of *peer*; raise ``ValueError`` if it is none."""
        message = decode_message(body)
        if peer.key == self._key:  # it dialled itself, or somebody copied its key: there is nothing to learn
            return encode_message(Message())
        answer = self._core.receive(peer.key, message, self._let_in(message), self._now())
        self._woken()
        return encode_message(answer)

    def heard(self, key: PeerKey) -> None:
        """*key* gave a sign of life: on a link, in a forwarded answer."""
        self._core.heard(key, self._now())
        self._story.tell(self._core, self._now())

    def forget(self, key: PeerKey) -> None:
        """Drop *key*: revoked, or rotated away. What others still say of it passes ``allows`` first, as ever."""
        self._core.forget(key, self._now())
        self._woken()

    def probe(self, key: PeerKey) -> None:
        """Exchange with *key* at once rather than when it is its turn: somebody wants to know whether it is back."""
        self._core.ask(key)
        self._wake.set()

    def contacts_changed(self) -> None:
        """Discovery found something: look at the contacts now, not at the next tick."""
        self._contacts_at = -inf
        self._wake.set()

    async def run(self) -> None:
        """Take part until cancelled; then nothing of it is left running."""
        try:
            now = self._now()
            while True:
                self._step(now)
                deadline = self._next_deadline()
                try:
                    async with asyncio.timeout_at(deadline):
                        await self._wake.wait()
                    now = self._now()
                except TimeoutError:  # a timer may fire a hair early; what it was set for must then be due
                    now = max(deadline, self._now())
                self._wake.clear()
        finally:
            await self._cancel(self._tasks)

    async def leave(self, within_s: float = 1.0) -> None:
        """Tell a few others goodbye; if none can be reached in time, they will find out."""
        self._core.leave()
        orders = self._core.farewell(_FAREWELLS, self._now())
        tasks = {spawn(self._carry_out(order, limited=False), "goodbye") for order in orders}
        if tasks:
            await asyncio.wait(tasks, timeout=within_s)
        await self._cancel(tasks)

    # --- the loop

    def _woken(self) -> None:
        self._story.tell(self._core, self._now())
        self._wake.set()

    def _step(self, now: float) -> None:
        for order in self._core.due(now):
            self._start(self._carry_out(order), "gossip")
        self._story.tell(self._core, now)
        if now >= self._contacts_at and not self._core.has_left:
            self._look_at_contacts(now)

    def _look_at_contacts(self, now: float) -> None:
        """Try those that are due. This goes over all of them: it waits for the next that is due, or a change."""
        self._contacts.replace(self._discovered())
        own = frozenset(self._own_addresses())

        def known(address: str) -> bool:
            return address in own or self._addresses.is_taken(address)

        for contact in self._contacts.due(now, lives=self._lives, known=known):
            self._start(self._try_contact(contact), f"gossip contact {contact.address}")
        next_at = self._contacts.next_deadline(lives=self._lives, known=known)
        self._contacts_at = min(next_at, now + self._interval_s)

    def _changed(self, change: Change, view: MemberView) -> None:
        if self._addresses.changed(view):
            self._contacts_at = -inf
        if self._on_change is not None:
            self._on_change(change, view)

    def _next_deadline(self) -> float:
        contacts_at = inf if self._core.has_left else self._contacts_at
        return min(self._core.next_deadline(), contacts_at, self._now() + _LONGEST_SLEEP_S)

    def _start(self, coro: Awaitable[None], name: str) -> None:
        task = spawn(coro, name)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel(self, tasks: set[asyncio.Task[None]]) -> None:
        pending = list(tasks)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    # --- one exchange

    async def _carry_out(self, order: Order, *, limited: bool = True) -> None:
        assert order.key is not None
        async with self._slots[order.kind] if limited else contextlib.nullcontext():
            target = Target(order.key, self._addresses_of(order.key))
            try:
                await self._converse(order, target)
            except PeerError as error:
                _log.debug("gossip failed", peer=order.key.hex()[:16], error=error.message)
        self._woken()

    async def _try_contact(self, contact: Contact) -> None:
        try:
            async with self._contact_slots:
                peer = await self._converse(self._core.contact(self._now()), Target(None, (contact.address,)))
        except PeerError as error:
            if self._contacts.failed(contact, self._now()):
                _log.warning("contact cannot be reached; trying on", address=contact.address, error=error.message)
        else:
            is_self = peer.key == self._key
            if self._contacts.reached(contact, peer.key, self._now(), is_self=is_self):
                _log.info("contact reached", address=contact.address, node=peer.node_id)
        finally:
            contact.trying = False
            self._contacts_at = min(self._contacts_at, contact.retry_at)
            self._woken()

    async def _converse(self, order: Order, target: Target) -> PeerIdentity:
        """Do one exchange with its follow-up; raise ``PeerError`` if it came to nothing."""
        settled = False
        try:
            peer, answer = await self._ask(target, self._core.request(order))
            settled = True
            if peer.key == self._key:
                self._core.abandoned(order)
                return peer
            follow_up = self._core.answered(order, peer.key, answer, self._let_in(answer), self._now())
        except PeerError:
            settled = True
            self._core.failed(order, self._now())
            raise
        finally:
            if not settled:  # cancelled, or a bug: that says nothing of the peer
                self._core.abandoned(order)
        self._story.tell(self._core, self._now())
        if follow_up is not None:
            _, answer = await self._ask(Target(peer.key, target.addresses), follow_up)
            self._core.concluded(peer.key, answer, self._let_in(answer), self._now())
        return peer

    async def _ask(self, target: Target, message: Message) -> tuple[PeerIdentity, Message]:
        if not target.addresses:
            raise PeerError("no address of this peer is known")
        try:
            async with asyncio.timeout(_EXCHANGE_LIMIT_S):
                peer, body = await self._exchange(target, encode_message(message))
            answer = decode_message(body)
        except TimeoutError as error:
            raise PeerError(f"no answer for {_EXCHANGE_LIMIT_S:.0f} s") from error
        except ValueError as error:
            raise PeerError(str(error)) from error
        if target.key is not None and peer.key != target.key:
            raise PeerError(f"another node ({peer.node_id}) answers at its address")
        return peer, answer

    def _let_in(self, message: Message) -> list[tuple[Record, int]]:
        now = self._now()
        passed, untrusted = self._gate.pass_on(message, self._core.is_news, now)
        for record in untrusted:
            self._core.refuse(record.key, now)
        return passed

    # --- addresses

    def _lives(self, key: PeerKey) -> bool:
        view = self._core.view(key)
        return view is not None and view.status is Status.ALIVE

    def _addresses_of(self, key: PeerKey) -> tuple[str, ...]:
        own, view = frozenset(self._own_addresses()), self._core.view(key)
        announced = () if view is None else self._addresses.of(view)
        found = (*announced, *self._contacts.addresses_of(key))
        return tuple(dict.fromkeys(address for address in found if address not in own))
