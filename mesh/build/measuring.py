"""One round of a comparison: how fast does a llama-server read a prompt and write an answer?"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Protocol

from mesh.build.server_under_test import Line, ServerFailedError, data_of
from mesh.build.status import Speed


class Asked(Protocol):
    """A server to ask: ``ServerUnderTest`` or ``Connection``."""

    async def post(self, path: str, body: Mapping[str, Any], limit_s: float) -> list[Line]: ...


async def measure(server: Asked, prompt: str, tokens: int, limit_s: float) -> Speed:
    """Return how fast *server* reads *prompt* and writes *tokens* tokens. Raise ``ServerFailedError``."""
    began = asyncio.get_running_loop().time()
    body = {"prompt": prompt, "n_predict": tokens, "ignore_eos": True, "cache_prompt": False, "temperature": 0}
    lines = await server.post("/completion", {**body, "stream": True}, limit_s)
    speed = speed_of(list(data_of(lines)), began, len(prompt))
    if speed is None:
        last = lines[-1].text[:200] if lines else "nothing"
        raise ServerFailedError(f"the answer of POST /completion cannot be measured; it ends with {last}")
    return speed


def speed_of(events: Sequence[Line], began: float, prompt_tokens: int) -> Speed | None:
    """Return the speed that a streamed answer tells in its ``timings``, else that of the clock; None if neither.

    By the clock *prompt_tokens* were read between *began* and the first event, and each event is a token.
    """
    try:
        decoded = [(event.at, json.loads(event.text)) for event in events if event.text != "[DONE]"]
        timings = decoded[-1][1].get("timings") or {}
    except (ValueError, LookupError, AttributeError):
        return None
    told = [timings.get(key) for key in ("prompt_per_second", "predicted_per_second")]
    rates = [float(rate) for rate in told if isinstance(rate, int | float) and 0 < rate < inf]
    if len(rates) == 2:
        return Speed(*rates)
    times = [at for at, event in decoded if event.get("content")]
    if len(times) < 2 or not began < times[0] < times[-1]:
        return None
    return Speed(prompt_tokens / (times[0] - began), (len(times) - 1) / (times[-1] - times[0]))
