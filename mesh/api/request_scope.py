"""Small reads and writes of an ASGI exchange that several handlers share: bodies, ids, waiting for the client to go."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from mesh.api.live_response import disconnected
from mesh.errors import BodyTimeoutError, BodyTooLargeError, RequestError
from mesh.tasks import spawn

T = TypeVar("T")

ADMIN_BODY_LIMIT_BYTES: Final = 65536
_NOT_JSON: Final = "the body must be sent as Content-Type: application/json"
_SANE_ID: Final = re.compile(rb"[!-~]{1,128}")


class UnsupportedMediaError(RequestError):
    """The body is not declared as JSON."""

    status = 415


def header(headers: list[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """Return the first value of *name* (lower-case), as ASGI servers deliver names."""
    return next((value for key, value in headers if key == name), None)


def sane_request_id(given: bytes | None) -> str | None:
    """Return the client's request id if it is short, printable ASCII, so that it can go into headers and logs."""
    return given.decode("ascii") if given is not None and _SANE_ID.fullmatch(given) else None


async def json_object(request: Request, *, timeout_s: float | None, optional: bool = False) -> dict[str, Any]:
    """Return the JSON object in the body of *request*, read under a limit and a timeout.

    The declared type must be JSON: a browser may send any other type across origins without asking first, and without
    auth an admin route would then be open to every web page that the operator visits. An *optional* body may be
    missing, with whatever type, but not where a web page asks: browsers say so themselves (Origin, on every POST).
    """
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = declared == "application/json"
    may_be_empty = optional and (is_json or "origin" not in request.headers)
    if not is_json and not may_be_empty:
        raise UnsupportedMediaError(_NOT_JSON)
    try:
        async with asyncio.timeout(timeout_s):
            body = await binary_body(request, ADMIN_BODY_LIMIT_BYTES)
    except TimeoutError as error:
        raise BodyTimeoutError("Request body read timed out") from error
    if may_be_empty and not body:
        return {}
    if not is_json:
        raise UnsupportedMediaError(_NOT_JSON)
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("Invalid JSON") from error
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    return value


async def binary_body(request: Request, limit_bytes: int) -> bytes:
    """Return the body of *request*; raise ``BodyTooLargeError`` beyond *limit_bytes*."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise BodyTooLargeError(f"the body is larger than {limit_bytes} bytes")
    return bytes(body)


def flag_of(body: dict[str, Any], name: str, default: bool) -> bool:
    """Return the value of the key *name*, which must be true or false if it is there."""
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise RequestError(f"'{name}' must be true or false", param=name)
    return value


def text_of(body: dict[str, Any], name: str) -> str | None:
    """Return the value of the key *name*, which must be text if it is there; null is as good as not there."""
    value = body.get(name)
    if value is not None and (not isinstance(value, str) or not value):
        raise RequestError(f"'{name}' must be a non-empty string", param=name)
    return value


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T], name: str) -> T:
    """Await *work*; cancel it and raise ``ClientDisconnect`` as soon as the client is gone.

    Only after the whole body was read: ``receive`` then has nothing but the disconnect to tell.
    """
    # not mesh.tasks.spawn: a failure is raised here, so logging it as a background task's would tell it twice
    task = asyncio.get_running_loop().create_task(work, name=name)
    gone = spawn(disconnected(request.receive), f"{name}: watch client")
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
