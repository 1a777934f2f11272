"""Slots whose client is gone: counted as taken until the child is seen to have stopped (trap 9)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mesh.core.lifecycle import State
from mesh.engine.instances import Instance
from mesh.tasks import spawn

#: Seconds between looks at the child. While nothing flows to a client (it reads the prompt, or the answer is not
#: streamed), llama-server notices that the client left only if a whole second passes without a result of any task. A
#: look is a task: an early one costs a whole batch of the prompt (measured: 1.2 s became 2.3 s).
WATCH_DELAYS_S = (1.2, 1.5, 1.5, 2.0)
#: The first look after a stream broke off, which the child notices at its next token.
STREAM_DELAY_S = 0.2
#: If the child cannot be asked (no /slots), an abandoned request counts this long.
BLIND_S = 2.0
#: A request younger than this may not have reached a slot yet when the child is asked.
SETTLED_S = 0.5


def abandon(instance: Instance, post: Callable[[Callable[[], None]], None], *, soon: bool = False) -> None:
    """Count one more abandoned request; the child is asked from now on, and each answer goes through *post*.

    *soon* says that it should stop at once.
    """
    instance.abandoned += 1
    if not instance.watching:
        instance.watching = True
        delays_s = (STREAM_DELAY_S, *WATCH_DELAYS_S[1:]) if soon else WATCH_DELAYS_S
        spawn(_watch(instance, post, delays_s), f"watch abandoned requests of {instance.id}")


async def _watch(instance: Instance, post: Callable[[Callable[[], None]], None], delays_s: tuple[float, ...]) -> None:
    loop, looks = asyncio.get_running_loop(), 0
    try:
        while instance.abandoned and instance.state in (State.READY, State.DRAINING):
            await asyncio.sleep(delays_s[min(looks, len(delays_s) - 1)])
            looks, asked_at, number = looks + 1, loop.time(), instance.abandoned
            busy = await instance.runner.busy_slots()
            if busy is None:
                await asyncio.sleep(BLIND_S - delays_s[0])
            post(_Seen(instance, number, busy or 0, asked_at))
    finally:
        instance.watching = False


class _Seen:
    """The event "the child had so many busy slots at that time, when *abandoned* requests were"."""

    def __init__(self, instance: Instance, abandoned: int, busy_slots: int, asked_at: float) -> None:
        self.instance, self.abandoned, self.busy_slots, self.asked_at = instance, abandoned, busy_slots, asked_at

    def __call__(self) -> None:
        instance = self.instance
        settled = sum(1 for x in instance.leases if x.needs_slot and x.granted_at < self.asked_at - SETTLED_S)
        still = max(0, min(self.abandoned, self.busy_slots - settled))
        ended = self.abandoned - still  # what was abandoned since is the next look's business
        instance.busy -= ended
        instance.abandoned -= ended
