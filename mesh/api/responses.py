"""Errors as HTTP: the one way from a ``MeshError`` to status, headers and envelope, in the caller's dialect."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec

from mesh.api.routes import Dialect
from mesh.errors import MeshError, UnknownModelError

Headers = list[tuple[bytes, bytes]]

#: of a message, which may quote what the client sent; both ends of a longer one are shown
_MAX_MESSAGE_CHARACTERS = 16_384

#: Anthropic's names for the same failures; anything else is its ``api_error``.
_ANTHROPIC_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

#: Refusals that another node may not have for the same request: failures, and limits of this one.
_OF_THIS_NODE = frozenset({408, 413, 431, *range(500, 600)})

STATUS_LINES: Mapping[int, bytes] = {s: b"HTTP/1.1 %d %s\r\n" % (s, s.phrase.encode()) for s in HTTPStatus}


class ProtocolError(MeshError):
    """The bytes are not HTTP as we accept it; the connection is closed after the answer."""

    type = "invalid_request_error"

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status  # type: ignore[misc]  # here the status belongs to the case, not to the class


class HeadTimeoutError(ProtocolError):
    """The request's head did not arrive within ``http.head_read_timeout_ms``."""

    type = "request_timeout"


class RequestExpiredError(MeshError):
    """The request as a whole took longer than ``max_request_duration_ms``."""

    type = "request_timeout"

    def __init__(self, limit_s: float, *, queued: bool) -> None:
        where = "while it waited in the queue" if queued else "while the instance worked on it"
        text = f"Request timed out {where}: it took longer than {limit_s:g} s (max_request_duration_ms)"
        super().__init__(text, retry_after_s=5 if queued else None)
        self.status = 503 if queued else 502  # type: ignore[misc]  # as llamesh answers them


class MethodNotAllowedError(MeshError):
    """The path exists with other methods; ``allow`` lists them."""

    status = 405
    type = "invalid_request_error"

    def __init__(self, message: str, allow: bytes) -> None:
        super().__init__(message)
        self.allow = allow


def envelope(error: MeshError, dialect: Dialect, request_id: str | None = None) -> bytes:
    """Return *error* as the JSON object that clients of *dialect* expect.

    ``memory`` is there only if the error has such numbers; Anthropic's clients get what the message says of them.
    """
    message = _shown(error.message)
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
        detail = {"type": kind, "message": message}
        return msgspec.json.encode({"type": "error", "error": detail, "request_id": request_id})
    body: dict[str, Any] = {
        "message": message,
        "type": error.type,
        "param": error.param,
        "code": None,
        "source": error.source,
    }
    if error.details is not None:
        body["memory"] = dict(error.details)
    return msgspec.json.encode({"error": body})


def _shown(message: str) -> str:
    if len(message) <= _MAX_MESSAGE_CHARACTERS:
        return message
    half = _MAX_MESSAGE_CHARACTERS // 2
    return f"{message[:half]} ... {message[-half:]}"


def error_response(
    error: MeshError, dialect: Dialect = Dialect.OPENAI, request_id: str | None = None
) -> tuple[int, Headers, bytes]:
    """Return status, headers (without framing) and body of the answer to a request that failed with *error*."""
    body = envelope(error, dialect, request_id)
    headers: Headers = [(b"Content-Type", b"application/json")]
    if error.retry_after_s is not None:
        headers.append((b"Retry-After", b"%d" % error.retry_after_s))
    if error.status == 401:
        headers.append((b"WWW-Authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowedError):
        headers.append((b"Allow", error.allow))
    return error.status, headers, body


def raw_error(
    error: MeshError,
    dialect: Dialect,
    request_id: bytes,
    fields: bytes,
    *,
    to_peer: bool,
    keep_alive: bool,
    head_only: bool,
) -> bytes:
    """Return the whole answer, with our own *fields*. *head_only* for HEAD."""
    status, headers, body = error_response(error, dialect, request_id.decode("latin-1"))
    lines = [STATUS_LINES[status], *(b"%b: %b\r\n" % header for header in headers)]
    lines.append(b"Content-Length: %d\r\nX-Request-Id: %b\r\n" % (len(body), request_id))
    lines.append(fields)
    if to_peer and (error.status in _OF_THIS_NODE or error.type == UnknownModelError.type):
        lines.append(b"X-Llama-Mesh-Error: %b\r\n" % error.type.encode("latin-1"))  # others may do better
    lines.append(b"\r\n" if keep_alive else b"Connection: close\r\n\r\n")
    return b"".join(lines if head_only else (*lines, body))


def error_event(error: MeshError, dialect: Dialect, request_id: str | None = None) -> bytes:
    """Return *error* as the server-sent event that ends a stream whose status is already spent (trap 7)."""
    prefix = b"event: error\n" if dialect is Dialect.ANTHROPIC else b""
    return b"%sdata: %s\n\n" % (prefix, envelope(error, dialect, request_id))


def internal_error() -> MeshError:
    """Return the answer for a bug; its story is in the log, never in the answer."""
    return MeshError("internal error; the node's log has the details under this request's id")
