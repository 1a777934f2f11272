"""Requests that are not inference: one at a time, through uvicorn's HttpToolsProtocol, to the Starlette app.

The client's connection stays the transport's protocol and passes on exactly the bytes of one request. So uvicorn's
parser never sees the next one, which may be inference, and what frames a request is judged in one place only. (Handing
the transport itself over would leave bytes of the next request inside uvicorn's parser.)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from mesh.api.chunked import ChunkedDecoder, ChunkError
from mesh.api.http1 import RequestHead
from mesh.api.responses import ProtocolError

# What uvicorn has to say is either ours to log (requests) or said in the exception that it logs as an error.
logging.getLogger("uvicorn.access").propagate = False


class AppRequest(HttpToolsProtocol):
    """uvicorn's protocol for the length of one request and its response. Its timers are not used: ours are."""

    def __init__(self, config: Config, state: ServerState, on_response: Callable[[], None]) -> None:
        super().__init__(config=config, server_state=state, app_state={})
        self._on_response = on_response

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            self.flow.resume_reading()
        self._on_response()

    def detach(self) -> None:
        """Forget the request; the transport goes on without it."""
        self.server_state.connections.discard(self)
        self.parser = None  # type: ignore[assignment]  # as uvicorn does; it breaks a cycle
        self._on_response = _nothing

    def end_after_this(self) -> None:
        """The connection closes with this response."""
        if self.cycle is not None:
            self.cycle.keep_alive = False


def _nothing() -> None:
    pass


class AppGateway:
    """Opens ``AppSession``s for one ASGI app."""

    def __init__(self, app: Any) -> None:
        self._config = Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
        )
        self._config.load()
        self._state = ServerState()

    def open(self, transport: asyncio.Transport, head: RequestHead, length: int, limit: int) -> AppSession:
        """Return a session for the request with *head* whose body has *length* bytes, or is chunked."""
        return AppSession(self._config, self._state, transport, head, length, limit)

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """The requests that are being served."""
        return self._state.tasks


class AppSession:
    """One request and its response. Knows where the request ends, and when both directions are done."""

    __slots__ = ("_decoder", "_left", "_limit", "_on_end", "_protocol", "body_complete", "responded")

    def __init__(
        self,
        config: Config,
        state: ServerState,
        transport: asyncio.Transport,
        head: RequestHead,
        length: int,
        limit: int,
    ) -> None:
        self._on_end: Callable[[], None] = _nothing
        self._decoder = ChunkedDecoder() if head.chunked else None
        self._left = length
        self._limit = limit
        self.body_complete = length == 0 and not head.chunked
        self.responded = False
        self._protocol: AppRequest | None = AppRequest(config, state, self._response_complete)
        self._protocol.connection_made(transport)

    def start(self, raw_head: bytes, on_response: Callable[[], None], closes: bool) -> None:
        """Feed the head. *on_response* is called once, when the response was written."""
        assert self._protocol is not None
        self._on_end = on_response
        self._protocol.data_received(raw_head)
        if closes and self._protocol is not None:
            self._protocol.end_after_this()

    def feed(self, data: bytes, position: int) -> int:
        """Feed what belongs to the body, and return where that ends. Raise ``ProtocolError`` if it is malformed."""
        start = position
        if self._decoder is None:
            end = min(len(data), start + self._left)
            self._left -= end - start
            self.body_complete = self._left == 0
        else:
            try:
                end = self._decoder.feed(data, start, self._count)
            except ChunkError as error:
                raise ProtocolError(f"malformed body: {error}") from error
            if self._limit < 0:
                raise ProtocolError("the body is too large", 413)
            self.body_complete = self._decoder.done
        if end > start and self._protocol is not None:
            self._protocol.data_received(data[start:end])
        return end

    def _count(self, payload: bytes) -> None:
        self._limit -= len(payload)

    def _response_complete(self) -> None:
        self.responded = True
        if self._protocol is not None:
            self._protocol.detach()
            self._protocol = None
        on_end, self._on_end = self._on_end, _nothing
        on_end()

    def connection_lost(self, error: Exception | None) -> None:
        if self._protocol is not None:
            protocol, self._protocol = self._protocol, None
            protocol.connection_lost(error)

    def pause_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.resume_writing()
