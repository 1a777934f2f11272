"""Blocking steps, and what a cancellation does to them: nothing."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mesh.build.threads import settled
from mesh.tasks import spawn


async def test_results_and_errors() -> None:
    assert await settled(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await settled(lambda: 1 // 0)


@pytest.mark.parametrize("fails", [False, True])
async def test_who_is_cancelled_stays_until_the_job_is_over(fails: bool) -> None:
    began, go_on, over = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def job() -> None:
        loop.call_soon_threadsafe(began.set)
        go_on.wait()
        over.set()
        if fails:
            raise OSError("nobody hears this")

    task = spawn(settled(job), "a job")
    await began.wait()
    task.cancel()
    loop.call_soon(go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert over.is_set()
