"""A multipart form, parsed while it comes: what its parts are called, and where in the body their contents are.

python-multipart knows the grammar; only offsets and short text fields are taken from it. The bytes go to a ``Spool``
as they came, so that the form can be passed on verbatim.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from mesh.api.chunked import ChunkedDecoder, ChunkError
from mesh.api.responses import ProtocolError
from mesh.api.spool import Spool, SpooledBody
from mesh.core.form import Form, FormFile
from mesh.errors import BodyTooLargeError, MeshError, RequestError

MAX_FIELD_BYTES = 65536
#: of all text fields together, names included: they are in memory, unlike files
MAX_TEXT_BYTES = 1 << 20
MAX_PARTS = 1000
#: So much of a body that is of no use is still read, so that its connection can be used again.
_WORTH_READING_BYTES = 1 << 20
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")

# What it has to say is in its exceptions, and in our answer; clients must not be able to fill a log.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL + 1)


class NotAFormError(RequestError):
    """The body is something else than a multipart form."""

    status = 415
    type = "unsupported_media_type"


@dataclass(slots=True)
class ReceivedForm:
    """A whole form and the body that its offsets are of."""

    form: Form
    body: SpooledBody


class FormParser:
    """Follows the bytes of a form. ``form`` is valid once it is ``complete``."""

    def __init__(self, content_type: str) -> None:
        self._fields: list[tuple[str, str]] = []
        self._files: list[FormFile] = []
        self.complete = False
        self._parts = 0
        self._text_bytes = 0
        self._chunk = b""
        self._base = 0  # offset of the chunk in the body
        self._begin_part()
        callbacks = {
            "on_part_begin": self._part_begins,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_ends,
            "on_part_data": self._content,
            "on_part_end": self._part_ends,
            "on_end": self._form_ends,
        }
        self._parser = MultipartParser(boundary_of(content_type), callbacks)  # type: ignore[arg-type]

    def feed(self, data: bytes) -> None:
        """Take the next bytes; raise ``RequestError`` if they are no form, or too much of one."""
        self._chunk = data
        try:
            self._parser.write(data)
        except FormParserError as error:
            if not self._parts:
                raise RequestError(
                    "malformed multipart form: it does not begin with the boundary that its Content-Type names"
                ) from error
            raise RequestError(f"malformed multipart form: {error}") from error
        self._base += len(data)
        self._chunk = b""

    @property
    def form(self) -> Form:
        return Form(tuple(self._fields), tuple(self._files))

    @property
    def ends_with_file(self) -> bool:
        """Whether the last part is a file."""
        return self._filename is not None

    # --- what the parser tells

    def _begin_part(self) -> None:
        self._name: str | None = None
        self._filename: str | None = None
        self._header = bytearray()
        self._value = bytearray()
        self._text = bytearray()
        self._start = 0
        self._size = 0

    def _part_begins(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise RequestError(f"the form has more than {MAX_PARTS} parts")
        self._begin_part()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ends(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value.decode("latin-1"))
            self._name = _text(options.get(b"name"))
            self._filename = _text(options.get(b"filename"))
            self._count_text(len(self._value))
        self._header.clear()
        self._value.clear()

    def _content(self, data: bytes, start: int, end: int) -> None:
        """Some of a part's content: of the chunk, or bytes right before it that might have been a boundary."""
        if not self._size:
            self._start = self._base + start if data is self._chunk else self._base - end
        self._size += end - start
        if self._filename is None:
            if self._size > MAX_FIELD_BYTES:
                raise BodyTooLargeError(
                    f"the form's field {self._name!r} has more than {MAX_FIELD_BYTES} bytes; a file needs a filename",
                    param=self._name,
                )
            self._count_text(end - start)
            self._text += data[start:end]

    def _count_text(self, more_bytes: int) -> None:
        self._text_bytes += more_bytes
        if self._text_bytes > MAX_TEXT_BYTES:
            raise BodyTooLargeError(f"the form's text fields have more than {MAX_TEXT_BYTES} bytes together")

    def _part_ends(self) -> None:
        if self._name is None:
            raise RequestError("malformed multipart form: a part has no Content-Disposition with a name")
        if self._filename is None:
            self._fields.append((self._name, self._text.decode("utf-8", "replace")))
        else:
            self._files.append(FormFile(self._name, self._filename, self._start, self._start + self._size))

    def _form_ends(self) -> None:
        self.complete = True


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")


def boundary_of(content_type: str) -> bytes:
    """Return the boundary of the form that *content_type* announces; raise ``RequestError`` if it announces none."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        got = content_type.partition(";")[0].strip()
        raise NotAFormError(
            "this path takes a multipart/form-data form with the audio in its field 'file', as OpenAI's clients send"
            f" it; the request {f'is {got[:100]}' if got else 'has no Content-Type'}"
        )
    boundary = options.get(b"boundary", b"").decode("latin-1")
    if _BOUNDARY.fullmatch(boundary) is None:
        raise RequestError("malformed multipart form: its Content-Type has no valid boundary")
    return boundary.encode("ascii")


class FormReader:
    """Takes the body of one request, *length* bytes or chunked (None). Ends with ``finish`` or ``close``."""

    def __init__(self, content_type: str, length: int | None, *, limit_bytes: int, memory_bytes: int) -> None:
        """Raise ``RequestError`` if the head alone says that it is no form."""
        self._parser = FormParser(content_type)
        if length == 0:
            raise RequestError("malformed multipart form: the body is empty")
        self._spool = Spool(memory_bytes)
        self._left = length or 0
        self._limit_bytes = limit_bytes
        self._decoder = ChunkedDecoder() if length is None else None
        self._error: MeshError | None = None
        self.body_complete = False

    def feed(self, data: bytes, position: int) -> int:
        """Take what belongs to the body, and return where that ends.

        Raise ``MeshError`` if the body is of no use and the rest of it not worth reading; what is said later, by
        ``finish``, leaves the connection in step.
        """
        if self._decoder is not None:
            return self._feed_chunks(self._decoder, data, position)
        end = min(len(data), position + self._left)
        self._left -= end - position
        self.body_complete = self._left == 0
        self._take(data[position:end])
        if self._error is not None and self._left > _WORTH_READING_BYTES:
            raise self._error
        return end

    def _feed_chunks(self, decoder: ChunkedDecoder, data: bytes, position: int) -> int:
        payload = bytearray()  # of all of *data* at once: chunks may be of one byte each
        try:
            end = decoder.feed(data, position, payload.extend)
        except ChunkError as error:
            raise ProtocolError(f"malformed body: {error}") from error
        if payload:
            self._take(bytes(payload))
        self.body_complete = decoder.done
        if self._error is not None and not decoder.done:
            raise self._error
        return end

    def _take(self, data: bytes) -> None:
        if self._error is not None:
            return
        try:
            if self._spool.size + len(data) > self._limit_bytes:
                raise upload_error(self._limit_bytes)
            self._spool.write(data)
            self._parser.feed(data)
        except MeshError as error:
            self._error = error
            self._spool.close()

    def finish(self) -> ReceivedForm:
        """Return the form, whose body is the caller's to close; raise ``MeshError`` if there is none."""
        if self._error is not None:
            raise self._error
        if not self._parser.complete:
            self._spool.close()
            raise RequestError("malformed multipart form: it ends before its closing boundary")
        return ReceivedForm(self._parser.form, self._spool.finish())

    def close(self) -> None:
        """The request is over before its end. Idempotent."""
        self._spool.close()


def upload_error(limit_bytes: int) -> MeshError:
    """Return the answer to a form that is too large."""
    return BodyTooLargeError(f"the form is larger than http.upload_limit_bytes ({limit_bytes})")
