"""What membership orders its shell to do: an exchange with somebody, of one of four kinds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mesh.core.gossip_record import Age
from mesh.core.membership_member import Member
from mesh.core.node_state import PeerKey


class Kind(Enum):
    TICK = "tick"  # a full exchange, in turn
    PROBE = "probe"  # does it live? As planned for who did not answer
    ASKED = "asked"  # the same, beside all plans: somebody outside wants to know
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


def order_for(member: Member, kind: Kind, now: float, about: tuple[News, ...] = ()) -> Order:
    """Return an order for an exchange with *member*, which is on its way from now on."""
    member.pending += 1
    return Order(member.record.key, kind, member.record.age[0], now, about)
