"""Heads that come again: a parsed head is recognised by its bytes, which costs two comparisons instead of a parse.

It remembers the bytes before and after its Content-Length digits. A next head that has the same bytes there is the same
head: the same client sends the same head. Of a request that a node passes on, the id is left out, too: nodes write it
last, and it is another one each time.
"""

from __future__ import annotations

import re
from typing import Protocol

from mesh.api.http1 import MAX_LENGTH_DIGITS, SANE_ID, RequestHead

_MAX_ID_BYTES = 128
_ID_FIELD = b"\r\nX-Request-Id: "
_ID_LAST = re.compile(_ID_FIELD + SANE_ID.pattern + rb"\r\n\r\n")


class _Known(Protocol):
    @property
    def before(self) -> bytes: ...
    @property
    def after(self) -> bytes: ...

    digits: int


def read_known(known: _Known, data: bytes, position: int = 0) -> tuple[int, int]:
    """If *known*'s head stands at *position*, return where it ends and its Content-Length, else (0, 0)."""
    before = known.before
    if not data.startswith(before, position):
        return 0, 0
    after = known.after
    start = position + len(before)
    if not after:
        return start, 0
    stop = start + known.digits
    digits = data[start:stop]
    if digits.isdigit() and data.startswith(after, stop):
        return stop + len(after), int(digits)
    stop = data.find(b"\r", start, start + MAX_LENGTH_DIGITS + 1)
    digits = data[start:stop]
    if stop < 0 or not digits.isdigit() or not data.startswith(after, stop):
        return 0, 0
    known.digits = len(digits)
    return stop + len(after), int(digits)


def without_id(head: RequestHead) -> None:
    """Let *head* be known again with another request id, if that stands at its end, as nodes write it."""
    if _ID_LAST.fullmatch(head.after):
        head.after = _ID_FIELD
        head.id_last = True


def take_id(head: RequestHead, data: bytes, position: int) -> int:
    """Read the id of a request whose known *head* goes up to *position*; return where the head ends, 0 if not here."""
    stop = data.find(b"\r\n\r\n", position, position + _MAX_ID_BYTES + 4)
    if stop < 0:
        return 0
    request_id = data[position:stop]
    if not SANE_ID.fullmatch(request_id):
        return 0
    head.request_id = request_id
    return stop + 4
