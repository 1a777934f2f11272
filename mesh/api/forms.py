"""Where forms begin: who reads one, whose it is, and the exchange that carries it (form_exchange.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.api.delivery import Client
from mesh.api.form_exchange import FormExchange, StreamExchange, adapted
from mesh.api.form_reader import FormReader, ReceivedForm
from mesh.api.form_stream import FormStream
from mesh.api.http1 import RequestHead, content_type
from mesh.api.request_reader import Limits
from mesh.api.routes import Route
from mesh.engine.kinds import kind_of
from mesh.errors import RequestError

if TYPE_CHECKING:
    from mesh.api.dataplane import DataPlane


def form_reader(head: RequestHead, length: int, limits: Limits) -> FormReader:
    """Return who takes the form that *head* announces; raise ``RequestError`` if it announces none."""
    if head.forward.lower().count(b"\r\ncontent-type:") > 1:
        raise RequestError("the request has more than one Content-Type: who reads it further on may take another one")
    return FormReader(
        content_type(head),
        None if head.chunked else length,
        limit_bytes=limits.upload_bytes,
        memory_bytes=limits.upload_memory_bytes,
    )


def form_exchange(
    plane: DataPlane,
    client: Client,
    head: RequestHead,
    form: FormReader | FormStream,
    request_id: bytes,
    since: float,
) -> FormExchange:
    """Return the exchange of a form that was read to its end, or to its file; raise ``MeshError`` if it is no use."""
    received = form.received() if isinstance(form, FormStream) else form.finish()
    try:
        route: Route = head.route
        profile, metrics = plane.find(_model(client, head, received), route)
        adapter = kind_of(profile).adapter
        upload = None
        if adapter is not None and profile.max_instances:  # what only peers have is for them to judge
            upload = adapted(adapter, route, received, profile)
        if isinstance(form, FormStream):
            return StreamExchange(plane, client, head, profile, metrics, received, upload, request_id, since, form)
        return FormExchange(plane, client, head, profile, metrics, received, upload, request_id, since)
    except BaseException:
        received.body.close()
        raise


def _model(client: Client, head: RequestHead, received: ReceivedForm) -> str | None:
    """Return the model that is asked for, None for the default."""
    if client.peer is not None and head.mesh is not None and head.mesh.model is not None:
        return head.mesh.model
    name = received.form.get("model")
    if name == "":
        raise RequestError("'model' must be a non-empty string", param="model")
    return name
