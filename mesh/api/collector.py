"""A whole answer, collected, for those that cannot be sent on as they come. Sans-io, bounded."""

from __future__ import annotations

from mesh.api.chunked import ChunkedDecoder, ChunkError
from mesh.api.http1 import ResponseHead, content_type, parse_response
from mesh.api.responses import ProtocolError
from mesh.errors import UpstreamError

#: What an adapter makes of it is made on the loop, at some 60 ms per MiB of words; four hours of speech are 4 MiB.
MAX_ANSWER_BYTES = 16 * 1024**2
_MAX_HEAD_BYTES = 65536


class AnswerCollector:
    """Follows one answer. The rest is valid once it is ``complete``."""

    __slots__ = (
        "_buffer",
        "_decoder",
        "_head",
        "_left",
        "_limit_bytes",
        "body",
        "complete",
        "content_type",
        "reusable",
    )

    def __init__(self, limit_bytes: int = MAX_ANSWER_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._buffer = b""  # a head that is not whole yet
        self._head: ResponseHead | None = None
        self._decoder: ChunkedDecoder | None = None
        self._left = 0
        self.content_type = ""
        self.body = bytearray()
        self.complete = False
        self.reusable = False  #: whether the connection is in step, and may be used again

    @property
    def status(self) -> int:
        assert self._head is not None
        return self._head.status

    def feed(self, data: bytes) -> None:
        """Take the next bytes; raise ``UpstreamError`` if they are no answer, or too much of one."""
        if self._head is not None:
            self._read_body(self._head, data)
            return
        rest: bytes | None = self._buffer + data
        while rest is not None:
            rest = self._read_head(rest)

    def end(self) -> bool:
        """The connection was closed cleanly; return whether that ends the answer in order."""
        head = self._head
        if head is None or self.complete or head.chunked or head.has_length:
            return False
        self.complete = True
        return True

    def _read_head(self, data: bytes) -> bytes | None:
        """Take the head in *data*; return what follows it if that is another one."""
        end = data.find(b"\r\n\r\n") + 4
        if end > _MAX_HEAD_BYTES or (end == 3 and len(data) > _MAX_HEAD_BYTES):
            raise UpstreamError("the instance's response head is too large")
        if end == 3:
            self._buffer = data
            return None
        try:
            head = parse_response(data[:end])
        except ProtocolError as error:
            raise UpstreamError(f"the instance did not answer in HTTP: {error.message}") from error
        self._buffer = b""
        if head.status == 101:
            raise UpstreamError("the instance switched protocols unasked")
        if head.status < 200:  # between us and the child
            return data[end:] or None
        self._head = head
        self.content_type = content_type(head)
        self._left = head.length
        self._decoder = ChunkedDecoder() if head.chunked else None
        if head.length > self._limit_bytes:
            raise self._too_large()
        self._read_body(head, data[end:])
        return None

    def _read_body(self, head: ResponseHead, data: bytes) -> None:
        in_step = True
        if head.bodiless:
            self.complete, in_step = True, not data
        elif self._decoder is not None:
            in_step = self._read_chunks(self._decoder, data)
        elif head.has_length:
            self.body += data[: self._left]
            in_step = len(data) <= self._left
            self._left = max(0, self._left - len(data))
            self.complete = self._left == 0
        else:
            self.body += data
        if len(self.body) > self._limit_bytes:
            raise self._too_large()
        self.reusable = self.complete and in_step and not head.closes

    def _read_chunks(self, decoder: ChunkedDecoder, data: bytes) -> bool:
        try:
            end = decoder.feed(data, 0, self.body.extend)
        except ChunkError as error:
            raise UpstreamError(f"the instance sent a malformed answer: {error}") from error
        self.complete = decoder.done
        return end == len(data)

    def _too_large(self) -> UpstreamError:
        return UpstreamError(f"the instance's answer is larger than {self._limit_bytes} bytes")
