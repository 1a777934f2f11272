"""Token buckets on a clock that the test turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.net.rate_limit import Rate, RateLimiter, is_loopback, source_of


def test_a_burst_then_a_rate() -> None:
    limiter = RateLimiter(Rate(per_s=2.0, burst=3))
    assert [limiter.allow("a", 0.0) for _ in range(5)] == [True, True, True, False, False]
    assert not limiter.allow("a", 0.4)
    assert [limiter.allow("a", 0.5), limiter.allow("a", 0.5)] == [True, False]
    assert [limiter.allow("a", 100.0) for _ in range(4)] == [True, True, True, False]


def test_sources_do_not_share() -> None:
    limiter = RateLimiter(Rate(0.0, 1))
    assert [limiter.allow(source, 0.0) for source in "abab"] == [True, True, False, False]


@given(st.lists(st.floats(0, 5), max_size=60))
def test_never_more_than_the_rate_allows(gaps: list[float]) -> None:
    limiter, now, allowed = RateLimiter(Rate(per_s=3.0, burst=4)), 0.0, 0
    for gap in gaps:
        now += gap
        allowed += limiter.allow("a", now)
        assert allowed <= 4 + 3.0 * now + 1e-6


def test_a_clock_that_steps_back_gives_nothing() -> None:
    limiter = RateLimiter(Rate(1.0, 1))
    assert limiter.allow("a", 10.0)
    assert not limiter.allow("a", 5.0)
    assert limiter.allow("a", 6.0)


def test_the_table_is_bounded() -> None:
    """The one that was quiet for longest goes, not the one that is being limited now."""
    limiter = RateLimiter(Rate(0.0, 1), max_sources=10)
    assert limiter.allow("busy", 0.0)
    for number in range(1000):
        assert limiter.allow(f"10.0.0.{number}", 1.0)
        assert not limiter.allow("busy", 1.0)
        assert len(limiter) <= 10


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::1"),
        ("", ""),
        ("/run/socket", "/run/socket"),
    ],
)
def test_whom_an_address_stands_for(address: str, source: str) -> None:
    assert source_of(address) == source


def test_loopback() -> None:
    assert [is_loopback(source_of(a)) for a in ("127.0.0.1", "127.5.5.5", "::ffff:127.0.0.1", "::1")] == [True] * 4
    assert [is_loopback(source_of(a)) for a in ("12.7.0.1", "::2", "")] == [False] * 3
