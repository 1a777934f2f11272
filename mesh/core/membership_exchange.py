"""What is said in an exchange, and what is learned from it. State is the table's; when and with whom is membership's.

    request    own stamp, digest, rumours, and to whom is held for dead: that it is
    answer     corrections; what was asked for; own rumours; for buckets that differ, who is in them
    follow-up  only if something is missing on either side: the records, or what is still wanted; answered likewise

Two nodes thus need two requests to know the same, as far as the message cap allows; "more" says that it did not.
All sides apply one rule to whatever is claimed of a member (``_compare``), so there is no order in which it must come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import TypeVar

from mesh.core.gossip_buckets import BUCKETS, is_empty
from mesh.core.gossip_message import MAX_MESSAGE_BYTES, Doubt, Draft, Heat, Message, Stamp, check_of, list_cost
from mesh.core.gossip_record import Record, ShortId
from mesh.core.gossip_rumours import EAGER_SENDS
from mesh.core.membership_member import Status
from mesh.core.membership_table import Table
from mesh.core.node_state import PeerKey

#: Of lists in one answer: a slow sweep while rumours do the work, a fast one while there is much to learn.
LIST_BYTES, LIST_BYTES_UNSETTLED = 2048, 16 * 1024
#: Kept free of records, for the lists and stamps that make the next message useful.
_RESERVE = 4096
#: A sign of life of its own that is no older than this many ticks outweighs somebody else's doubt (trap 55).
_TRUST_TICKS = 1.0

#: With their heat.
Records = Sequence[tuple[Record, int]]
T = TypeVar("T")


class Exchanges:
    def __init__(self, table: Table, random: Callable[[], float]) -> None:
        self._table = table
        self._random = random
        self._grew_at = -inf

    # --- messages

    def request(self, to: PeerKey | None) -> Message:
        """Return the beginning of a full exchange."""
        draft = self._draft(full=True)
        self._add_its_status(to, draft)
        self._add_rumours(to, draft)
        return draft.message()

    def probe(self, to: PeerKey) -> Message:
        """Return the least that shows whether *to* lives, and tells it if others should think it does not."""
        draft = self._draft(full=False)
        self._add_its_status(to, draft)
        return draft.message()

    def news(self, carried: Sequence[PeerKey], mentioned: Sequence[PeerKey]) -> Message:
        """Return what is urgent; who has gone meanwhile is left out."""
        table, draft = self._table, self._draft(full=False)
        for key in carried:
            if key == table.owner.key or key in table.members:
                draft.carry(table.held(key), Heat.URGENT)
        for key in mentioned:
            if key == table.owner.key or key in table.members:
                draft.mention(table.held(key))
        return draft.message()

    def answer(self, peer: PeerKey, message: Message, records: Records, now: float) -> Message:
        draft = self._draft(full=False)
        self._learn(peer, message, records, draft, now)
        if message.digest:
            self._add_its_status(peer, draft)
            self._add_rumours(peer, draft)
            self._resolve(message, draft, now)
        return draft.message()

    def follow_up(self, peer: PeerKey, message: Message, records: Records, now: float) -> Message | None:
        """Take an answer; return what is still to be said, if anything."""
        draft = self._draft(full=False)
        self._learn(peer, message, records, draft, now)
        return None if draft.empty else draft.message()

    # --- what there is to say

    def _draft(self, *, full: bool) -> Draft:
        table = self._table
        digest = table.digest() if full else b""
        return Draft(table.owner.record, members=table.size, digest=digest, cap=MAX_MESSAGE_BYTES)

    def _add_its_status(self, peer: PeerKey | None, draft: Draft) -> None:
        member = self._table.members.get(peer) if peer is not None else None
        if member is not None and (member.doubted or member.status is not Status.ALIVE):
            draft.doubt(member.record)

    def _add_rumours(self, peer: PeerKey | None, draft: Draft) -> None:
        table = self._table
        for key, _ in table.doubts.fresh_for(peer):
            if not draft.doubt(table.held(key)):
                break
            table.doubts.sent(key, peer)
        for key, rumour in table.records.fresh_for(peer):
            record = table.held(key)
            eager = rumour.sends < EAGER_SENDS and draft.room > _RESERVE
            # what is only mentioned is asked for: that peer is not known to have it yet
            if eager and draft.carry(record, table.records.heat(key)):
                table.records.sent(key, peer)
            elif draft.mention(record):
                table.records.sent(key, None)
            else:
                break

    def _resolve(self, message: Message, draft: Draft, now: float) -> None:
        """For buckets that differ say who is in them, or send all of it to somebody who has nothing there."""
        table = self._table
        buckets = table.differing(message.digest)
        shuffle(buckets, self._random)
        growing = now < self._grew_at + table.tuning.interval_s
        unsettled = growing or abs(message.members - table.size) * 8 > table.size
        allowance = LIST_BYTES_UNSETTLED if unsettled else LIST_BYTES
        for bucket in buckets:
            records = table.in_bucket(bucket)
            if is_empty(message.digest, bucket):
                self._push(records, draft)
            elif allowance > 0 and draft.list_bucket(bucket, records):
                allowance -= list_cost(len(records))
            elif unsettled:
                draft.more = True

    def _push(self, records: list[Record], draft: Draft) -> None:
        """Carry what has room, in random order: one large record must not keep the same others from ever having any."""
        shuffle(records, self._random)
        for record in records:
            if draft.room < _RESERVE or not self._carry(record, draft):
                draft.more = True
                break

    def _carry(self, record: Record, draft: Draft) -> bool:
        return draft.carry(record, self._table.records.heat(record.key))

    # --- what there is to learn

    def _learn(self, peer: PeerKey, message: Message, records: Records, draft: Draft, now: float) -> None:
        table = self._table
        table.admit(peer)
        wanted = [record for short in message.wants if (record := table.named(short)) and not table.is_dead(record.key)]
        shuffle(wanted, self._random)
        for record, heat in records:
            if table.is_news(record):
                self._grew_at = now if record.key not in table.members else self._grew_at
                table.take(record, now, source=peer, heat=heat)
            else:
                self._compare(peer, Stamp(record.short, *record.age), draft, now)
        for record in wanted:
            self._carry(record, draft)
        if message.me is not None:
            self._compare(peer, message.me, draft, now)
            held = table.named(message.me.short)
            if held is not None and held.age == message.me.age and message.check not in (b"", check_of(held)):
                self._carry(held, draft)  # two lives of it began in the same second: it will outdo both
        for stamp in message.hot:
            self._compare(peer, stamp, draft, now)
        for doubt in message.doubts:
            self._doubted(peer, doubt, draft, now)
        for bucket, stamps in message.lists.items():
            self._compare_bucket(peer, bucket, stamps, draft, now)

    def _compare(self, peer: PeerKey, stamp: Stamp, draft: Draft, now: float) -> None:
        """*peer* has this version of somebody: want it, send a newer one, or tell that it is dead."""
        table = self._table
        held, age = table.named(stamp.short), (stamp.incarnation, stamp.version)
        if held is None or held.age < age:
            if table.welcomes(ShortId(stamp.short), now):
                draft.want(ShortId(stamp.short))
            return
        if held.age > age:
            self._carry(held, draft)
        else:
            table.records.knows(peer, held.key, age)
        if table.is_dead(held.key):
            draft.doubt(held)

    def _compare_bucket(self, peer: PeerKey, bucket: int, stamps: Sequence[Stamp], draft: Draft, now: float) -> None:
        listed = set()
        for stamp in stamps:
            listed.add(stamp.short)
            self._compare(peer, stamp, draft, now)
        if not 0 <= bucket < BUCKETS:
            return
        missing = [record for record in self._table.in_bucket(bucket) if record.short not in listed]
        self._push(missing, draft)

    def _doubted(self, peer: PeerKey, doubt: Doubt, draft: Draft, now: float) -> None:
        """*peer* could not reach somebody: that one contradicts, the others see for themselves."""
        table = self._table
        key = PeerKey(doubt.key)
        if key == table.owner.key:
            table.contradict(doubt.age, now)
            self._carry(table.owner.record, draft)
            return
        member = table.members.get(key)
        if member is None:
            return
        if doubt.age < member.record.age:
            self._carry(member.record, draft)
        elif member.status is Status.SUSPECT:
            table.doubts.knows(peer, key, member.record.age)
        elif member.status is Status.ALIVE:
            member.doubted = True
            if now - member.heard_at > _TRUST_TICKS * table.tuning.interval_s:
                table.suspect(member, now, own=False, source=peer)


def shuffle(items: list[T], random: Callable[[], float]) -> None:
    for index in range(len(items) - 1, 0, -1):
        other = int(random() * (index + 1))
        items[index], items[other] = items[other], items[index]
