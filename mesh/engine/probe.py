"""Questions to one child over HTTP: is it healthy, who is it, how many of its slots are busy.

Every question has its own timeout and carries the instance's own API key (trap 104). A question that is not answered
in the expected way yields None or False, never an exception: a child may be loading, hung or dying at any moment.
Not on the path of requests. One connection for each question: llama-server closes idle ones, and there are few.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import httpx

from mesh.engine.lease import Endpoint

TIMEOUT_S: Final = 2.0
#: "More than there are": llama-server looks at /slots between two batches, and a batch may take half a minute.
TOO_BUSY_TO_SAY: Final = 1 << 30


class Prober:
    """Asks the instances of the node. Keeps nothing between two questions."""

    async def healthy(self, endpoint: Endpoint) -> bool:
        """Whether GET /health answers 200."""
        response = await self._get(endpoint, "/health")
        return response is not None and response.status_code == 200

    async def properties(self, endpoint: Endpoint) -> Mapping[str, Any]:
        """Return what GET /props tells; empty if the server does not."""
        found = await self._json(endpoint, "/props")
        return found if isinstance(found, dict) else {}

    async def busy_slots(self, endpoint: Endpoint) -> int | None:
        """Return how many slots compute, by GET /slots; ``TOO_BUSY_TO_SAY``, or None if the server does not tell."""
        try:
            slots = _decoded(await self._ask(endpoint, "/slots"))
        except httpx.ReadTimeout:
            return TOO_BUSY_TO_SAY
        except (httpx.HTTPError, OSError):
            return None
        if not isinstance(slots, list):
            return None
        return sum(1 for slot in slots if isinstance(slot, dict) and slot.get("is_processing"))

    async def _json(self, endpoint: Endpoint, path: str) -> Any:
        response = await self._get(endpoint, path)
        return None if response is None else _decoded(response)

    async def _get(self, endpoint: Endpoint, path: str) -> httpx.Response | None:
        try:
            return await self._ask(endpoint, path)
        except (httpx.HTTPError, OSError):
            return None

    async def _ask(self, endpoint: Endpoint, path: str) -> httpx.Response:
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        # A client of its own: a shared one may keep the socket of a probe that was cancelled when its child died.
        # Plain HTTP to this machine only: loading CA certificates, or an operator's http_proxy, has no business here.
        async with httpx.AsyncClient(verify=False, trust_env=False, timeout=TIMEOUT_S) as client:
            return await client.get(f"http://{host}:{endpoint.port}{path}", headers=headers)


def _decoded(response: httpx.Response) -> Any:
    """Return the JSON of a good answer, None for any other."""
    try:
        return response.json() if response.status_code == 200 else None
    except ValueError:
        return None
