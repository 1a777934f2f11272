"""Durations and sizes as people write them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.config.units import (
    parse_budget,
    parse_bytes,
    parse_count,
    parse_megabytes,
    parse_milliseconds,
    parse_seconds,
    parse_share,
)


@pytest.mark.parametrize(
    ("parse", "value", "expected"),
    [
        (parse_seconds, 30, 30),
        (parse_seconds, "30", 30),
        (parse_seconds, "500ms", 0.5),
        (parse_seconds, "5m", 300),
        (parse_seconds, "1.5 h", 5400),
        (parse_milliseconds, 1500, 1500),
        (parse_milliseconds, "30s", 30_000),
        (parse_milliseconds, "5 min", 300_000),
        (parse_milliseconds, "0", 0),
        (parse_megabytes, 24000, 24000),
        (parse_megabytes, "24GB", 24576),
        (parse_megabytes, "24 GiB", 24576),
        (parse_megabytes, "24g", 24576),
        (parse_megabytes, "512MB", 512),
        (parse_megabytes, "1.5TB", 1_572_864),
        (parse_bytes, "64MB", 67_108_864),
        (parse_bytes, 10, 10),
        (parse_bytes, "10b", 10),
        (parse_budget, "Auto", "auto"),
        (parse_budget, "1GB", 1024),
        (parse_count, "7", 7),
        (parse_count, 7.0, 7),
        (parse_share, 1, 1),
        (parse_share, "0.3", 0.3),
        (parse_share, " 30 %", 0.3),
    ],
)
def test_values(parse: Callable[[object], object], value: object, expected: object) -> None:
    assert parse(value) == expected


@pytest.mark.parametrize(
    ("parse", "value", "message"),
    [
        (parse_seconds, "soon", "expected a number or text such as '30s'"),
        (parse_seconds, "30 parsecs", "expected a number"),
        (parse_seconds, "", "expected a number"),
        (parse_seconds, True, "expected a number"),
        (parse_seconds, float("inf"), "expected a number"),
        (parse_seconds, float("nan"), "expected a number"),
        (parse_seconds, -1, "must not be negative"),
        (parse_seconds, "-5s", "must not be negative"),
        (parse_seconds, [1], "expected a number"),
        (parse_milliseconds, 0.4, "less than 1 ms"),
        (parse_milliseconds, "1us", "less than 1 ms"),
        (parse_megabytes, "12KB", "less than 1 MB"),
        (parse_megabytes, "24s", "such as '24GB'"),
        (parse_budget, "automatic", "or 'auto'"),
        (parse_count, "3s", "a whole number"),
        (parse_count, 1.5, "a whole number"),
        (parse_count, 1e300, "too large"),
        (parse_share, 0, "a share above 0 and up to 1"),
        (parse_share, 1.01, "a share above 0"),
        (parse_share, "30", "a share above 0"),
        (parse_share, "101%", "a share above 0"),
        (parse_share, "%", "a share above 0"),
        (parse_share, True, "a share above 0"),
    ],
)
def test_refusals(parse: Callable[[object], object], value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(value)


@given(st.text() | st.floats() | st.integers() | st.booleans() | st.none())
def test_anything_parses_or_is_a_value_error(value: object) -> None:
    for parse in (parse_seconds, parse_milliseconds, parse_megabytes, parse_bytes, parse_count, parse_share):
        with contextlib.suppress(ValueError):
            assert parse(value) >= 0
