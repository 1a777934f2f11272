"""Requests that are not inference: one at a time, through uvicorn's HttpToolsProtocol, to the Starlette app.

The client's connection stays the transport's protocol and passes on exactly the bytes of one request. So uvicorn's
parser never sees the next one, which may be inference, and what frames a request is judged in one place only. (Handing
the transport itself over would leave bytes of the next request inside uvicorn's parser.)

Nor does it judge anything again: it is fed a canonical head, its method, path and query are put right afterwards, and
chunks are written anew. What its grammar does not know (a method, an upgrade to HTTP/2) is the app's to answer.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from mesh.api.chunked import ChunkedDecoder, ChunkError, chunk
from mesh.api.http1 import RequestHead
from mesh.api.responses import STATUS_LINES, ProtocolError, error_response

# What uvicorn has to say is either ours to log (requests) or said in the exception that it logs as an error.
logging.getLogger("uvicorn.access").propagate = False

_CONNECTION_FIELDS = re.compile(rb"(?im)^(?:connection|keep-alive|proxy-connection|upgrade|http2-settings):.*\n")


class AppRequest(HttpToolsProtocol):
    """uvicorn's protocol for the length of one request and its response. Its timers are not used: ours are."""

    def __init__(self, config: Config, state: ServerState, head: RequestHead, on_response: Callable[[], None]) -> None:
        super().__init__(config=config, server_state=state, app_state={})
        self._head = head
        self._on_response = on_response

    def on_headers_complete(self) -> None:
        """Make the request, and put right what the canonical head left out; the app runs in a later turn."""
        super().on_headers_complete()
        head = self._head
        self.scope["method"] = head.method_text
        self.scope["path"] = unquote(head.path_text)
        self.scope["raw_path"] = head.path
        self.scope["query_string"] = head.query
        self.scope.setdefault("state", {})["mesh_peer"] = self.transport.get_extra_info("mesh_peer")

    def send_400_response(self, msg: str) -> None:
        """Answer what our own parser let pass and uvicorn's did not: a bug, but still an envelope (trap 74)."""
        status, headers, body = error_response(ProtocolError(msg))
        lines = [STATUS_LINES[status], *(b"%b: %b\r\n" % header for header in headers)]
        lines.append(b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
        self.transport.write(b"".join((*lines, body)))
        self.transport.close()

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

    @property
    def response_begun(self) -> bool:
        return self.cycle is not None and self.cycle.response_started

    def withdraw(self) -> None:
        """Tell the app that the client left; whatever it still says is dropped."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not self.transport.is_closing():
            self.flow.resume_reading()
        self.detach()

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

    __slots__ = ("_decoder", "_head", "_left", "_limit", "_on_end", "_protocol", "body_complete", "responded")

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
        self._head = head
        self._protocol: AppRequest | None = AppRequest(config, state, head, self._response_complete)
        self._protocol.connection_made(transport)

    def start(self, raw_head: bytes, on_response: Callable[[], None], closes: bool) -> None:
        """Feed the head. *on_response* is called once, when the response was written."""
        assert self._protocol is not None
        self._on_end = on_response
        self._protocol.data_received(_canonical(raw_head, self._head))
        if closes and self._protocol is not None:
            self._protocol.end_after_this()

    def feed(self, data: bytes, position: int) -> int:
        """Feed what belongs to the body, and return where that ends. Raise ``ProtocolError`` if it is malformed."""
        start = position
        if self._decoder is None:
            end = min(len(data), start + self._left)
            self._left -= end - start
            self.body_complete = self._left == 0
            piece = data[start:end]
        else:
            end, piece = self._rechunk(self._decoder, data, start)
        if piece and self._protocol is not None:
            self._protocol.data_received(piece)
        return end

    def _rechunk(self, decoder: ChunkedDecoder, data: bytes, start: int) -> tuple[int, bytes]:
        """Return where the body ends in *data*, and the payload up to there as one plain chunk."""
        payload = bytearray()
        try:
            end = decoder.feed(data, start, payload.extend)
        except ChunkError as error:
            raise ProtocolError(f"malformed body: {error}") from error
        self._limit -= len(payload)
        if self._limit < 0:
            raise ProtocolError("the body is too large", 413)
        self.body_complete = decoder.done
        last = b"0\r\n\r\n" if decoder.done else b""
        return end, (chunk(payload) if payload else b"") + last

    def _response_complete(self) -> None:
        self.responded = True
        if self._protocol is not None:
            self._protocol.detach()
            self._protocol = None
        on_end, self._on_end = self._on_end, _nothing
        on_end()

    def withdraw(self) -> bool:
        """Take the request back from the app; False if it has begun its response."""
        protocol = self._protocol
        if protocol is None or protocol.response_begun:
            return False
        self._protocol, self._on_end = None, _nothing
        protocol.withdraw()
        return True

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


def _canonical(raw_head: bytes, head: RequestHead) -> bytes:
    """Return a head with the fields of *raw_head* in which uvicorn's parser finds nothing to refuse or to upgrade."""
    fields = _CONNECTION_FIELDS.sub(b"", raw_head[raw_head.index(b"\n") + 1 :])
    close = b"" if head.keep_alive or head.http10 else b"Connection: close\r\n"
    return b"GET / HTTP/1.%d\r\n%b%b" % (not head.http10, close, fields)
