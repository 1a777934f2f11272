"""Urgent news: when they go out without waiting for a tick, and to whom.

A few rounds, each to a few members that may not know; at most one per ``urgent_gap_s``, and after a burst of them one
per ``urgent_refill_s``. Who answers is told first. What is not answered soon was probably sent to somebody dead, and
after a mass failure most of it is: then one round more goes to others, a few times (else news wait for ticks).
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from mesh.core.membership_member import Member, Status
from mesh.core.membership_orders import Kind, News, Order, order_for
from mesh.core.membership_table import Table
from mesh.core.node_state import PeerKey


class UrgentNews:
    def __init__(self, table: Table, random: Callable[[], float], now: float) -> None:
        self._table = table
        self._random = random
        self._at = now  #: of the next round
        self._left = table.tuning.urgent_burst
        self._waits = True  #: it may find somebody to tell
        self._awaited: dict[Order, float] = {}  #: unanswered, and when that is late; the earliest first

    def deadline(self) -> float:
        late_at = next(iter(self._awaited.values()), inf)
        return min(late_at, self._at) if self._waits and self._table.records.urgent else late_at

    def due(self, now: float) -> list[Order]:
        """Send what is urgent to a few who may not know it."""
        self._waits = True
        for order in [order for order, late_at in self._awaited.items() if late_at <= now]:
            del self._awaited[order]
            self._again(order)
        tuning = self._table.tuning
        if not self._table.records.urgent or now < self._at:
            return []
        self._left = min(tuning.urgent_burst, self._left + (now - self._at) / tuning.urgent_refill_s)
        if self._left < 1:
            self._at = now + tuning.urgent_refill_s
            return []
        chosen = self._choose(now)
        if not chosen:  # a newcomer that knows nobody yet keeps its news
            self._waits = False
            return []
        self._left -= 1
        self._at = now + tuning.urgent_gap_s
        orders = [order_for(member, Kind.NEWS, now, self._untold(member.record.key)) for member in chosen]
        self._awaited.update(dict.fromkeys(orders, now + tuning.urgent_late_s))
        self._table.records.round_sent()
        return orders

    def answered(self, order: Order) -> None:
        self._awaited.pop(order, None)
        for news in order.about:
            self._table.records.arrived(news.key, news.age)

    def failed(self, order: Order) -> None:
        """It failed, or was never made."""
        for news in order.about:
            assert order.key is not None  # a contact is told no news
            self._table.records.missed(order.key, news.key, news.age)
        if self._awaited.pop(order, None) is not None:  # else it was late, too
            self._again(order)

    def _again(self, order: Order) -> None:
        for news in order.about:
            self._table.records.rearm(news.key, news.age)

    def _choose(self, now: float) -> list[Member]:
        """Return those to tell: by chance, but who did not answer lately only if there are not enough others."""
        urgent = self._table.records.urgent
        sure: list[Member] = []
        unsure: list[Member] = []
        for key, member in self._table.members.items():
            if member.status is not Status.ALIVE or member.avoid_until > now:
                continue
            if any(key not in rumour.told for rumour in urgent.values()):
                (unsure if member.failures or member.pending else sure).append(member)
        chosen: list[Member] = []
        for ready in (sure, unsure):
            while ready and len(chosen) < self._table.tuning.urgent_fanout:
                chosen.append(ready.pop(int(self._random() * len(ready))))
        return chosen

    def _untold(self, key: PeerKey) -> tuple[News, ...]:
        """Return the urgent news that *key* lacks. It counts as told from now on, and as a send once it is answered."""
        first = self._table.tuning.urgent_rounds
        untold = [(about, rumour) for about, rumour in self._table.records.urgent.items() if key not in rumour.told]
        for _, rumour in untold:
            rumour.told.add(key)
        return tuple(News(about, r.age, r.is_repeated or r.urgent_rounds >= first) for about, r in untold)
