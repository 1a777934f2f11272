"""The thread that writes log lines. Knows nothing of levels and formats.

Producers append encoded lines or msgspec structs to a plain list (atomic under the GIL); the thread takes them in
batches, 100 ms or about 64 KiB apart, encodes what is not encoded yet and hands the bytes to every sink.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from mesh.logs.sinks import Sink, complain

_BATCH_S: Final = 0.1
_BATCH_LINES: Final = 200  # about 64 KiB
_MAX_PENDING_LINES: Final = 50_000  # some 16 MiB; beyond it lines are dropped


class LineWriter:
    """Collects lines from any thread and writes them to all sinks from its own."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.dropped = 0
        self._sinks = sinks
        self._pending: list[Any] = []
        self._encoder = msgspec.json.Encoder()
        self._some = threading.Event()
        self._told = False  # the same, but cheap to look at for every line; may be False too often, never True
        self._now = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def append(self, line: msgspec.Struct | msgspec.Raw, urgent: bool = False) -> None:
        """Queue *line*; never blocks. *urgent* lines do not wait for their batch to fill."""
        pending = self._pending
        if len(pending) >= _MAX_PENDING_LINES:
            self.dropped += 1
            return
        pending.append(line)  # before the flag is read: the thread clears it before it takes lines, so none is missed
        if not self._told:
            self._told = True
            self._some.set()
        if urgent or len(pending) == _BATCH_LINES:
            self._now.set()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything appended so far has been written; False on timeout."""
        done = threading.Event()
        self._pending.append(done)
        self._some.set()
        self._now.set()
        return done.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Write what is pending and end the thread; gives up on a sink that blocks longer than *timeout_s*."""
        if not self._thread.is_alive():
            return
        self._closing = True
        self.flush(timeout_s)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not (self._closing and not self._pending):
            self._some.wait()
            if not self._closing:
                self._now.wait(_BATCH_S)
            self._some.clear()
            self._told = False  # after the event, or a line between the two would set one and not the other
            self._now.clear()
            try:
                self._write_batch()
            except Exception as error:  # without this thread there are no logs at all
                complain(f"log lines were lost: {error!r}")
        for sink in self._sinks:
            sink.close()

    def _write_batch(self) -> None:
        count = len(self._pending)
        batch = self._pending[:count]
        del self._pending[:count]  # producers only append, so these are the same entries
        lines = [entry for entry in batch if not isinstance(entry, threading.Event)]
        if self.dropped:
            lines.append(self._drop_notice())
        if lines:
            data = self._encode(lines)
            for sink in self._sinks:
                sink.write(data)
        for entry in batch:
            if isinstance(entry, threading.Event):
                entry.set()

    def _drop_notice(self) -> dict[str, Any]:
        count, self.dropped = self.dropped, 0
        fields = {"message": "log lines were dropped: the output did not keep up", "dropped": count}
        return {"timestamp": datetime.now(UTC), "level": "WARNING", "fields": fields, "target": "mesh.logs"}

    def _encode(self, lines: list[Any]) -> bytes:
        try:
            return self._encoder.encode_lines(lines)
        except (UnicodeEncodeError, TypeError, ValueError, msgspec.MsgspecError):
            return b"".join(self._encode_alone(line) for line in lines)

    def _encode_alone(self, line: Any) -> bytes:
        try:
            return self._encoder.encode(line) + b"\n"
        except (UnicodeEncodeError, TypeError, ValueError, msgspec.MsgspecError):
            return self._encoder.encode({"level": "ERROR", "fields": {"message": ascii(line)}}) + b"\n"
