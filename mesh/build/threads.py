"""Blocking steps of a build, off the event loop, that are over when the caller goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def settled(job: Callable[[], T]) -> T:
    """Return what *job* returns, run in a thread.

    Unlike ``asyncio.to_thread``, a cancelled caller stays until *job* is over: what it does on disk is done then, and
    whoever cleans up does not race with it.
    """
    future = asyncio.get_running_loop().run_in_executor(None, job)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # it is looked at here, so that nobody complains that it never was
        raise
