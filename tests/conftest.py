"""Shared by all tests."""

from __future__ import annotations

import asyncio
import os

from hypothesis import settings

# On 3.11, asking for "the current loop" from a synchronous test makes one that nobody closes; pytest-asyncio does ask.
# With a policy that was told there is none, it makes and closes its own.
asyncio.set_event_loop(None)

# CI tries the same examples every time: a new find should stop its finder, not somebody else's change.
settings.register_profile("ci", derandomize=True, database=None)
if os.environ.get("CI"):
    settings.load_profile("ci")
