"""Failing links are said once, whoever makes them fail however often."""

from __future__ import annotations

import pytest

from mesh.net.link_log import FailureLog


def test_once_per_source_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log = FailureLog()
    for now in range(100):
        log.failed("10.0.0.1", "10.0.0.1:5", "wrong token", now)
        log.failed("10.0.0.1", "10.0.0.1:5", "untrusted", now)
    assert len(caplog.records) == 2
    log.worked("10.0.0.1", "10.0.0.1:6")
    log.worked("10.0.0.1", "10.0.0.1:7")
    assert len(caplog.records) == 3
    log.failed("10.0.0.1", "10.0.0.1:8", "wrong token", 200)
    assert len(caplog.records) == 4


def test_a_source_that_thinks_of_new_reasons(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog()
    for number in range(100):
        log.failed("10.0.0.1", "10.0.0.1:5", f"reason {number}", number * 10)
    assert len(caplog.records) == 8


def test_many_sources_make_no_flood_and_take_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog()
    for number in range(5000):
        log.failed(f"2001:db8:{number:x}::/64", "x", "wrong token", 0.001 * number)
    assert len(caplog.records) <= 20 + 5
    assert len(log._failing) <= 1024


def test_who_is_excused_is_not_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog()
    log.excuse("10.0.0.1:5")
    log.failed("10.0.0.1", "[::ffff:10.0.0.1]:5", "closed", 0.0)
    log.excuse("[2001:db8::1]:5")
    log.failed("2001:db8::/64", "[2001:db8::1]:5", "closed", 0.0)
    assert not caplog.records
    log.failed("10.0.0.1", "10.0.0.1:5", "closed", 1.0)
    assert len(caplog.records) == 1
    for number in range(5000):
        log.excuse(f"10.0.0.1:{number}")
    assert len(log._excused) <= 64
