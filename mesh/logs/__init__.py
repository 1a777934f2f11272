"""Structured logs: one JSON object per line on stdout and, if configured, in a file that rotates daily.

Everything goes through one writer thread: the event loop only appends to a list, so neither a full disk nor a reader
of stdout that has stopped reading can hold up a request. What cannot be written is dropped and counted.
This module never sees request bodies, and redacts fields whose names say that they are secret (trap 101).
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from mesh.logs.sinks import FdSink, FileSink, Sink
from mesh.logs.writer import LineWriter

_SECRET: Final = re.compile(r"authorization|cookie|secret|passw|token$|api[-_]?key|private", re.IGNORECASE)
_LIBRARY_LEVEL: Final = logging.WARNING  # httpx logs every request at INFO, watchfiles every change


class LoggingSettings(Protocol):
    """The ``logging:`` section, as far as it is needed here."""

    @property
    def enabled(self) -> bool: ...  # the file; stdout is always on
    @property
    def directory(self) -> Any: ...
    @property
    def filename(self) -> str: ...
    @property
    def max_keep_files(self) -> int: ...
    @property
    def compression(self) -> bool: ...
    @property
    def level(self) -> str: ...
    @property
    def access_log(self) -> bool: ...


class Log:
    """A module's logger: ``Log(__name__).info("instance ready", instance=id)``. A disabled level costs one check."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, message: str, **fields: object) -> None:
        if self._logger.isEnabledFor(logging.DEBUG):
            self._emit(logging.DEBUG, message, fields)

    def info(self, message: str, **fields: object) -> None:
        if self._logger.isEnabledFor(logging.INFO):
            self._emit(logging.INFO, message, fields)

    def warning(self, message: str, **fields: object) -> None:
        self._emit(logging.WARNING, message, fields)

    def error(self, message: str, **fields: object) -> None:
        self._emit(logging.ERROR, message, fields)

    def exception(self, message: str, **fields: object) -> None:
        """Log at ERROR with the traceback of the exception that is being handled."""
        self._emit(logging.ERROR, message, fields, exc_info=True)

    def _emit(self, level: int, message: str, fields: dict[str, object], exc_info: bool = False) -> None:
        # the message is an argument, not the format: a "%" in it is a "%"
        self._logger.log(level, "%s", message, exc_info=exc_info, extra={"fields": fields}, stacklevel=3)


_now = datetime.now


class AccessFields(msgspec.Struct, omit_defaults=True, gc=False):
    """One request. Absent fields are left out of the line."""

    message: str = ""
    request_id: str = ""
    client: str = ""
    method: str = ""
    path: str = ""
    status: int = 0
    duration_ms: float = -1.0
    model: str | None = None
    instance: str | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    queue_ms: float | None = None
    ttft_ms: float | None = None
    tokens: int | None = None
    error: str | None = None


class AccessRecord(msgspec.Struct, gc=False):
    timestamp: datetime
    fields: AccessFields
    level: str = "INFO"
    target: str = "mesh.access"


class AccessLog:
    """One line per request. The hot path only builds a record; encoding and writing happen in batches elsewhere."""

    __slots__ = ("_writer",)

    def __init__(self, writer: LineWriter | None = None) -> None:
        self._writer = writer

    @property
    def enabled(self) -> bool:
        return self._writer is not None

    def write(
        self,
        request_id: str,
        client: str,
        method: str,
        path: str,
        status: int,
        duration_s: float,
        model: str | None = None,
        instance: str | None = None,
        bytes_in: int = 0,
        bytes_out: int = 0,
        queue_s: float | None = None,
        ttft_s: float | None = None,
        tokens: int | None = None,
        error: str | None = None,
    ) -> None:
        """Note one finished request. A query string is cut off *path*: it may hold a key."""
        writer = self._writer
        if writer is None:
            return
        if "?" in path:
            path = path[: path.index("?")]
        fields = AccessFields(
            "request",
            request_id,
            client,
            method,
            path,
            status,
            int(duration_s * 1e6 + 0.5) / 1e3,
            model,
            instance,
            bytes_in,
            bytes_out,
            queue_s and int(queue_s * 1e6 + 0.5) / 1e3,
            ttft_s and int(ttft_s * 1e6 + 0.5) / 1e3,
            tokens,
            error,
        )
        writer.append(AccessRecord(_now(UTC), fields))


class Logging:
    """What ``configure`` set up; ``close`` writes what is pending and takes the handler off again."""

    def __init__(self, writer: LineWriter, handler: logging.Handler, access: AccessLog) -> None:
        self._writer = writer
        self._handler = handler
        self.access = access

    def flush(self, timeout_s: float = 2.0) -> bool:
        """Wait until all lines so far are written; False if a blocked reader did not let them out in time."""
        return self._writer.flush(timeout_s)

    def close(self, timeout_s: float = 2.0) -> None:
        logging.getLogger().removeHandler(self._handler)
        self._writer.close(timeout_s)


def configure(settings: LoggingSettings, *, level: str | None = None, fd: int | None = None) -> Logging:
    """Send all logging of the process to stdout (or *fd*) and the configured file. *level* overrides the settings'.

    An unwritable directory is reported once, and logging goes on without the file.
    """
    sinks: list[Sink] = []
    if fd is not None or sys.stdout is not None:  # with stdout closed, fd 1 may be somebody's socket
        sinks.append(FdSink(1 if fd is None else fd))
    if settings.enabled:
        path = Path(settings.directory).expanduser() / settings.filename
        sinks.append(FileSink(path, max_keep_files=settings.max_keep_files, compress=settings.compression))
    writer = LineWriter(sinks)
    handler = _JsonHandler(writer)
    set_level(level or settings.level)
    logging.getLogger().addHandler(handler)
    return Logging(writer, handler, AccessLog(writer if settings.access_log else None))


def set_level(level: str) -> None:
    """Set the level of our own loggers; libraries stay at WARNING unless it is DEBUG."""
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger("mesh").setLevel(number)
    logging.getLogger().setLevel(number if number <= logging.DEBUG else max(number, _LIBRARY_LEVEL))


class _JsonHandler(logging.Handler):
    """Formats records of stdlib logging as llamesh does and hands them to the writer."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = encode_record(record)
        except Exception:  # a log call must never fail its caller
            line = msgspec.json.encode({"level": "ERROR", "target": record.name, "fields": {"message": "log failed"}})
        self._writer.append(msgspec.Raw(line), urgent=record.levelno >= logging.WARNING)


def encode_record(record: logging.LogRecord) -> bytes:
    """Return *record* as one JSON line without its newline."""
    fields: dict[str, object] = {"message": record.getMessage()}
    fields.update(getattr(record, "fields", {}))
    if record.exc_info and record.exc_info[0] is not None:
        fields["exception"] = "".join(traceback.format_exception(*record.exc_info))
    return msgspec.json.encode(
        {
            "timestamp": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname,
            "fields": _loggable(fields),
            "target": record.name,
        }
    )


def _loggable(value: Any) -> Any:
    """Return *value* as JSON can hold it, without what is secret by its name."""
    match value:
        case str():  # lone surrogates (bytes that were not UTF-8) cannot be encoded; show them escaped
            return value.encode("utf-8", "backslashreplace").decode()
        case None | bool() | int() | float():
            return value
        case Mapping():
            items = ((str(name), item) for name, item in value.items())
            return {name: "[redacted]" if _SECRET.search(name) else _loggable(item) for name, item in items}
        case list() | tuple():
            return [_loggable(item) for item in value]
        case _:
            return _loggable(str(value))
