"""Tells from the first bytes of a connection which protocol it speaks. Pure: the listener peeks, this judges."""

from __future__ import annotations

import re
from enum import Enum, StrEnum


class Protocol(StrEnum):
    HTTP1 = "http/1.1"
    HTTP2 = "h2"  # prior knowledge: the client preface
    TLS = "tls"
    NOISE = "noise"  # a peer's link


class Undecided(Enum):
    NEED_MORE = "need more"  # every continuation of some protocol is still possible
    UNKNOWN = "unknown"  # no continuation is


NEED_MORE = Undecided.NEED_MORE
UNKNOWN = Undecided.UNKNOWN

#: So many bytes always decide.
MAX_PREFIX = 24

# An unknown method is HTTP all the same and deserves a 405; the longest registered one has 17 letters.
_METHOD = re.compile(rb"[A-Z][A-Z-]{0,20}(?P<end> )?")
_HTTP2_PREFACE = b"PRI "


def sniff(prefix: bytes) -> Protocol | Undecided:
    """Return what *prefix*, the bytes so far, can only be; ``NEED_MORE`` until there are enough of them."""
    if not prefix:
        return NEED_MORE
    match prefix[0]:
        case 0x00:
            return Protocol.NOISE
        case 0x0D:  # an empty line before the first request, which HTTP/1.1 ignores
            return NEED_MORE if len(prefix) == 1 else Protocol.HTTP1 if prefix[1] == 0x0A else UNKNOWN
        case 0x16:
            return NEED_MORE if len(prefix) == 1 else Protocol.TLS if prefix[1] == 0x03 else UNKNOWN
    found = _METHOD.match(prefix)
    if found is None:
        return UNKNOWN
    if found["end"]:
        return Protocol.HTTP2 if prefix.startswith(_HTTP2_PREFACE) else Protocol.HTTP1
    return NEED_MORE if found.end() == len(prefix) < MAX_PREFIX else UNKNOWN
