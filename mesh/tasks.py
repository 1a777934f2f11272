"""Background tasks that are named, referenced and never fail in silence (trap 12)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

_log = logging.getLogger("mesh.tasks")
_running: set[asyncio.Task[Any]] = set()


def wall_time() -> float:
    """Seconds since the epoch, for timestamps people read. Never for durations."""
    return datetime.now(UTC).timestamp()


def rfc3339(wall: float | None) -> str | None:
    """Return a wall time as text in UTC, as JSON has it."""
    return None if wall is None else datetime.fromtimestamp(wall, UTC).isoformat()


def spawn(coro: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    """Start *coro* as a task called *name*; the loop holds tasks weakly, so a reference is kept until it ends.

    A failure is logged with its traceback; cancellation is not a failure.
    """
    task = asyncio.get_running_loop().create_task(coro, name=name)
    _running.add(task)
    task.add_done_callback(_finished)
    return task


def _finished(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("background task %s failed", task.get_name(), exc_info=error)


async def in_daemon_thread(job: Callable[[], T], name: str) -> T:
    """Return what *job* returns, run in a thread of its own: one that hangs for ever keeps no process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        try:
            settle = partial(future.set_result, job())
        except Exception as error:
            reason = RuntimeError("the job ended early") if isinstance(error, StopIteration) else error
            settle = partial(future.set_exception, reason)
        except BaseException as error:
            settle = partial(future.set_exception, RuntimeError(repr(error)))
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(lambda: None if future.done() else settle())

    threading.Thread(target=work, name=name, daemon=True).start()
    return await future


async def forever(step: Callable[[], Coroutine[Any, Any, None]], *, every_s: float, name: str) -> None:
    """Run *step* every *every_s* seconds until cancelled; a step that raises is logged and the loop goes on."""
    while True:
        try:
            await step()
        except Exception:
            _log.exception("periodic task %s failed; it runs again in %.1f s", name, every_s)
        await asyncio.sleep(every_s)
