"""How often each source may do something: token buckets in a bounded table. Pure; ``now`` is an argument."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

_MAX_SOURCES = 4096


@dataclass(frozen=True, slots=True)
class Rate:
    """So many at once, so many per second for long."""

    per_s: float
    burst: float


class RateLimiter:
    """Who is new has a full bucket. Of too many sources the one that was quiet for longest is forgotten."""

    def __init__(self, rate: Rate, *, max_sources: int = _MAX_SOURCES) -> None:
        self._rate = rate
        self._max_sources = max_sources
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens, and when that was; the latest last

    def __len__(self) -> int:
        return len(self._buckets)

    def allow(self, source: str, now: float) -> bool:
        """Take a token of *source*; False if it has none."""
        tokens, since = self._buckets.pop(source, (self._rate.burst, now))
        tokens = min(self._rate.burst, tokens + max(0.0, now - since) * self._rate.per_s)
        allowed = tokens >= 1
        self._buckets[source] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > self._max_sources:
            del self._buckets[next(iter(self._buckets))]
        return allowed


def source_of(address: str) -> str:
    """Return whom *address* stands for: an IPv6 host has a whole /64 to choose from, so that is one source."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ip) if ip.is_loopback else str(ipaddress.ip_network((ip, 64), strict=False))


def is_loopback(source: str) -> bool:
    """Whether *source*, of ``source_of``, is this machine."""
    return source.startswith("127.") or source == "::1"
