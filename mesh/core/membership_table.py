"""All that one node knows of the mesh: its own record, the other members, and what it passes on of its own accord.

Every change of a member's record or status happens here, so that digest, rumours, watch list and events agree with it.
Invariants: a member's age never goes down while it is known; only its owner makes a record; ``_watched`` holds all and
only members that are ``watched``; the digest covers the own record and all and only members that are ``here``.
Tombstones are not in the digest: a node that still holds the dead for living differs, asks, and is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mesh.core.gossip_buckets import Buckets
from mesh.core.gossip_message import Heat
from mesh.core.gossip_record import MAX_CLAIM, Age, Record, ShortId, seal, short
from mesh.core.gossip_rumours import Rumours, budget
from mesh.core.membership_member import Change, Event, Member, Status, Tuning
from mesh.core.node_state import PeerKey


@dataclass(slots=True)
class Owner:
    """This node's own record and how it gets newer."""

    key: PeerKey
    incarnation: int
    sign: Callable[[bytes], bytes]
    rotation: bytes | None = None
    payload: bytes = b""
    left: bool = False
    version: int = 0
    record: Record = field(init=False)

    def __post_init__(self) -> None:
        self.seal()

    def seal(self) -> None:
        """Make a newer record of the payload as it is."""
        version = self.version + 1
        self.record = seal(
            self.key, (self.incarnation, version), self.payload, rotation=self.rotation, left=self.left, sign=self.sign
        )
        self.version = version

    def raise_above(self, age: Age) -> None:
        self.incarnation = max(self.incarnation, age[0]) + 1
        self.version = 0
        self.seal()


class Table:
    def __init__(self, owner: Owner, random: Callable[[], float], tuning: Tuning) -> None:
        self.owner = owner
        self.tuning = tuning
        self.records = Rumours()
        self.doubts = Rumours()
        self.events: list[Event] = []
        self.own_changed = False  #: the payload is newer than the sealed record
        self._random = random
        self._buckets = Buckets()
        self._members: dict[PeerKey, Member] = {}
        self._held: dict[ShortId, Record] = {}  #: the newest of everybody, the own one and tombstones included
        self._watched: dict[PeerKey, Member] = {}
        self._graves: dict[PeerKey, Member] = {}
        self._refused: dict[ShortId, float] = {}
        self._contradict_at: float | None = None
        self._above: Age = (-1, 0)
        self._own_renewed(urgent=True)

    # --- looking

    @property
    def members(self) -> Mapping[PeerKey, Member]:
        return self._members

    @property
    def watched(self) -> Mapping[PeerKey, Member]:
        return self._watched

    @property
    def graves(self) -> Mapping[PeerKey, Member]:
        return self._graves

    @property
    def size(self) -> int:
        """How many live, this node included."""
        return len(self._members) - len(self._graves) + 1

    def named(self, short_id: bytes) -> Record | None:
        """Return the newest record of who is called *short_id*."""
        return self._held.get(ShortId(short_id))

    def held(self, key: PeerKey) -> Record:
        """Return the newest record of *key*, which must be known."""
        return self.owner.record if key == self.owner.key else self._members[key].record

    def is_dead(self, key: PeerKey) -> bool:
        return key in self._graves and self._graves[key].status is Status.DEAD

    def digest(self) -> bytes:
        return self._buckets.digest()

    def differing(self, digest: bytes) -> list[int]:
        return self._buckets.differing(digest)

    def in_bucket(self, bucket: int) -> list[Record]:
        return [self.held(key) for key in self._buckets.keys(bucket)]

    def is_news(self, record: Record) -> bool:
        """Return whether *record* would change anything, and is worth the verification of its signature."""
        if record.key == self.owner.key:
            mine = self.owner.record
            return record.age > mine.age or (record.age == mine.age and record.body != mine.body)
        member = self._members.get(record.key)
        if member is None:  # the goodbye of somebody whom we never knew needs no tombstone
            return not record.left and len(self._members) < self.tuning.max_members
        return record.age > member.record.age

    def welcomes(self, short_id: ShortId, now: float) -> bool:
        """Return whether a newer record, or a new member's, may come in."""
        if self._refused.get(short_id, now) > now:
            return False
        return short_id in self._held or len(self._members) < self.tuning.max_members

    # --- the own record

    def publish(self, *, urgent: bool) -> None:
        """Make the payload known; without *urgent* it may wait for a tick."""
        self.own_changed = False
        self.owner.seal()
        self._own_renewed(urgent=urgent)

    def contradict(self, age: Age, now: float) -> None:
        """Somebody holds this node for dead, or a record of an earlier life for newer, as of *age*: be newer.

        At most once per tick: two processes with one key would outbid each other without end.
        """
        if self.owner.left or age < self.owner.record.age or age[0] >= MAX_CLAIM:
            return
        self._above = max(self._above, age)
        if self._contradict_at is None or now >= self._contradict_at:
            self._contradict_at = now + self.tuning.interval_s
            self.owner.raise_above(self._above)
            self._own_renewed(urgent=True)

    def catch_up_own(self, now: float) -> None:
        """Do what waited for the tick."""
        if self._above >= self.owner.record.age:
            self.contradict(self._above, now)
        if self.own_changed:
            self.publish(urgent=False)

    def _own_renewed(self, *, urgent: bool) -> None:
        record = self.owner.record
        self._held[record.short] = record
        if self.owner.left:
            self._buckets.drop(record.key)
        else:
            self._buckets.put(record.key, record.age)
        self._spread(record, None, Heat.URGENT if urgent else Heat.HOT)

    # --- the others

    def take(self, record: Record, now: float, *, source: PeerKey | None = None, heat: int = Heat.COLD) -> None:
        """Take a verified record that came from *source*; what is not news changes nothing."""
        if not self.is_news(record):
            return
        if record.key == self.owner.key:
            self._note(Change.OWN_KEY, record)
            self.contradict(record.age, now)
            return
        member = self._members.get(record.key)
        if member is None:
            member = Member(record, since=now, updated_at=now)
            self._members[record.key] = member
            change, restarted = Change.JOINED, False
        else:
            before, restarted = member.status, member.record.age[0] != record.age[0]
            member.renew(record, now, self.tuning)
            change = _change(before, member.status)
        self._held[record.short] = record
        self._refiled(member)
        self._note(change, record, restarted=restarted)
        self._spread(record, source, heat)

    def heard(self, key: PeerKey, now: float) -> None:
        member = self._members.get(key)
        if member is None:
            return
        before = member.status
        member.live(now)
        if before is not member.status:
            self._note(Change.ALIVE, member.record)
            self._refiled(member)
        else:
            self._watch(member)

    def failed(self, member: Member, started_at: float, now: float) -> None:
        """An exchange of this node with *member* failed."""
        member.fail(started_at, now, self._random(), self.tuning)
        if member.status is Status.ALIVE and member.failures >= self.tuning.failures(self.size):
            self.suspect(member, now, own=True)
        self._watch(member)

    def suspect(self, member: Member, now: float, *, own: bool, source: PeerKey | None = None) -> None:
        member.suspect(now, self.tuning.suspicion_s(self.size), self._random(), self.tuning, own=own)
        self._watch(member)
        self.doubts.add(member.record.key, member.record.age, source=source)
        self._note(Change.SUSPECT, member.record)

    def bury(self, member: Member, now: float) -> None:
        member.die(now)
        self.records.drop(member.record.key)
        self._refiled(member)
        self._note(Change.DEAD, member.record)

    def forget(self, key: PeerKey) -> None:
        member = self._members.pop(key, None)
        if member is None:
            return
        self._held.pop(member.record.short, None)
        self._buckets.drop(key)
        self.records.drop(key)
        self.doubts.drop(key)
        self._watched.pop(key, None)
        self._graves.pop(key, None)
        self._resized()
        self._note(Change.FORGOTTEN, member.record)

    def refuse(self, key: PeerKey, now: float) -> None:
        """Do not ask for this member's record for a while: it may not come in."""
        self._refused[short(key)] = now + self.tuning.refused_s

    def admit(self, key: PeerKey) -> None:
        self._refused.pop(short(key), None)

    def expire(self, now: float) -> None:
        """Drop what has been kept for long enough."""
        old = [key for key, member in self._graves.items() if now >= member.since + self.tuning.tombstone_s]
        for key in old:
            self.forget(key)
        if self._refused:
            self._refused = {name: until for name, until in self._refused.items() if until > now}

    # --- keeping it consistent

    def _refiled(self, member: Member) -> None:
        """Its record or status changed: put it where it belongs now."""
        key = member.record.key
        if member.here:
            self._buckets.put(key, member.record.age)
            self._graves.pop(key, None)
        else:
            self._buckets.drop(key)
            self._graves[key] = member
        self._resized()
        self._watch(member)

    def _resized(self) -> None:
        self.records.limit = self.doubts.limit = budget(self.size)

    def _watch(self, member: Member) -> None:
        key = member.record.key
        if member.watched:
            self._watched[key] = member
        else:
            self._watched.pop(key, None)
        if member.status is not Status.SUSPECT:
            self.doubts.drop(key)

    def _spread(self, record: Record, source: PeerKey | None, heat: int) -> None:
        if heat <= Heat.COLD:
            self.records.drop(record.key)  # of an older version
            return
        crowded = source is not None and len(self.records.urgent) >= self.tuning.urgent_at_once
        rounds = self.tuning.urgent_rounds if heat >= Heat.URGENT and not crowded else 0
        self.records.add(record.key, record.age, source=source, urgent_rounds=rounds)

    def _note(self, change: Change, record: Record, *, restarted: bool = False) -> None:
        self.events.append(Event(change, record, restarted))


def _change(before: Status, after: Status) -> Change:
    """Return what a newer record did to a member."""
    if after is Status.LEFT:
        return Change.LEFT
    return {Status.ALIVE: Change.UPDATED, Status.LEFT: Change.JOINED}.get(before, Change.ALIVE)
