"""Builds the ASGI app for everything that is not inference: admin, builds, cluster, health, metrics, model listing
and what fits.

Inference is served by ``mesh.api.dataplane`` before a request ever gets here; what of it arrives has the wrong method.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from mesh.api import admin, builds, cluster, fits, health, models, observe
from mesh.api.access import AccessMiddleware, dialect_of
from mesh.api.context import NodeContext
from mesh.api.responses import MethodNotAllowedError, error_response
from mesh.api.routes import BY_PATH, Dialect
from mesh.errors import MeshError, RequestError


class NotFoundError(RequestError):
    """No route has this path."""

    status = 404
    type = "not_found"


def build_app(ctx: NodeContext) -> Starlette:
    """Return the app. It has no lifespan of its own: the node's start and stop belong to ``mesh.app``."""
    app = Starlette(
        routes=[
            *health.routes(ctx),
            *models.routes(ctx),
            *observe.routes(ctx),
            *cluster.routes(ctx),
            *fits.routes(ctx),
            *admin.routes(ctx),
            *builds.routes(ctx),
        ],
        middleware=[Middleware(AccessMiddleware, ctx=ctx)],
        exception_handlers={HTTPException: _http_exception, MeshError: _mesh_error},
    )
    app.router.redirect_slashes = False  # a POST that is redirected loses its body
    return app


async def _http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, as the envelope."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.scope["path"]
    rows = BY_PATH.get(path.encode())
    if rows:  # an inference route, asked with a method that it does not have
        allow = b", ".join(sorted(rows))
        return _envelope(_wrong_method(method, path, allow), dialect_of(path))
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "").encode("latin-1")
        return _envelope(_wrong_method(method, path, allow))
    return _envelope(NotFoundError(f"there is no route {method} {path}"))


def _wrong_method(method: str, path: str, allow: bytes) -> MeshError:
    return MethodNotAllowedError(f"{method} is not allowed for {path}", allow)


async def _mesh_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MeshError)
    return _envelope(error)


def _envelope(error: MeshError, dialect: Dialect = Dialect.OPENAI) -> Response:
    status, headers, body = error_response(error, dialect)
    response = Response(body, status)  # which adds the length
    response.raw_headers.extend((name.lower(), value) for name, value in headers)
    return response
