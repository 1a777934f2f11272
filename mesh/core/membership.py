"""Who is in the mesh: the state machine of one node. Pure: time, chance and signatures are given to it.

It decides when to exchange and with whom (``due``), what to say (``request``, ``receive``, ``answered``), and what a
failed exchange means (``failed``). The shell carries the messages, verifies signatures and asks for trust before a
record comes in here, and calls ``due`` again at ``next_deadline`` and after every other call.

Each tick it begins full exchanges with a few others, in a shuffled order, so that each has its turn. A failed one is
tried again within the tick; after several failures the member is suspected and that is told (see membership_member for
what follows). An order carries the incarnation and the time it was made for: a late failure of an old one is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

from mesh.core.gossip_message import Message
from mesh.core.gossip_record import MAX_PAYLOAD_BYTES, Record
from mesh.core.membership_exchange import Exchanges, Records, shuffle
from mesh.core.membership_member import MIN_PROBES, Change, Event, Member, MemberView, Status, Tuning
from mesh.core.membership_news import UrgentNews
from mesh.core.membership_orders import Kind, News, Order, order_for
from mesh.core.membership_table import Owner, Table
from mesh.core.node_state import PeerKey


class Membership:
    def __init__(
        self,
        key: PeerKey,
        *,
        incarnation: int,
        sign: Callable[[bytes], bytes],
        random: Callable[[], float],
        now: float,
        payload: bytes = b"",
        rotation: bytes | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self.tuning = tuning or Tuning()
        owner = Owner(key, incarnation, sign, rotation, payload)
        self._table = Table(owner, random, self.tuning)
        self._exchanges = Exchanges(self._table, random)
        self._random = random
        self._turns: list[PeerKey] = []
        self._tick_at = now + self.tuning.interval_s * random()
        self._catch_up_at = inf
        self._news = UrgentNews(self._table, random, now)
        self._asked: dict[PeerKey, None] = {}  #: to be probed beside all plans
        self._probes_left = self.tuning.probes_per_tick

    # --- looking

    @property
    def own(self) -> Record:
        return self._table.owner.record

    @property
    def has_left(self) -> bool:
        return self._table.owner.left

    @property
    def size(self) -> int:
        """How many live, this node included."""
        return self._table.size

    @property
    def known(self) -> int:
        """How many others, tombstones included."""
        return len(self._table.members)

    @property
    def digest(self) -> bytes:
        """Return a summary of who lives in which version: equal on two nodes that know the same."""
        return self._table.digest()

    def view(self, key: PeerKey) -> MemberView | None:
        member = self._table.members.get(key)
        return member.view() if member is not None else None

    def views(self) -> Mapping[PeerKey, MemberView]:
        """Return the others; those that said goodbye are gone."""
        return {k: m.view() for k, m in self._table.members.items() if m.status is not Status.LEFT}

    def is_news(self, record: Record) -> bool:
        return self._table.is_news(record)

    def take_events(self) -> list[Event]:
        events, self._table.events = self._table.events, []
        return events

    # --- what the node itself does

    def publish(self, payload: bytes, *, urgent: bool) -> None:
        """Take the node's new state; raise ``ValueError`` if it is too large. Without *urgent* the next tick makes
        it known, and several changes until then are one."""
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"a node's state of {len(payload)} bytes; {MAX_PAYLOAD_BYTES} is the limit")
        owner = self._table.owner
        if owner.left or (payload == owner.payload and not (urgent and self._table.own_changed)):
            return
        owner.payload = payload
        self._table.own_changed = True
        if urgent:
            self._table.publish(urgent=True)

    def leave(self) -> None:
        """Say goodbye: the last record of this life. Nothing is contradicted from here on."""
        if not self._table.owner.left:
            self._table.owner.left = True
            self._table.publish(urgent=True)

    def forget(self, key: PeerKey, now: float) -> None:
        """Drop *key* (revoked, or rotated away) and do not ask for it again soon."""
        self._table.forget(key)
        self._table.refuse(key, now)

    def refuse(self, key: PeerKey, now: float) -> None:
        """A record of *key* was not trusted or not genuine."""
        self._table.refuse(key, now)

    def heard(self, key: PeerKey, now: float) -> None:
        """*key* gave a sign of life, of whatever kind."""
        self._table.heard(key, now)

    def ask(self, key: PeerKey) -> None:
        """Probe *key* with the next orders, if it counts as a member and nothing is on its way to it.

        It is evidence, but changes no plan: it must not use up the tries of a suspicion before their time, nor end the
        rest of somebody who is out of reach from here. So many at a time; the rest has to be asked for again.
        """
        if len(self._asked) < self.tuning.probes_per_tick:
            self._asked[key] = None

    # --- when and with whom

    def next_deadline(self) -> float:
        """Return when to call ``due`` next, if nothing else happens before."""
        if self.has_left:
            return inf
        at = min(self._tick_at, self._catch_up_at, self._news.deadline())
        for member in self._table.watched.values():
            if not member.pending and self._probes_left:
                at = min(at, member.deadline, member.retry_at)
            elif not member.pending and member.failures >= MIN_PROBES:
                at = min(at, member.deadline)
        return at

    def due(self, now: float) -> list[Order]:
        """Return the exchanges to begin now. Each must come back as ``answered`` or ``failed``."""
        orders: list[Order] = []
        if self.has_left:
            return []
        if now >= self._tick_at:
            orders += self._tick(now)
        if now >= self._catch_up_at:
            self._catch_up_at = inf
            orders += [order_for(member, Kind.TICK, now) for member in self._next_turns(1, now)]
        orders += self._probes(now)
        orders += self._asked_for(now)
        orders += self._news.due(now)
        return orders

    def farewell(self, number: int, now: float) -> list[Order]:
        """Return orders to tell a few others the goodbye that ``leave`` made."""
        members = [m for m in self._table.members.values() if m.status is Status.ALIVE]
        shuffle(members, self._random)
        about = (News(self.own.key, self.own.age, carried=True),)
        return [order_for(member, Kind.NEWS, now, about) for member in members[:number]]

    def contact(self, now: float) -> Order:
        """Return the order for an exchange with somebody of whom only an address is known."""
        return Order(None, Kind.TICK, 0, now)

    def _tick(self, now: float) -> list[Order]:
        tuning = self.tuning
        self._tick_at = now + tuning.interval_s * (0.9 + 0.2 * self._random())  # or all would tick together
        self._probes_left = tuning.probes_per_tick
        self._table.expire(now)
        self._table.catch_up_own(now)
        members = self._next_turns(tuning.fanout, now)
        dead = [m for m in self._table.graves.values() if m.status is Status.DEAD and not m.pending]
        alone = self._table.size == 1  # cut off, most likely: nobody else would find out that it is over
        if dead and (alone or self._random() * tuning.dead_retry_ticks < 1):
            members.append(dead[int(self._random() * len(dead))])
        return [order_for(member, Kind.TICK, now) for member in members]

    def _next_turns(self, number: int, now: float) -> list[Member]:
        """Return the members whose turn it is: a shuffled round over all, then the next."""
        chosen: list[Member] = []
        for _ in range(len(self._turns) + 1):
            if len(chosen) >= number:
                break
            if not self._turns:
                self._turns = [key for key, member in self._table.members.items() if member.here]
                shuffle(self._turns, self._random)
                if not self._turns:
                    break
            member = self._table.members.get(self._turns.pop())
            if member is not None and self._may_have_turn(member, now) and member not in chosen:
                chosen.append(member)
        return chosen

    def _may_have_turn(self, member: Member, now: float) -> bool:
        return member.status is Status.ALIVE and not member.pending and member.avoid_until <= now

    def _probes(self, now: float) -> list[Order]:
        """Judge suspects whose time is over; try again whoever did not answer."""
        orders = []
        for member in list(self._table.watched.values()):
            if member.expired(now):
                self._table.bury(member, now)
            elif min(member.retry_at, member.deadline) <= now and not member.pending and self._probes_left:
                self._probes_left -= 1
                orders.append(order_for(member, Kind.PROBE, now))
        return orders

    def _asked_for(self, now: float) -> list[Order]:
        asked = [self._table.members.get(key) for key in self._asked]
        self._asked.clear()
        return [order_for(m, Kind.ASKED, now) for m in asked if m is not None and m.here and not m.pending]

    # --- exchanges

    def request(self, order: Order) -> Message:
        """Return what to send for *order*, as of now."""
        if order.key is not None and order.kind in (Kind.PROBE, Kind.ASKED):
            return self._exchanges.probe(order.key)
        if order.kind is Kind.NEWS:
            carried = [news.key for news in order.about if news.carried]
            return self._exchanges.news(carried, [news.key for news in order.about if not news.carried])
        return self._exchanges.request(order.key)

    def receive(self, peer: PeerKey, message: Message, records: Records, now: float) -> Message:
        """Return the answer to *peer*. *records* are those of *message* that are verified, or no news."""
        self._table.heard(peer, now)
        answer = self._exchanges.answer(peer, message, records, now)
        self._table.heard(peer, now)  # it may have become known just now
        return answer

    def answered(self, order: Order, peer: PeerKey, message: Message, records: Records, now: float) -> Message | None:
        """Take the answer to *order*'s request; return a follow-up to send to the same peer, if there is one."""
        self._news.answered(order)
        self._settled(order)
        return self._take_answer(peer, message, records, now)

    def concluded(self, peer: PeerKey, message: Message, records: Records, now: float) -> None:
        """Take the answer to a follow-up. What is still missing has its turn in another exchange."""
        self._take_answer(peer, message, records, now)

    def failed(self, order: Order, now: float) -> None:
        self._news.failed(order)
        member = self._settled(order)
        if member is None or member.record.age[0] != order.incarnation or member.heard_at > order.started_at:
            return
        if order.kind is Kind.ASKED and (member.status is Status.SUSPECT or member.avoid_until > now):
            return
        self._table.failed(member, order.started_at, now)

    def abandoned(self, order: Order) -> None:
        """The exchange was not made or its outcome says nothing of the peer."""
        self._news.failed(order)
        self._settled(order)

    def _take_answer(self, peer: PeerKey, message: Message, records: Records, now: float) -> Message | None:
        self._table.heard(peer, now)
        follow_up = self._exchanges.follow_up(peer, message, records, now)
        self._table.heard(peer, now)
        if message.more or (follow_up is not None and follow_up.more):
            self._catch_up_at = min(self._catch_up_at, now + self.tuning.catch_up_s)
        return follow_up

    def _settled(self, order: Order) -> Member | None:
        member = self._table.members.get(order.key) if order.key is not None else None
        if member is not None and member.pending:
            member.pending -= 1
        return member


__all__ = ["Change", "Event", "Kind", "MemberView", "Membership", "Order", "Status", "Tuning"]
