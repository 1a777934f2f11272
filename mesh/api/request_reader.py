"""The bytes of one client connection, cut into requests: heads, bodies, and what is sent ahead of its turn.

Does no I/O and answers nothing: it tells its owner what it has read, and the owner says ``next`` when it has answered.
``receive`` is the method for what comes next. Exactly one request is under way at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from mesh.api.chunked import ChunkedDecoder, ChunkError
from mesh.api.form_reader import upload_error
from mesh.api.http1 import RequestHead, parse_request
from mesh.api.known_heads import read_known, take_id, without_id
from mesh.api.responses import ProtocolError
from mesh.api.routes import BY_PATH, ModelIn, Route
from mesh.errors import BodyTooLargeError, MeshError

MAX_AHEAD_BYTES = 65536
_MAX_KNOWN_HEAD_BYTES = 8192
_VIEW_BYTES = 4096  # bodies beyond it are not copied out of the read they came in
_BARE_LF = re.compile(rb"(?<!\r)\n")


class Stage(Enum):
    """What the client owes."""

    HEAD = auto()  # nothing: between two requests
    PARTIAL_HEAD = auto()
    BODY = auto()
    HELD = auto()  # nothing: its request is complete, or is not read any further


# Looking a member up on its class costs 70 ns in Python 3.11, many times per request.
_HEAD, _PARTIAL_HEAD, _BODY, _HELD = Stage


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may be at most, and where its key may be."""

    head_bytes: int
    body_bytes: int
    key_header: bytes
    upload_bytes: int = 512 * 1024**2  #: of a form
    upload_memory_bytes: int = 1024**2  #: what is kept of it in memory

    def refusal(self, route: Route | None, length: int) -> MeshError | None:
        """Return why a body of *length* is too large, None if it is not."""
        if route is not None and route.model_in is ModelIn.FORM:
            return upload_error(self.upload_bytes) if length > self.upload_bytes else None
        return self.body_error() if length > self.body_bytes else None

    def body_error(self) -> MeshError:
        return BodyTooLargeError(f"the body is larger than http.request_body_limit_bytes ({self.body_bytes})")


class BodyTaker(Protocol):
    """Takes the bytes of a body as they come, instead of having them collected."""

    body_complete: bool

    def feed(self, data: bytes, position: int) -> int: ...


class Owner(Protocol):
    """Whoever answers the requests."""

    def judge(self, head: RequestHead, length: int) -> MeshError | None:
        """Return why the request is refused on its head alone, None if it is not."""

    def take(self, raw_head: bytes, head: RequestHead, length: int) -> BodyTaker:
        """Return who takes the body of a request that has no route here, or is a form; raise to refuse it."""

    def body_awaited(self, expects_continue: bool) -> None:
        """The head was read and some of the body is still to come."""

    def taken(self) -> None:
        """The taker has the whole body."""

    def complete(self, head: RequestHead, body: bytes | memoryview) -> None: ...
    def refused(self, error: MeshError, in_step: bool) -> None:
        """Answer *error*. If not *in_step*, what the client sends now means nothing: close."""

    def too_far_ahead(self) -> None:
        """Stop reading until the next request is begun."""


class RequestReader:
    """See the module."""

    __slots__ = (
        "_ahead",
        "_body_bytes",
        "_decoder",
        "_known",
        "_limits",
        "_missing",
        "_owner",
        "_parts",
        "_payload",
        "_position",
        "_serving",
        "_taker",
        "head",
        "of_peer",
        "receive",
        "stage",
    )

    def __init__(self, owner: Owner, limits: Limits) -> None:
        self._owner = owner
        self._limits = limits
        self._known: RequestHead | None = None  # the last head; the key in it lives no longer than the connection
        self.of_peer = False  #: whether another node is at the other end
        self.receive: Callable[[bytes], None] = self._read_head
        self.stage = _HEAD
        self.head: RequestHead | None = None  #: of the request under way
        self._ahead = b""  # from _position on: later requests, or a head that is not whole yet
        self._position = 0
        self._serving = False  # whether _serve_ahead is on the stack
        self._parts: list[bytes] = []
        self._payload = bytearray()  # of a chunked body, in one piece however small its chunks are
        self._missing = 0  # body bytes still to come
        self._body_bytes = 0
        self._decoder: ChunkedDecoder | None = None
        self._taker: BodyTaker | None = None

    @property
    def progress(self) -> int:
        """Another number whenever some of a body has come since."""
        return self._body_bytes - self._missing

    # --- heads

    def _read_head(self, data: bytes, position: int = 0) -> None:
        """Begin the request that starts at *position*."""
        known = self._known
        if known is not None:
            end, length = read_known(known, data, position)
            if end and known.id_last:
                end = take_id(known, data, end)
            if end:
                self._begin(known, length, data, position, end)
                return
        while data.startswith(b"\r\n", position):  # some clients end a body with one too many
            position += 2
        end = data.find(b"\r\n\r\n", position) + 4
        if end == 3:
            self._keep_partial_head(data[position:])
        elif end - position > self._limits.head_bytes:
            self._refuse(ProtocolError("the request's head is too large", 431))
        else:
            self._parse_head(data, position, end)

    def _parse_head(self, data: bytes, position: int, end: int) -> None:
        try:
            head = parse_request(data[position:end], self._limits.key_header)
        except ProtocolError as error:
            self._refuse(error)
            return
        methods = BY_PATH.get(head.path)
        head.route = route = None if methods is None else methods.get(head.method)
        head.taken = route is None or route.model_in is ModelIn.FORM
        self._known = head if end - position <= _MAX_KNOWN_HEAD_BYTES else None
        if self.of_peer:
            without_id(head)
        self._begin(head, head.length, data, position, end)

    def _keep_partial_head(self, data: bytes) -> None:
        if not data:
            return
        self._ahead, self._position = data, 0
        self.receive = self._read_more_head
        self.stage = _PARTIAL_HEAD
        self._owner.body_awaited(False)
        self._check_partial_head(0)

    def _read_more_head(self, data: bytes) -> None:
        seen = len(self._ahead)
        self._ahead += data
        if self._ahead.find(b"\r\n\r\n", max(0, seen - 3)) < 0:
            self._check_partial_head(max(0, seen - 1))
            return
        whole, self._ahead = self._ahead, b""
        self.receive = self._read_head
        self._read_head(whole)

    def _check_partial_head(self, start: int) -> None:
        """Refuse at once what can no longer become a head, instead of waiting for its end."""
        if len(self._ahead) > self._limits.head_bytes:
            self._refuse(ProtocolError("the request's head is too large", 431))
        elif _BARE_LF.search(self._ahead, start):
            self._refuse(ProtocolError("malformed HTTP request"))

    def _refuse(self, error: MeshError) -> None:
        self._owner.refused(error, in_step=False)

    # --- bodies

    def _begin(self, head: RequestHead, length: int, data: bytes, start: int, position: int) -> None:
        """A head is complete: it stands from *start* on, and its body from *position* on."""
        self.head = head
        self.receive = self._keep_ahead
        self.stage = _HELD
        end = position + length
        if (refusal := self._owner.judge(head, length)) is not None:
            self._refuse_unread(refusal, head, data, end)
        elif head.taken:
            self._pass_on(head, length, data, start, position)
        elif head.chunked:
            self._payload, self._body_bytes = bytearray(), 0
            self._decoder = ChunkedDecoder()
            self._await_body(self._read_chunks, data[position:])
        elif end <= len(data):
            self._ahead, self._position = data, end
            body = data[position:end] if length <= _VIEW_BYTES else memoryview(data)[position:end]
            self._owner.complete(head, body)
        else:
            self._parts, self._missing = [], length
            self._await_body(self._read_body, data[position:])

    def _refuse_unread(self, error: MeshError, head: RequestHead, data: bytes, end: int) -> None:
        """Refuse a request on its head; its body goes up to *end*, if that is known."""
        in_step = not head.chunked and end <= len(data) and head.expect is None
        self._ahead, self._position = data, end
        self._owner.refused(error, in_step)

    def _await_body(self, receive: Callable[[bytes], None], rest: bytes) -> None:
        assert self.head is not None
        self.receive = receive
        self.stage = _BODY
        # the app asks for the body itself, once it wants it
        self._owner.body_awaited(self.head.expect is not None and not rest and self.head.route is not None)
        if rest:
            receive(rest)

    def _read_body(self, data: bytes) -> None:
        missing = self._missing - len(data)
        if missing > 0:
            self._missing = missing
            self._parts.append(data)
            return
        self._missing = 0
        self._ahead, self._position = data, len(data) + missing
        self._parts.append(data[: self._position] if missing else data)
        body = b"".join(self._parts)
        self._parts = []
        self._body_complete(body)

    def _read_chunks(self, data: bytes) -> None:
        assert self._decoder is not None
        try:
            end = self._decoder.feed(data, 0, self._payload.extend)
        except ChunkError as error:
            self._refuse(ProtocolError(f"malformed body: {error}"))
            return
        self._body_bytes = size = len(self._payload)
        if size > self._limits.body_bytes:
            self._refuse(self._limits.body_error())
        elif self._decoder.done:
            self._ahead, self._position = data, end
            payload, self._payload = self._payload, bytearray()
            self._body_complete(bytes(payload) if size <= _VIEW_BYTES else memoryview(payload))

    def _body_complete(self, body: bytes | memoryview) -> None:
        assert self.head is not None
        self.receive = self._keep_ahead
        self.stage = _HELD
        self._decoder = None
        self._owner.complete(self.head, body)

    # --- bodies that somebody else takes as they come

    def _pass_on(self, head: RequestHead, length: int, data: bytes, start: int, position: int) -> None:
        try:
            taker = self._owner.take(data[start:position], head, length)
        except MeshError as error:
            self._refuse_unread(error, head, data, position + length)
            return
        if taker.body_complete:
            self._ahead, self._position = data, position
            return
        self._taker = taker
        self._await_body(self._read_for_taker, data[position:])

    def _read_for_taker(self, data: bytes) -> None:
        taker = self._taker
        if taker is None:
            return
        try:
            end = taker.feed(data, 0)
        except MeshError as error:
            self._refuse(error)
            return
        self._body_bytes += end
        if taker.body_complete and self.stage is _BODY:
            self._taker = None
            self._ahead, self._position = data, end
            self.receive = self._keep_ahead
            self.stage = _HELD
            self._owner.taken()

    # --- turns

    def next(self) -> None:
        """The request under way was answered: go on with what came ahead of its turn, or wait."""
        self.receive = self._read_head
        self.stage = _HEAD
        self._taker = None
        if self._position < len(self._ahead):
            if not self._serving:
                self._serve_ahead()
        elif self._ahead:
            self._ahead, self._position = b"", 0

    def stop(self) -> None:
        """Ignore whatever still comes."""
        self.receive = _ignore
        self.stage = _HELD
        self._ahead, self._position = b"", 0
        self._parts, self._payload, self._decoder, self._taker = [], bytearray(), None, None

    def _keep_ahead(self, data: bytes) -> None:
        self._ahead = self._ahead[self._position :] + data
        self._position = 0
        if len(self._ahead) > MAX_AHEAD_BYTES:
            self._owner.too_far_ahead()

    def _serve_ahead(self) -> None:
        """Begin the requests that came ahead, one after the other: a loop, because each may be over at once."""
        self._serving = True
        try:
            while self.stage is _HEAD and self._position < len(self._ahead):
                data, position = self._ahead, self._position
                self._ahead, self._position = b"", 0
                self._read_head(data, position)
        finally:
            self._serving = False


def _ignore(data: bytes) -> None:
    """What a connection that is closing does with more bytes; also breaks its cycle of references."""
