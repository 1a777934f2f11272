"""Every error that llama-mesh raises on purpose, by who must act.

- ``MeshError``
    - ``ConfigError``        the operator edits a file
    - ``RequestError``       the caller changes the request (4xx)
        - ``AuthError``, ``UnknownModelError``, ``BodyTooLargeError``, ``BodyTimeoutError``
        - ``UnsupportedAudioError``  the file is of a kind that the engine does not read
    - ``CapacityError``      the caller tries again later (``retry_after_s`` says when)
        - ``QueueFullError``, ``QueueTimeoutError``, ``DrainingError``, ``TooLargeError`` (never fits: no retry)
    - ``InstanceError``      a child process could not be started, never became healthy, or died
        - ``ProcessingError``  it lives, and could not do what it was asked
    - ``EngineMissingError`` no llama-server to run
    - ``BuildError``         a build of llama.cpp failed or was rejected; what ran before runs on
        - ``BuildBusyError``    another one is in progress
    - ``PeerError``          another node could not be reached, or broke off
        - ``LinkError``         its link: handshake, framing, silence
        - ``UntrustedPeerError`` it is not who we trust (operator: ``llama-mesh keys``)

Foreign exceptions are mapped to these at the edge where they arise, with ``raise ... from``. Everything else that
escapes is a bug and answered 500. ``mesh.api.responses`` holds the one table that turns them into HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class MeshError(Exception):
    """An error with an answer: ``status`` and ``type`` are what an HTTP client sees.

    ``source`` tells a reader of the error envelope who failed: ``mesh`` (this node), ``instance`` (the child process)
    or ``peer``. ``details`` are the numbers behind the message, for programs: the envelope's ``memory``
    (``mesh.engine.memory_report.capacity_details``).
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    source: ClassVar[str] = "mesh"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.details = details


class ConfigError(MeshError):
    """A file or a flag is wrong. The message names file, line, key, value and what is accepted."""

    type = "config_error"


class RequestError(MeshError):
    """The request cannot be served as it is."""

    status = 400
    type = "invalid_request_error"


class AuthError(RequestError):
    """No key, or a key that is not allowed."""

    status = 401
    type = "authentication_error"


class UnknownModelError(RequestError):
    """No enabled profile has this name, or it cannot do what the endpoint asks for."""

    status = 404
    type = "model_not_found"


class BodyTooLargeError(RequestError):
    """The request body is over ``http.request_body_limit_bytes``."""

    status = 413
    type = "request_too_large"


class BodyTimeoutError(RequestError):
    """Nothing more of the request body arrived for ``http.body_read_timeout_ms``."""

    status = 408
    type = "request_timeout"


class UnsupportedAudioError(RequestError):
    """The engine does not read files of this kind. The message says what it looks like, and what can be read."""

    status = 415
    type = "unsupported_media_type"


class CapacityError(MeshError):
    """Not now. ``retry_after_s`` is sent as Retry-After."""

    status = 503
    type = "no_capacity"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = 5,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s, details=details)


class QueueFullError(CapacityError):
    """The profile's queue, or the node's, has no place left."""

    type = "queue_full"


class QueueTimeoutError(CapacityError):
    """The request waited ``max_wait_in_queue_ms`` and was not reached."""

    type = "queue_timeout"


class DrainingError(CapacityError):
    """The node is shutting down and takes no new work."""

    type = "draining"


class DrainedError(DrainingError):
    """An operator took the node out of rotation."""

    def __init__(self) -> None:
        super().__init__("this node is drained: 'llama-mesh undrain' lets it work again")


class TooLargeError(CapacityError):
    """The model needs more than the whole budget; waiting would not help."""

    type = "model_too_large"

    def __init__(self, message: str, *, param: str | None = None, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, param=param, retry_after_s=None, details=details)


class InstanceError(MeshError):
    """A child failed to start, never became healthy, or died. The message ends with its last log lines."""

    status = 503
    type = "instance_failed"
    source = "instance"


class ProcessingError(InstanceError):
    """A child lives, took a request, and could not do it. The message has the line of its log that says why."""

    status = 500
    type = "processing_failed"


class UpstreamError(MeshError):
    """The connection to an instance broke before its answer began."""

    status = 502
    type = "upstream_error"
    source = "instance"


class UploadLostError(UpstreamError):
    """An instance was lost that had got some of an upload which is kept by another node: that one may try again."""

    type = "upload_lost"


class EngineMissingError(InstanceError):
    """There is no llama-server to run. The message lists the ways to get one."""

    type = "engine_missing"
    source = "mesh"


class BuildError(MeshError):
    """A build of llama.cpp failed or was rejected; the engine that ran before is still in force.

    ``exit_status`` is that of the command that failed (negative: the signal), ``log_tail`` its last lines.
    """

    type = "build_failed"

    def __init__(self, message: str, *, exit_status: int | None = None, log_tail: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.exit_status = exit_status
        self.log_tail = tuple(log_tail)


class BuildBusyError(BuildError):
    """A build is in progress, here or in another process that shares the build directory."""

    status = 409
    type = "conflict"


class UnknownBuildError(RequestError):
    """No build has that name, or there is nothing to go back to."""

    status = 404
    type = "build_not_found"


class PeerError(MeshError):
    """Another node could not be reached, or broke off; the message names it."""

    status = 502
    type = "peer_error"
    source = "peer"


class LinkError(PeerError):
    """A link to a peer failed: its handshake, its framing, or its end."""


class UntrustedPeerError(LinkError):
    """The other end proved to be somebody whom this node does not trust."""

    type = "untrusted_peer"


class PeerRefusalError(MeshError):
    """A peer itself, not an instance behind it, said no, in an answer that was complete: its own words."""

    source = "peer"

    def __init__(self, message: str, *, status: int, type: str, retry_after_s: int | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.status = status  # type: ignore[misc]  # here both belong to the case, not to the class
        self.type = type  # type: ignore[misc]


class NoNodeError(CapacityError):
    """Nodes have the model, and none of them can be reached or may be asked now."""

    type = "no_capacity"


class TooManyHopsError(RequestError):
    """The request was passed on between nodes more than ``max_hops`` times."""
