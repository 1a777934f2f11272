"""HTTP/1.1 heads: one strict grammar for requests and responses, and what is rewritten on their way through.

Owns what is dropped, kept and refused. Does no I/O and holds no state. A head is accepted only if it matches RFC 9112
without any leniency (no obs-fold, bare LF or CR, whitespace before a colon, several or malformed lengths, length and
coding together), because whatever two parsers read differently is a way to smuggle a request. One regular expression
over the whole head is that grammar: there are no leniency flags to get wrong, it costs 2 us, and a property test holds
it against llhttp.

A parsed head can be recognised when it comes again, see known_heads.py.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import unquote

from mesh.api.auth import bearer_token, credential_digests
from mesh.api.responses import ProtocolError

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_FIELDS = rb"(?:" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*+\r\n)*+\r\n"
_REQUEST = re.compile(rb"(?P<method>" + _TOKEN + rb") (?P<target>[\x21-\x7e]+) HTTP/1\.(?P<minor>[01])\r\n" + _FIELDS)
_RESPONSE = re.compile(
    rb"HTTP/1\.(?P<minor>[01]) (?P<status>[1-9][0-9]{2})(?P<reason> [\t\x20-\x7e\x80-\xff]*)?\r\n" + _FIELDS
)
_OTHER_VERSION = re.compile(_TOKEN + rb" [\x21-\x7e]+ HTTP/[0-9]\.[0-9]\r\n")
_ABSOLUTE_FORM = re.compile(rb"https?://[^/?#]+", re.IGNORECASE)
SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@~-]{1,128}")
MAX_LENGTH_DIGITS = 15
_CONTENT_TYPE = re.compile(rb"\r\ncontent-type:[ \t]*([^\r]*)", re.IGNORECASE)

_HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"proxy-connection",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
    b"content-length",  # written anew: the body may have been chunked or rewritten
}
#: What a child must not see: the client's credentials and cookies (trap 102), and what we say ourselves.
#: Accept-Encoding, because a compressed answer could not be counted.
_NOT_FOR_CHILDREN = _HOP_BY_HOP | {
    b"host",
    b"expect",
    b"authorization",
    b"x-api-key",
    b"api-key",
    b"cookie",
    b"accept-encoding",
    b"x-request-id",
}
_NOT_FOR_CLIENTS = _HOP_BY_HOP | {b"x-request-id"}
_OURS = b"x-llama-mesh-"
_HOPS, _MODEL, _WAIT, _FORM, ERROR_FIELD = (_OURS + name for name in (b"hops", b"model", b"wait-ms", b"form", b"error"))
_MAX_WAIT_DIGITS = 12


@dataclass(frozen=True, slots=True)
class MeshFields:
    """What a node says about a request that it passes on. All but ``hops`` counts only on a link."""

    hops: int = 0  #: how many nodes have passed it on
    model: str | None = None  #: the profile's key, whatever the body says
    wait_s: float | None = None  #: how long it may still wait for a place
    before_bytes: int | None = None  #: of a form whose file stands last: how much stands before that


@dataclass(slots=True, eq=False)
class RequestHead:
    """What a request's head says. ``forward`` is what the child gets of it: request line and kept fields."""

    method: bytes
    target: bytes
    path: bytes
    query: bytes
    keep_alive: bool
    http10: bool
    chunked: bool
    expect: bytes | None
    credentials: tuple[bytes, ...]  #: digests of what may be a key, for the authenticator
    request_id: bytes | None  #: the client's, if it is fit to be logged and sent on
    forward: bytes
    before: bytes  #: the head up to its Content-Length digits; all of it if there are none
    after: bytes
    digits: int  #: how many there were the last time
    length: int  #: of the first request that had this head; later ones bring their own
    method_text: str  #: for the log, as is path_text
    path_text: str
    route: Any = None  #: the data plane's note
    mesh: MeshFields | None = None  #: if another node passed it on
    taken: bool = True  #: somebody else takes the body as it comes: the app, or the reader of a form
    id_last: bool = False  #: ``after`` ends where the request id begins, which is another one each time


@dataclass(slots=True, eq=False)
class ResponseHead:
    """What a response's head says. ``forward`` is what the client gets: status line and kept fields, no blank line."""

    status: int
    chunked: bool
    has_length: bool
    bodiless: bool  #: by its status, whatever its length says
    closes: bool  #: the connection cannot be used again
    event_stream: bool
    forward: bytes
    before: bytes
    after: bytes
    digits: int
    length: int
    refusal: str | None = None  #: the type of error, if a peer itself says no, not the instance behind it


def parse_request(head: bytes, key_header: bytes) -> RequestHead:
    """Parse *head*, which ends with its blank line; *key_header* is the lower-case name of the API key's header.

    Raise ``ProtocolError`` with the status to answer; the connection cannot be used after that.
    """
    found = _REQUEST.fullmatch(head)
    if found is None:
        if _OTHER_VERSION.match(head) and not re.match(rb"[^\r]* HTTP/1\.[01]\r\n", head):
            raise ProtocolError("only HTTP/1.1 is spoken here", 505)
        raise ProtocolError("malformed HTTP request")
    fields = _Fields(head, found.end("minor") + 2)
    http10 = found["minor"] == b"0"
    _check_host(fields, http10)
    chunked = fields.chunked()
    if chunked and http10:
        raise ProtocolError("Transfer-Encoding is not part of HTTP/1.0")
    length, before, after = fields.length(head, chunked)
    target = _origin_form(found["target"])
    path, _, query = target.partition(b"?")
    authorization = fields.first(b"authorization")
    request_id = fields.first(b"x-request-id")
    kept = fields.without(_not_for_children(key_header))
    return RequestHead(
        method=found["method"],
        target=target,
        path=path,
        query=query,
        keep_alive=not http10 and b"close" not in fields.connection,
        http10=http10,
        chunked=chunked,
        expect=None if http10 else fields.first(b"expect"),
        credentials=credential_digests(
            None if authorization is None else bearer_token(authorization), fields.first(key_header)
        ),
        request_id=request_id if request_id is not None and SANE_ID.fullmatch(request_id) else None,
        forward=b"%b %b HTTP/1.1\r\n%b" % (found["method"], target, kept),
        before=before,
        after=after,
        digits=len(str(length)),
        length=length,
        method_text=found["method"].decode("ascii"),
        path_text=path.decode("ascii"),
        mesh=_mesh_fields(fields) if fields.has(_HOPS) else None,
    )


def parse_response(head: bytes, *, of_peer: bool = False) -> ResponseHead:
    """Parse an instance's *head*, which ends with its blank line; raise ``ProtocolError`` if it is malformed.

    A peer's head (*of_peer*) keeps what it says of who served, and may carry its refusal.
    """
    found = _RESPONSE.fullmatch(head)
    if found is None:
        raise ProtocolError("malformed response head")
    status = int(found["status"])
    start = found.end("reason") if found["reason"] is not None else found.end("status")
    fields = _Fields(head, start + 2)
    chunked = fields.chunked()
    length, before, after = fields.length(head, chunked)
    http10 = found["minor"] == b"0"
    has_length = bool(after)
    content_type = fields.first(b"content-type") or b""
    event_stream = content_type.lower().startswith(b"text/event-stream")
    refusal = fields.first(ERROR_FIELD) if of_peer else None
    kept = fields.without(_NOT_FOR_CLIENTS | {ERROR_FIELD}, ours=of_peer)
    if event_stream and fields.first(b"x-accel-buffering") is None:
        kept += b"X-Accel-Buffering: no\r\n"  # trap 77: a proxy in front of us must not collect events either
    return ResponseHead(
        status=status,
        chunked=chunked,
        has_length=has_length,
        bodiless=status in (204, 304),
        closes=http10 or b"close" in fields.connection or not (chunked or has_length or status in (204, 304)),
        event_stream=event_stream,
        forward=b"HTTP/1.1 %b%b\r\n%b" % (found["status"], found["reason"] or b" ", kept),
        before=before,
        after=after,
        digits=len(str(length)),
        length=length,
        refusal=None if refusal is None else refusal.decode("latin-1"),
    )


def content_type(head: RequestHead | ResponseHead) -> str:
    """Return what *head* says of its body; empty if it says nothing. Looked up only where it matters."""
    found = _CONTENT_TYPE.search(head.forward)
    return "" if found is None else found[1].strip(b" \t").decode("latin-1")


@cache
def _not_for_children(key_header: bytes) -> Set[bytes]:
    return frozenset(_NOT_FOR_CHILDREN | {key_header})


class _Fields:
    """The fields of one head that matched the grammar, in order, as they were sent."""

    __slots__ = ("_lines", "_names", "_values", "connection")

    def __init__(self, head: bytes, start: int) -> None:
        self._lines = head[start:-4].split(b"\r\n") if start < len(head) - 2 else []
        self._names: list[bytes] = []
        self._values: dict[bytes, list[bytes]] = {}
        for line in self._lines:
            name, _, value = line.partition(b":")
            name = name.lower()
            self._names.append(name)
            if name in self._values:
                self._values[name].append(value)
            else:
                self._values[name] = [value]
        tokens = [t.strip().lower() for v in self.all(b"connection") for t in v.split(b",")]
        self.connection = frozenset(tokens)

    def all(self, name: bytes) -> list[bytes]:
        return [value.strip(b" \t") for value in self._values.get(name, ())]

    def has(self, name: bytes) -> bool:
        return name in self._values

    def first(self, name: bytes) -> bytes | None:
        values = self._values.get(name)
        return None if values is None else values[0].strip(b" \t")

    def chunked(self) -> bool:
        """Whether the message is chunked; no other coding is understood."""
        codings = self.all(b"transfer-encoding")
        if not codings:
            return False
        if [c.lower() for c in codings] != [b"chunked"]:
            raise ProtocolError("unsupported Transfer-Encoding", 501)
        return True

    def length(self, head: bytes, chunked: bool) -> tuple[int, bytes, bytes]:
        """Return the Content-Length, and the head before and after its digits; 0, all and nothing without one."""
        found = self.all(b"content-length")
        if not found:
            return 0, head, b""
        digits = found[0]
        if len(found) > 1 or chunked:
            raise ProtocolError("the length of the body is ambiguous")
        if not digits.isdigit() or len(digits) > MAX_LENGTH_DIGITS:
            raise ProtocolError("malformed Content-Length")
        line = self._lines[self._names.index(b"content-length")]
        at = head.index(b"\r\n" + line + b"\r\n") + 2 + line.index(digits)
        return int(digits), head[:at], head[at + len(digits) :]

    def without(self, names: Set[bytes], *, ours: bool = False) -> bytes:
        """Return the fields verbatim but for *names*, those the sender meant for the next hop only, and our own.

        With *ours*, our own are kept.
        """
        dropped = names if self.connection <= names else names | self.connection
        kept = [
            line
            for line, name in zip(self._lines, self._names, strict=True)
            if name not in dropped and (ours or not name.startswith(_OURS))
        ]
        return b"\r\n".join([*kept, b""])


def _mesh_fields(fields: _Fields) -> MeshFields:
    """Return what another node says of a request that it passed on. There is one hop count (trap 60)."""
    hops = fields.all(_HOPS)
    if len(hops) > 1 or not hops[0].isdigit() or len(hops[0]) > 4:
        raise ProtocolError("Invalid X-Llama-Mesh-Hops header value")
    model, wait, form = fields.first(_MODEL), fields.first(_WAIT), fields.first(_FORM)
    known_wait = wait is not None and wait.isdigit() and len(wait) <= _MAX_WAIT_DIGITS
    known_form = form is not None and form.isdigit() and len(form) <= _MAX_WAIT_DIGITS
    return MeshFields(
        hops=int(hops[0]),
        model=None if model is None else unquote(model.decode("ascii", "replace")),
        wait_s=int(wait) / 1000 if wait is not None and known_wait else None,
        before_bytes=int(form) if form is not None and known_form else None,
    )


def _check_host(fields: _Fields, http10: bool) -> None:
    hosts = len(fields.all(b"host"))
    if hosts > 1 or (hosts == 0 and not http10):
        raise ProtocolError("a request needs exactly one Host")


def _origin_form(target: bytes) -> bytes:
    """Return *target* as a path; clients may send the whole URL, as they would to a forward proxy."""
    if target.startswith(b"/"):
        return target
    if (found := _ABSOLUTE_FORM.match(target)) is None:
        raise ProtocolError("the request target is not a path")
    rest = target[found.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest
