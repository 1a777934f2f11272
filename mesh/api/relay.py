"""An answer on its way from an instance to the client: its head rewritten, its body verbatim, framing included.

Owns where the message ends and what may follow. Never decides about retries or leases: it tells its owner, the
exchange, that the answer is complete or broken. ``feed`` is the method for the current part of the message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mesh.api.chunked import ChunkedDecoder, ChunkError
from mesh.api.http1 import RequestHead, ResponseHead
from mesh.api.upstream import Pool
from mesh.api.usage import UsageMeter, read_usage
from mesh.errors import UpstreamError


class Owner(Protocol):
    """Who is told how the answer goes. After one of the last two, nothing is fed any more."""

    def answer_begins(self) -> None:
        """The first byte of an answer has come."""

    def answer_complete(self, reusable: bool) -> None:
        """The last byte was written; *reusable* tells whether the upstream connection is in step."""

    def answer_broken(self, error: UpstreamError) -> None: ...


class Relay:
    """Carries one answer. ``write`` may be replaced at any time, when the client is gone."""

    __slots__ = (
        "_decoder",
        "_left",
        "_meter",
        "_now",
        "_owner",
        "_partial",
        "_pool",
        "_request",
        "_request_id",
        "_sink",
        "_watched",
        "begun",
        "bytes_out",
        "closes_client",
        "feed",
        "first_byte_at",
        "response",
        "tokens",
        "until_close",
        "write",
    )

    def __init__(
        self,
        owner: Owner,
        pool: Pool,
        request: RequestHead,
        request_id: bytes,
        write: Callable[[bytes], object],
        now: Callable[[], float],
        *,
        closes_client: bool,
        watched: bool,
    ) -> None:
        self._owner = owner
        self._pool = pool
        self._request = request
        self._request_id = request_id
        self._now = now
        self._watched = watched  # whether tokens are to be counted
        self.write = write
        self.begun = False
        self.feed: Callable[[bytes], None] = self._read_head
        self.closes_client = closes_client  #: the client's connection ends with this answer
        self.response: ResponseHead | None = None  #: None until its head was written
        self.until_close = False  #: the end of the connection is the end of the body
        self.bytes_out = 0
        self.first_byte_at: float | None = None  #: of the body, unless it came whole
        self.tokens = (0, 0)
        self._partial = b""  # a head that is not whole yet
        self._left = 0  # body bytes still to come, if they are counted
        self._decoder: ChunkedDecoder | None = None
        self._meter: UsageMeter | None = None
        self._sink: Callable[[bytes], object] = _ignore  # looks at payload

    def end(self) -> None:
        """Ignore what still comes, and let go of the owner."""
        self.feed = self.write = self._sink = _ignore

    # --- head

    def _read_head(self, data: bytes) -> None:
        if not self.begun:
            self.begun = True
            self._owner.answer_begins()
        if self._partial:
            data = self._partial + data
            self._partial = b""
        try:
            head, end, length = self._pool.read_head(data)
            while head is not None and head.status < 200:  # 100 Continue and the like are between us and the child
                if head.status == 101:
                    raise UpstreamError("the instance switched protocols unasked")
                data = data[end:]
                head, end, length = self._pool.read_head(data)
        except UpstreamError as error:
            self._owner.answer_broken(error)
            return
        if head is None:
            self._partial = data
        else:
            self._begin(head, length, data[end:])

    def _begin(self, head: ResponseHead, length: int, rest: bytes) -> None:
        """Send the head on, together with as much of the body as came with it."""
        self.response = head
        bodiless = self._request.method == b"HEAD" or head.status == 204 or head.status == 304
        out = self._rewrite(head, length, bodiless)
        if bodiless or (head.has_length and length == 0):
            self._write(out)
            self._owner.answer_complete(not (head.closes or rest))
        elif not head.has_length:
            self._begin_open_ended(head, out, rest)
        elif len(rest) == length:  # a small answer that came in one piece
            out += rest
            self.bytes_out = len(out)
            self.write(out)
            if self._watched and head.status == 200:
                self.tokens = read_usage(rest)
            self._owner.answer_complete(not head.closes)
        else:
            self._write(out)
            self._left = length
            self._begin_body(head, self._counted, rest)

    def _rewrite(self, head: ResponseHead, length: int, bodiless: bool) -> bytes:
        http10 = self._request.http10
        if head.has_length and head.status != 204:
            framing = b"Content-Length: %d\r\n" % length
        elif head.chunked and not http10 and head.status != 204:
            framing = b"Transfer-Encoding: chunked\r\n"
        else:
            framing = b""
            if not bodiless:
                self.closes_client = True
        if self.closes_client:
            framing += b"Connection: close\r\n"
        return b"%b%bX-Request-Id: %b\r\n\r\n" % (head.forward, framing, self._request_id)

    def _begin_open_ended(self, head: ResponseHead, out: bytes, rest: bytes) -> None:
        if not head.chunked:
            self.until_close = True
            self._write(out)
            self._begin_body(head, self._until_close, rest)
            return
        self._decoder = ChunkedDecoder()
        if self._request.http10:
            self._write(out)
            self._begin_body(head, self._unchunked, rest)
        elif rest:
            self._begin_body(head, self._chunked, b"")
            self._chunked(rest, out)  # the head and the first events in one write
        else:
            self._write(out)
            self._begin_body(head, self._chunked, b"")

    # --- body

    def _begin_body(self, head: ResponseHead, feed: Callable[[bytes], None], rest: bytes) -> None:
        if self._watched and head.status == 200:
            self._meter = UsageMeter()
            self._sink = self._meter.event_bytes if head.event_stream else self._meter.body_bytes
        self.feed = feed
        if rest:
            feed(rest)

    def _write(self, data: bytes) -> None:
        self.bytes_out += len(data)
        self.write(data)

    def _complete(self, in_step: bool) -> None:
        assert self.response is not None
        self._owner.answer_complete(in_step and not self.response.closes)

    def _counted(self, data: bytes) -> None:
        left = self._left - len(data)
        excess = left < 0
        if excess:
            data = data[:left]
            left = 0
        self._left = left
        if self.first_byte_at is None:
            self.first_byte_at = self._now()
        self._write(data)
        self._sink(data)
        if left == 0:
            self._complete(not excess)

    def _until_close(self, data: bytes) -> None:
        if self.first_byte_at is None:
            self.first_byte_at = self._now()
        self._write(data)
        self._sink(data)

    def _chunked(self, data: bytes, head: bytes = b"") -> None:
        decoder = self._decoder
        assert decoder is not None
        try:
            end = decoder.feed(data, 0, self._sink)
        except ChunkError as error:
            self._write(head)
            self._owner.answer_broken(UpstreamError(f"the instance sent a malformed answer: {error}"))
            return
        in_step = end == len(data)
        if not in_step:
            data = data[:end]
        if head:
            data = head + data
        if self.first_byte_at is None:
            self.first_byte_at = self._now()
        self.bytes_out += len(data)
        self.write(data)
        if decoder.done:
            self._complete(in_step)

    def _unchunked(self, data: bytes) -> None:
        """For an HTTP/1.0 client, which does not know chunks: the payload only, ended by the close."""
        decoder = self._decoder
        assert decoder is not None
        try:
            end = decoder.feed(data, 0, self._write_and_watch)
        except ChunkError as error:
            self._owner.answer_broken(UpstreamError(f"the instance sent a malformed answer: {error}"))
            return
        if decoder.done:
            self._complete(end == len(data))

    def _write_and_watch(self, payload: bytes) -> None:
        if self.first_byte_at is None:
            self.first_byte_at = self._now()
        self._write(payload)
        self._sink(payload)

    # --- the end

    def count_tokens(self) -> tuple[int, int]:
        """Return (prompt, generated) tokens as far as the answer told."""
        return self.tokens if self._meter is None else self._meter.tokens()

    def last_words(self, event: bytes) -> bytes:
        """Return what carries *event* to a client whose event stream breaks off here, without ending the message."""
        if self.response is None or not self.response.event_stream:
            return b""
        event = b"\n\n" + event  # what came may end inside an event, and this one must not become a part of it
        if self._decoder is not None and not self._request.http10:
            return self._decoder.interruption(event)
        return event if self._decoder is not None or self.until_close else b""


def _ignore(data: bytes) -> None:
    """What an answer that is over does with more bytes; also breaks its cycle of references."""
