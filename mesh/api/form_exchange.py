"""A form's way through the node: passed on as it came or as its engine wants it, and the engine's answer put right.

What an engine wants is its adapter's (``mesh.engine.kind.FormAdapter``). A form is checked by it before it is queued,
so that no model is loaded for one that cannot be served. It is adapted only on the node whose instance serves it. An
adapted answer is collected, and goes to the client as one.

A peer gets the form as it came; a large one with its file last (form_stream.py), which it hands on as it comes and can
send to an instance only once (``StreamExchange``). If that instance is lost it says so, and the node that has the form
tries again, there or elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mesh.api.collector import AnswerCollector
from mesh.api.delivery import CRASH_NOTICE_S, Client, Phase
from mesh.api.exchange import Exchange
from mesh.api.form_reader import ReceivedForm, boundary_of
from mesh.api.form_stream import FORM_FIELD, FormStream, file_last
from mesh.api.http1 import RequestHead, ResponseHead, content_type
from mesh.api.responses import STATUS_LINES, internal_error
from mesh.api.routes import Route
from mesh.api.sender import ONE_PIECE_BYTES, Body, StreamedBody
from mesh.api.upstream import Pool, UpstreamConnection
from mesh.config.profile import Profile
from mesh.engine.kind import Answer, FormAdapter, Upload
from mesh.engine.lease import Endpoint
from mesh.errors import BodyTimeoutError, MeshError, UploadLostError, UpstreamError
from mesh.logs import Log
from mesh.metrics import ModelMetrics

if TYPE_CHECKING:
    from mesh.api.dataplane import DataPlane
    from mesh.api.peer_pool import PeerLease

_log = Log(__name__)


def adapted(adapter: FormAdapter, route: Route, received: ReceivedForm, profile: Profile) -> Upload:
    """Return *received* as its engine wants it; raise ``MeshError``, whatever the adapter raises."""
    try:
        return adapter.upload(route.path, received.form, received.body.view, profile)
    except MeshError:
        raise
    except Exception as error:
        _log.exception("a form could not be adapted", path=route.path, model=profile.id)
        raise internal_error() from error


class FormExchange(Exchange):
    """See the module."""

    __slots__ = ("_came", "_collector", "_lines_before", "_ordered", "_over", "_received", "_sent_again", "_upload")

    def __init__(
        self,
        plane: DataPlane,
        client: Client,
        head: RequestHead,
        profile: Profile,
        model_metrics: ModelMetrics,
        received: ReceivedForm,
        upload: Upload | None,
        request_id: bytes,
        since: float,
    ) -> None:
        view = received.body.view
        super().__init__(plane, client, head, profile, model_metrics, view, request_id, since)
        self._came: tuple[RequestHead, Body, int] = (head, view, len(view))
        self._ordered: tuple[bytes, memoryview, bytes] | None = None  # the form as peers get it, if not as it came
        self._sent_again = False  # after a peer's instance was lost with it
        self._received = received
        self._upload = upload
        self._collector: AnswerCollector | None = None  # of an adapted form, while its answer comes
        self._lines_before = 0  # in the instance's log
        self._over: Callable[[], None] | None = None  # tells the instance that has an adapted form that it may go

    # --- there

    def ask_peer(self, lease: PeerLease) -> None:
        view = self._received.body.view
        if self._ordered is None and len(view) > self._plane.limits.upload_memory_bytes:
            boundary = boundary_of(content_type(self._came[0]))
            self._ordered = file_last(self._received.form, view, boundary)
        if self._ordered is not None:
            lease.fields += FORM_FIELD % len(self._ordered[0])
        super().ask_peer(lease)

    def connected(self, connection: UpstreamConnection) -> None:
        """Send the form, as it came or as the instance wants it."""
        endpoint = connection.pool.endpoint
        self._collector = None
        self.request, self._body, self.bytes_in = self._came
        if isinstance(endpoint, Endpoint) and endpoint.adapter is not None:
            try:
                self._adapt(endpoint, endpoint.adapter)
            except MeshError as error:
                connection.abort()
                self.fail(error)
                return
        elif self._peer is not None and self._ordered is not None:
            self._body, self.bytes_in = self._ordered, sum(map(len, self._ordered))
        super().connected(connection)

    def _adapt(self, endpoint: Endpoint, adapter: FormAdapter) -> None:
        upload = self._upload
        if upload is None:  # it came to be served here only on its way
            upload = self._upload = adapted(adapter, self.route, self._received, endpoint.profile)
        fields = b"POST %b HTTP/1.1\r\nContent-Type: %b\r\n" % (upload.path, upload.content_type)
        self.request = replace(self.request, forward=fields)
        self._take_body(upload)
        self._collector = AnswerCollector()
        self._is_over()
        self._over = endpoint.begin_upload()
        endpoint.log_tail(0)  # what is on its way by now belongs to earlier requests
        self._lines_before = endpoint.log_lines()

    def _is_over(self) -> None:
        """The instance has answered, or was lost, or nobody wants its answer. Idempotent."""
        over, self._over = self._over, None
        if over is not None:
            over()

    def _take_body(self, upload: Upload) -> None:
        self.bytes_in = upload.length
        self._body = b"".join(upload.parts) if upload.length <= ONE_PIECE_BYTES else upload.parts

    # --- and back

    def answer_refused(self, head: ResponseHead, body: bytes, whole: bool) -> None:
        if head.refusal != UploadLostError.type:
            super().answer_refused(head, body, whole)
        elif self._sent_again or self.client is None:
            super().answer_refused(replace(head, refusal=UpstreamError.type), body, whole)
        else:
            self._send_again()

    def _send_again(self) -> None:
        """The peer is well but its instance was lost: ask anybody once more, that peer among them."""
        connection, self._upstream = self._upstream, None
        assert connection is not None
        assert self._peer is not None
        connection.abort()
        self._peer.answered()
        self._sent_again = True
        self._plane.metrics.upstream_retries_total += 1
        self.phase = Phase.PAUSED
        self._retry_timer = self._plane.loop.call_later(CRASH_NOTICE_S, self._resubmit)

    def expect(self, pool: Pool, closes_client: bool) -> None:
        super().expect(pool, closes_client)
        if self._collector is not None:
            self.feed = self._collect

    def answer_begins(self) -> None:
        super().answer_begins()
        self._release()

    def _release(self) -> None:
        """The form is not sent again: let its bytes go. What is still being sent stays until it was."""
        self._body = b""
        self._ordered = None
        self._came = (self._came[0], b"", self._came[2])
        if self._upload is not None:
            self._upload = replace(self._upload, parts=())
        self._received.body.close()

    def _collect(self, data: bytes) -> None:
        collector = self._collector
        assert collector is not None
        if self.phase is Phase.WAITING:
            self.answer_begins()
        try:
            collector.feed(data)
        except UpstreamError as error:
            self.answer_broken(error)
            return
        if collector.complete:
            self._collected(collector)

    def _check_progress(self, now: float, moved: int, waits_for_client: bool) -> None:
        came = 0 if self._collector is None else len(self._collector.body)
        super()._check_progress(now, moved + came, waits_for_client)

    def upstream_lost(self, error: Exception | None) -> None:
        self._is_over()
        collector = self._collector
        if collector is not None and error is None and not self._cut_by_us and collector.end():
            self._collected(collector)
        else:
            super().upstream_lost(error)

    def _collected(self, collector: AnswerCollector) -> None:
        """The instance has answered in full: done with it, tell the client."""
        self._is_over()
        connection, self._upstream = self._upstream, None
        if connection is not None:
            if collector.reusable and connection.sent:
                connection.pool.give(connection, self._now())
            else:
                connection.abort()
        answer = self._put_right(collector)
        if isinstance(answer, MeshError):
            self.fail(answer)
            return
        line = STATUS_LINES.get(answer.status, b"HTTP/1.1 %d \r\n" % answer.status)
        fields = b"Content-Type: %b\r\nContent-Length: %d\r\n\r\n" % (answer.content_type, len(answer.body))
        self._read_head(b"".join((line, fields, answer.body)))  # as if the instance had said so

    def _put_right(self, collector: AnswerCollector) -> Answer | MeshError:
        assert self._lease is not None
        endpoint = self._lease.endpoint
        assert isinstance(endpoint, Endpoint)
        assert endpoint.adapter is not None
        assert self._upload is not None
        endpoint.log_tail(0)
        lines = endpoint.log_tail(max(0, endpoint.log_lines() - self._lines_before))
        body = bytes(collector.body)
        try:
            return endpoint.adapter.answer(self._upload, collector.status, collector.content_type, body, lines)
        except Exception:
            request_id = self.request_id.decode("latin-1")
            _log.exception("an answer could not be adapted", request_id=request_id, status=collector.status)
            return internal_error()

    def _end(self, status: int, error: str | None, now: float) -> None:
        super()._end(status, error, now)
        self._is_over()
        self._release()
        self._collector = None


class StreamExchange(FormExchange):
    """That of a form whose file is still on its way here, from a node that keeps it."""

    __slots__ = ("_seen", "_stream")

    def __init__(
        self,
        plane: DataPlane,
        client: Client,
        head: RequestHead,
        profile: Profile,
        model_metrics: ModelMetrics,
        received: ReceivedForm,
        upload: Upload | None,
        request_id: bytes,
        since: float,
        stream: FormStream,
    ) -> None:
        super().__init__(plane, client, head, profile, model_metrics, received, upload, request_id, since)
        self._stream = stream
        self._seen = (-1, 0.0)  # (bytes to come, when) of the last look
        self.bytes_in = stream.length
        self._came = (head, StreamedBody(stream.before, stream, stream.end), stream.length)

    def _take_body(self, upload: Upload) -> None:
        """Put the whole file where the adapter put what is known of it: the only part that is a view."""
        (at,) = (number for number, part in enumerate(upload.parts) if isinstance(part, memoryview))
        before, after = b"".join(upload.parts[:at]), b"".join(upload.parts[at + 1 :])
        self._body = StreamedBody(before, self._stream, after)
        self.bytes_in = len(before) + self._stream.file_bytes + len(after)

    def answer_begins(self) -> None:
        super().answer_begins()
        if not self._stream.body_complete:
            self.closes_client = True  # what still comes is of no use any more

    # --- the file is here only once

    def upstream_lost(self, error: Exception | None) -> None:
        if self.phase is Phase.WAITING and self._stream.flowing:
            self._upstream = None
            self._try_elsewhere(UpstreamError("the instance closed the connection before it answered"))
        else:
            super().upstream_lost(error)

    def _try_elsewhere(self, error: MeshError) -> None:
        if self._stream.flowing:
            self.fail(UploadLostError(error.message))
        else:
            super()._try_elsewhere(error)

    def client_gone(self) -> None:
        if self.phase is Phase.DONE or self._stream.body_complete:
            super().client_gone()
            return
        self._plane.metrics.client_disconnects_total += 1  # nothing to shield: the instance has not got all of it
        self.client = None
        self.cut_short()

    # --- limits

    @property
    def _awaits_file(self) -> bool:
        """Whether it is the other node's turn."""
        return self._stream.flowing and not self._stream.body_complete and not self._stream.paused

    def check(self, now: float) -> None:
        left, (seen, since) = self._stream.bytes_left, self._seen
        if left != seen or not self._awaits_file:
            self._seen = (left, now)
        elif now - since > self._plane.body_timeout_s:
            self.fail(BodyTimeoutError("nothing more of the upload came (http.body_read_timeout_ms)"))
            return
        super().check(now)

    def _check_progress(self, now: float, moved: int, waits_for_client: bool) -> None:
        super()._check_progress(now, moved, waits_for_client or self._awaits_file)

    def _end(self, status: int, error: str | None, now: float) -> None:
        super()._end(status, error, now)
        self._stream.close()
