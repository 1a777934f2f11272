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
from dataclasses import dataclass
from enum import Enum
from math import inf

from mesh.core.gossip_message import Message
from mesh.core.gossip_record import MAX_PAYLOAD_BYTES, Age, Record
from mesh.core.membership_exchange import Exchanges, Records, shuffle
from mesh.core.membership_member import MIN_PROBES, Change, Event, Member, MemberView, Status, Tuning
from mesh.core.membership_table import Owner, Table
from mesh.core.node_state import PeerKey


class Kind(Enum):
    TICK = "tick"  # a full exchange, in turn
    PROBE = "probe"  # does it live?
    NEWS = "news"  # what is urgent, and nothing else


@dataclass(frozen=True, slots=True)
class News:
    """Of whom an urgent message is, and whether it carries the record or only mentions it: later rounds of the same
    news mostly meet those who have it."""

    key: PeerKey
    age: Age
    carried: bool


@dataclass(frozen=True, slots=True)
class Order:
    """Exchange with *key* now; ``None`` is a contact, whoever that turns out to be."""

    key: PeerKey | None
    kind: Kind
    incarnation: int
    started_at: float
    about: tuple[News, ...] = ()


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
        self._news_at = now
        self._news_left = self.tuning.urgent_burst
        self._news_waits = True  #: urgent news may find somebody to tell
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

    # --- when and with whom

    def next_deadline(self) -> float:
        """Return when to call ``due`` next, if nothing else happens before."""
        if self.has_left:
            return inf
        at = min(self._tick_at, self._catch_up_at)
        if self._news_waits and self._table.records.urgent:
            at = min(at, self._news_at)
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
        self._news_waits = True
        if now >= self._tick_at:
            orders += self._tick(now)
        if now >= self._catch_up_at:
            self._catch_up_at = inf
            orders += [self._order(member, Kind.TICK, now) for member in self._next_turns(1, now)]
        orders += self._probes(now)
        orders += self._news(now)
        return orders

    def farewell(self, number: int, now: float) -> list[Order]:
        """Return orders to tell a few others the goodbye that ``leave`` made."""
        members = [m for m in self._table.members.values() if m.status is Status.ALIVE]
        shuffle(members, self._random)
        about = (News(self.own.key, self.own.age, carried=True),)
        return [self._order(member, Kind.NEWS, now, about) for member in members[:number]]

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
        if dead and self._random() * tuning.dead_retry_ticks < 1:
            members.append(dead[int(self._random() * len(dead))])
        return [self._order(member, Kind.TICK, now) for member in members]

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
                orders.append(self._order(member, Kind.PROBE, now))
        return orders

    def _news(self, now: float) -> list[Order]:
        """Send what is urgent to a few who may not know it, at most every ``urgent_gap_s``."""
        tuning = self.tuning
        urgent = self._table.records.urgent
        if not urgent or now < self._news_at:
            return []
        self._news_left = min(tuning.urgent_burst, self._news_left + (now - self._news_at) / tuning.urgent_refill_s)
        if self._news_left < 1:
            self._news_at = now + tuning.urgent_refill_s
            return []
        members = self._table.members
        ready = [key for key, m in members.items() if m.status is Status.ALIVE and m.avoid_until <= now]
        ready = [key for key in ready if any(key not in rumour.told for rumour in urgent.values())]
        if not ready:  # a newcomer that knows nobody yet keeps its news
            self._news_waits = False
            return []
        self._news_left -= 1
        self._news_at = now + tuning.urgent_gap_s
        picks = min(tuning.urgent_fanout, len(ready))
        chosen = [ready.pop(int(self._random() * len(ready))) for _ in range(picks)]
        orders = [self._order(members[key], Kind.NEWS, now, self._untold(key)) for key in chosen]
        self._table.records.round_sent()
        return orders

    def _untold(self, key: PeerKey) -> tuple[News, ...]:
        """Return the urgent news that *key* lacks; it counts as told from now on."""
        records = self._table.records
        first = self.tuning.urgent_rounds
        untold = [(about, rumour) for about, rumour in records.urgent.items() if key not in rumour.told]
        news = [News(about, rumour.age, rumour.urgent_rounds >= first) for about, rumour in untold]
        for about, _ in untold:
            records.sent(about, key)
        return tuple(news)

    def _order(self, member: Member, kind: Kind, now: float, about: tuple[News, ...] = ()) -> Order:
        member.pending += 1
        return Order(member.record.key, kind, member.record.age[0], now, about)

    # --- exchanges

    def request(self, order: Order) -> Message:
        """Return what to send for *order*, as of now."""
        if order.key is not None and order.kind is Kind.PROBE:
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
        self._settled(order)
        return self._take_answer(peer, message, records, now)

    def concluded(self, peer: PeerKey, message: Message, records: Records, now: float) -> None:
        """Take the answer to a follow-up. What is still missing has its turn in another exchange."""
        self._take_answer(peer, message, records, now)

    def failed(self, order: Order, now: float) -> None:
        member = self._settled(order)
        if order.key is not None:
            for news in order.about:
                self._table.records.missed(order.key, news.key, news.age)
        if member is None or member.record.age[0] != order.incarnation or member.heard_at > order.started_at:
            return
        self._table.failed(member, order.started_at, now)

    def abandoned(self, order: Order) -> None:
        """The exchange was not made or its outcome says nothing of the peer."""
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
