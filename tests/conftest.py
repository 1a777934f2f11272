"""Shared by all tests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator

import pytest
from hypothesis import settings

# On 3.11, asking for "the current loop" from a synchronous test makes one that nobody closes; pytest-asyncio does ask.
# With a policy that was told there is none, it makes and closes its own.
asyncio.set_event_loop(None)

# CI tries the same examples every time: a new find should stop its finder, not somebody else's change.
settings.register_profile("ci", derandomize=True, database=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what no encoding has as an escape: a report travels from pytest-xdist's workers as UTF-8."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report
