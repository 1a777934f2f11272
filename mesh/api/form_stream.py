"""A form on its way between two nodes: its file last, so that the second one need not keep it.

The node that a client's form came to has it whole, and keeps it until the answer begins (spool.py). It passes it on
with its parts as they came but in another order (``file_last``), and says how many bytes stand before the file's
content. Who knows that field reads as much as it takes to judge the form, stops reading the link, and hands the rest
to the instance as it comes, as soon as it has one (``FormStream``). Who does not know it takes it for any other form.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Protocol

from mesh.api.form_reader import FormParser, ReceivedForm, boundary_of
from mesh.api.http1 import RequestHead, content_type
from mesh.api.sender import ONE_PIECE_BYTES, StreamSender
from mesh.api.spool import SpooledBody
from mesh.core.audio_format import HEAD_BYTES, tags_bytes
from mesh.core.form import Form
from mesh.errors import RequestError

FORM_FIELD: Final = b"X-Llama-Mesh-Form: %d\r\n"
#: What may stand before the file: some copies of it are held in memory while the form waits for an instance.
MAX_BEFORE_BYTES = 128 * 1024
#: Tags (a picture of the cover) that a file may begin with: what it is stands behind them, and is looked at first.
MAX_TAGS_BYTES = 512 * 1024
#: Smaller files are not worth it; they are sent in one piece with all the rest.
MIN_FILE_BYTES = ONE_PIECE_BYTES


def file_last(form: Form, body: memoryview, boundary: bytes) -> tuple[bytes, memoryview, bytes] | None:
    """Return the *form* in *body* in three parts: what stands before its file, the file, the end.

    None if it has not exactly one file, or that is small, or there is much else, or its tags are so long that whoever
    gets it would have to hold too much before he knows what it is. Every part is as it came.
    """
    if len(form.files) != 1:
        return None
    file = form.files[0]
    others = len(body) - (file.end - file.start)
    if others > MAX_BEFORE_BYTES or file.end - file.start <= MIN_FILE_BYTES:
        return None
    if tags_bytes(body[file.start : file.end]) > MAX_TAGS_BYTES:
        return None
    before, after = bytes(body[: file.start]), bytes(body[file.end :])
    delimiter = b"\r\n--" + boundary
    own = before.rfind(delimiter + b"\r\n")  # no line of a part's head begins with dashes
    own = 0 if own < 0 else own + 2
    end = after.find(delimiter + b"--")
    return before[:own] + after[2 : end + 2] + before[own:], body[file.start : file.end], _end(boundary)


def _end(boundary: bytes) -> bytes:
    return b"\r\n--%b--\r\n" % boundary


class Owner(Protocol):
    """The connection that a form comes on."""

    def form_begins(self, stream: FormStream) -> None:
        """All that stands before its file is here, and so much of that as tells what it is."""

    def pause_form(self) -> None: ...
    def resume_form(self) -> None: ...


class FormStream:
    """Takes the body of a form that another node passes on with its file last, and gives the file away as it comes."""

    __slots__ = (
        "_before_bytes",
        "_buffer",
        "_closed",
        "_content_type",
        "_end",
        "_enough",
        "_file_bytes",
        "_head",
        "_left",
        "_owner",
        "_sender",
        "_to_come",
        "begun",
        "body_complete",
        "flowing",
        "length",
    )

    def __init__(self, kind: str, boundary: bytes, before_bytes: int, length: int, owner: Owner) -> None:
        self.length = length
        self.body_complete = False
        self.begun = False  #: its owner was told
        self.flowing = False  #: some of the file was given away, so it cannot be had again
        self._content_type = kind
        self._end = _end(boundary)
        self._before_bytes = before_bytes
        self._enough = before_bytes + HEAD_BYTES  # to judge it by, as far as is known
        self._file_bytes = self._to_come = length - before_bytes - len(self._end)
        self._left = length
        self._owner = owner
        self._head = b""  # what the form was judged by, and
        self._buffer = bytearray()  # what came after that, until it flows; then nothing is kept
        self._sender: StreamSender | None = None
        self._closed = False

    @property
    def file_bytes(self) -> int:
        return self._file_bytes

    @property
    def before(self) -> bytes:
        """What stands before the file. Only until it flows."""
        return bytes((self._head or self._buffer)[: self._before_bytes])

    @property
    def end(self) -> bytes:
        """What stands behind it."""
        return self._end

    @property
    def paused(self) -> bool:
        """Whether the instance does not take more at the moment."""
        return self._sender is not None and self._sender.paused

    @property
    def bytes_left(self) -> int:
        return self._left

    def feed(self, data: bytes, position: int) -> int:
        """Take what belongs to the body, and return where that ends."""
        end = min(len(data), position + self._left)
        self._left -= end - position
        self.body_complete = self._left == 0
        if not self._closed:
            self._take(data[position:end])
        return end

    def _take(self, data: bytes) -> None:
        if self._sender is not None:
            self._pass_on(self._sender, data)
            return
        self._buffer += data
        if self.begun or len(self._buffer) < self._enough:
            return
        self._enough = self._before_bytes + self._tags_bytes() + HEAD_BYTES
        if len(self._buffer) >= self._enough and not self.body_complete:
            self._owner.pause_form()
            self.begin()

    def _tags_bytes(self) -> int:
        """Return how long the tags at the file's start are, as far as can be seen. Those that are too long are cut."""
        with memoryview(self._buffer) as seen:
            return min(tags_bytes(seen[self._before_bytes :]), MAX_TAGS_BYTES)

    def begin(self) -> None:
        """Tell the owner; called by it if the whole body came at once."""
        self.begun = True
        self._owner.form_begins(self)

    def received(self) -> ReceivedForm:
        """Return the form, whose file ends after its first bytes; raise ``RequestError`` if it is not as was said."""
        parser = FormParser(self._content_type)
        parser.feed(self.before + self._end)  # as if the file were empty
        found = parser.form
        alone = parser.complete and parser.ends_with_file and len(found.files) == 1
        if not alone or found.files[0].start < found.files[0].end:
            raise RequestError("malformed multipart form: its file is not where it was said to be")
        start = self._before_bytes
        file = replace(found.files[0], start=start, end=start + self._file_bytes)
        self._head = bytes(self._buffer[: self._enough])
        del self._buffer[: self._enough]
        return ReceivedForm(Form(found.fields, (file,)), SpooledBody(memoryview(self._head)))

    # --- to the instance

    def flow(self, sender: StreamSender) -> None:
        """Give *sender* what is here of the file, and the rest as it comes."""
        self.flowing = True
        self._sender = sender
        held = b"".join((self._head, self._buffer))[self._before_bytes :]
        self._head, self._buffer = b"", bytearray()
        self._pass_on(sender, held)
        if not sender.paused:
            self.resume()

    def _pass_on(self, sender: StreamSender, data: bytes) -> None:
        if not self._to_come:  # only the end is left, and the instance gets another one
            return
        content = data[: self._to_come]
        self._to_come -= len(content)
        sender.write(content)
        if not self._to_come:
            sender.end()

    def pause(self) -> None:
        if not self.body_complete and not self._closed:
            self._owner.pause_form()

    def resume(self) -> None:
        if not self.body_complete and not self._closed:
            self._owner.resume_form()

    def close(self) -> None:
        """Nobody wants the rest. Idempotent."""
        self._closed = True
        self._sender = None
        self._head, self._buffer = b"", bytearray()


def form_stream(head: RequestHead, length: int, owner: Owner) -> FormStream | None:
    """Return who takes the form that *head* announces, if another node passes it on with its file last."""
    before_bytes = None if head.mesh is None else head.mesh.before_bytes
    if before_bytes is None or head.chunked or before_bytes > MAX_BEFORE_BYTES:
        return None
    kind = content_type(head)
    boundary = boundary_of(kind)
    if length - before_bytes - len(_end(boundary)) <= MIN_FILE_BYTES:
        return None
    return FormStream(kind, boundary, before_bytes, length, owner)
