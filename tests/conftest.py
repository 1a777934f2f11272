"""Shared by all tests."""

from __future__ import annotations

import asyncio

# On 3.11, asking for "the current loop" from a synchronous test makes one that nobody closes; pytest-asyncio does ask.
# With a policy that was told there is none, it makes and closes its own.
asyncio.set_event_loop(None)
