"""What answers that go on for as long as their viewer stays have in common: headers, and the look-out for the viewer.

Each is the response itself: it must see the disconnect, which a generator inside StreamingResponse cannot.
"""

from __future__ import annotations

from abc import abstractmethod

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class LiveResponse(Response):
    """See the module. Its length is not known, and nothing on the way may hold it back."""

    def __init__(self) -> None:
        super().__init__(headers={"x-accel-buffering": "no", "cache-control": "no-store"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self.body_to(receive, send)

    @abstractmethod
    async def body_to(self, receive: Receive, send: Send) -> None:
        """Send the body until it ends or the viewer leaves."""


async def disconnected(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
