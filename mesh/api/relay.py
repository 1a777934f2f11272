"""An answer on its way from an instance to the client: its head rewritten, its body verbatim, framing included.

Owns where the message ends and what may follow. Never decides about retries or leases: its other half, the exchange,
is told by the three abstract methods. ``feed`` is the method for the current part of the message.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from mesh.api.chunked import ChunkedDecoder, ChunkError
from mesh.api.http1 import RequestHead, ResponseHead
from mesh.api.upstream import Pool
from mesh.api.usage import Timings, UsageMeter, read_timings, read_usage
from mesh.errors import UpstreamError

_CLOSE = b"Connection: close\r\n"


class Relay(ABC):
    """Carries one answer. ``write`` may be replaced at any time, when the client is gone.

    A base class of the exchange, not a part of it: a second object for each request would cost half a microsecond.
    """

    __slots__ = (
        "_decoder",
        "_head_end",
        "_left",
        "_meter",
        "_now",
        "_partial",
        "_pool",
        "_sink",
        "_tokens",
        "_whole",
        "bytes_out",
        "closes_client",
        "feed",
        "first_byte_at",
        "request",
        "request_id",
        "response",
        "until_close",
        "watched",
        "write",
    )

    _pool: Pool  # of the connection that the answer comes on

    def __init__(
        self,
        request: RequestHead,
        request_id: bytes,
        write: Callable[[bytes], object],
        now: Callable[[], float],
        watched: bool,
        *,
        to_peer: bool,
    ) -> None:
        """A node knows its request's id (*to_peer*); left out, the heads of a link are the same again and again."""
        self.request = request
        self.request_id = request_id
        self._head_end = b"\r\n" if to_peer else b"X-Request-Id: %b\r\n\r\n" % request_id
        self._now = now
        self.watched = watched  #: whether tokens are to be counted
        self.write = write
        self.feed: Callable[[bytes], None] = _ignore
        self.closes_client = False  #: the client's connection ends with this answer
        self.response: ResponseHead | None = None  #: None until its head was written
        self.until_close = False  #: the end of the connection is the end of the body
        self.bytes_out = 0
        self.first_byte_at: float | None = None  #: of the body, unless it came whole
        self._tokens = (0, 0)
        self._whole = b""  # a body that came in one piece
        self._partial = b""  # a head that is not whole yet
        self._left = 0  # body bytes still to come, if they are counted
        self._decoder: ChunkedDecoder | None = None
        self._meter: UsageMeter | None = None
        self._sink: Callable[[bytes], object] = _ignore  # looks at payload

    # --- what the exchange is told; after one of the last three, nothing is fed any more

    @abstractmethod
    def answer_begins(self) -> None:
        """Bytes of an answer have come. Told with each piece of its head; of a peer's, once it is no refusal."""

    @abstractmethod
    def answer_complete(self, reusable: bool) -> None:
        """The last byte was written; *reusable* tells whether the upstream connection is in step."""

    @abstractmethod
    def answer_broken(self, error: UpstreamError) -> None: ...

    @abstractmethod
    def answer_refused(self, head: ResponseHead, body: bytes, whole: bool) -> None:
        """A peer said no by itself; nothing was written. *whole* tells whether *body* is all of what it said."""

    # --- head

    def expect(self, pool: Pool, closes_client: bool) -> None:
        """Be ready for an answer from one of *pool*'s connections."""
        self._pool = pool
        self._partial = b""  # of a head that another one did not finish
        self.closes_client = closes_client
        self.feed = self._read_head

    def _read_head(self, data: bytes) -> None:
        of_peer = self._pool.of_peer
        if not of_peer:
            self.answer_begins()
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
            self.answer_broken(error)
            return
        if head is None:
            self._partial = data
            return
        rest = data[end:]
        if of_peer:
            if head.refusal is not None:
                self.answer_refused(head, rest, length == len(rest))
                return
            self.answer_begins()
        if length != len(rest) or not length or head.bodiless or self.request.method == b"HEAD":
            self._begin(head, length, rest)
            return
        # a small answer that came in one piece: most do
        self.response = head
        close = _CLOSE if self.closes_client else b""
        out = b"%bContent-Length: %d\r\n%b%b%b" % (
            head.forward,
            length,
            close,
            self._head_end,
            rest,
        )
        self.bytes_out = len(out)
        self.write(out)
        if self.watched and head.status == 200:
            self._tokens = read_usage(rest)
            self._whole = rest
        self.answer_complete(not head.closes)

    def _begin(self, head: ResponseHead, length: int, rest: bytes) -> None:
        """Send the head on, together with as much of the body as came with it."""
        self.response = head
        bodiless = head.bodiless or self.request.method == b"HEAD"
        out = self._rewrite(head, length, bodiless)
        if bodiless or (head.has_length and length == 0):
            self._write(out)
            self.answer_complete(not (head.closes or rest))
        elif not head.has_length:
            self._begin_open_ended(head, out, rest)
        else:
            self._write(out)
            self._left = length
            self._begin_body(head, self._counted, rest)

    def _rewrite(self, head: ResponseHead, length: int, bodiless: bool) -> bytes:
        http10 = self.request.http10
        if head.has_length and head.status != 204:
            framing = b"Content-Length: %d\r\n" % length
        elif head.chunked and not http10 and head.status != 204:
            framing = b"Transfer-Encoding: chunked\r\n"
        else:
            framing = b""
            if not bodiless:
                self.closes_client = True
        if self.closes_client:
            framing += _CLOSE
        return b"%b%b%b" % (head.forward, framing, self._head_end)

    def _begin_open_ended(self, head: ResponseHead, out: bytes, rest: bytes) -> None:
        if not head.chunked:
            self.until_close = True
            self._write(out)
            self._begin_body(head, self._until_close, rest)
            return
        self._decoder = ChunkedDecoder()
        if self.request.http10:
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
        if self.watched and head.status == 200:
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
        self.answer_complete(in_step and not self.response.closes)

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
            self.answer_broken(UpstreamError(f"the instance sent a malformed answer: {error}"))
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
            self.answer_broken(UpstreamError(f"the instance sent a malformed answer: {error}"))
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
        return self._tokens if self._meter is None else self._meter.tokens()

    def timings(self) -> Timings | None:
        """Return what the instance measured, if the answer told."""
        return read_timings(self._whole if self._meter is None else self._meter.end)

    def stop(self) -> None:
        """Ignore what still comes, and break the cycle of references that ``feed`` is."""
        self.feed = self.write = self._sink = _ignore

    def last_words(self, event: bytes) -> bytes:
        """Return what carries *event* to a client whose event stream breaks off here, without ending the message."""
        if self.response is None or not self.response.event_stream:
            return b""
        event = b"\n\n" + event  # what came may end inside an event, and this one must not become a part of it
        if self._decoder is not None and not self.request.http10:
            return self._decoder.interruption(event)
        return event if self._decoder is not None or self.until_close else b""


def _ignore(data: bytes) -> None:
    """What an answer that is over does with more bytes."""
