"""A form with a file in it, sent while it is read: however long the file is, one piece of it is in memory."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Final, Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from mesh.cli.failure import CliError
from mesh.cli.output import stderr_console

PIECE_BYTES: Final = 64 * 1024
#: As browsers write names into a form: what would end the name, or the line, is percent-encoded.
_ESCAPES: Final = str.maketrans({'"': "%22", "\r": "%0D", "\n": "%0A"})


@dataclass(frozen=True, slots=True)
class FileForm:
    """Text fields, then a file called "file". Of a file whose size is known exactly so much is sent."""

    fields: Mapping[str, str]
    file: IO[bytes]
    filename: str
    size_bytes: int | None = None  #: None: to its end, wherever that is
    boundary: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def headers(self) -> dict[str, str]:
        """Those of the request; without a length httpx sends it chunked."""
        kind = {"Content-Type": f"multipart/form-data; boundary={self.boundary}"}
        if self.size_bytes is None:
            return kind
        return {**kind, "Content-Length": str(len(self._head()) + self.size_bytes + len(self._tail()))}

    def pieces(self, progress: UploadView) -> Iterator[bytes]:
        """Yield the body, once; *progress* hears of each piece when it has gone, and of the end."""
        yield self._head()
        sent = 0
        while piece := self._read(sent):
            yield piece
            sent += len(piece)
            progress.sent(sent)
        if self.size_bytes is not None and sent < self.size_bytes:
            raise CliError(f"{self.filename} became shorter while it was sent", fix="Try again when it is complete.")
        yield self._tail()
        progress.waiting()

    def _read(self, done: int) -> bytes:
        most = PIECE_BYTES if self.size_bytes is None else min(PIECE_BYTES, self.size_bytes - done)
        try:
            return self.file.read(most)
        except OSError as error:
            raise CliError(f"cannot read {self.filename}: {error.strerror or error}") from error

    def _head(self) -> bytes:
        parts = [
            f'--{self.boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in self.fields.items()
        ]
        name = self.filename.translate(_ESCAPES)
        parts.append(
            f'--{self.boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        return "".join(parts).encode(errors="replace")

    def _tail(self) -> bytes:
        return f"\r\n--{self.boundary}--\r\n".encode()


def size_of(file: IO[bytes]) -> int | None:
    """Return how much of *file* is left to read; None if only its end will tell: a pipe, a device."""
    status = os.fstat(file.fileno())
    return status.st_size - file.tell() if stat.S_ISREG(status.st_mode) else None


class UploadView:
    """A context that shows, on stderr, how far an upload is and then how long its answer takes.

    A bar and a stopwatch on a terminal; elsewhere a line for each, none with --json.
    """

    def __init__(
        self, name: str, size_bytes: int | None, *, as_json: bool = False, console: Console | None = None
    ) -> None:
        self._console = console or stderr_console()
        self._name, self._size_bytes = name, size_bytes
        self._plain = not self._console.is_terminal and not as_json
        self._shown: Progress | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._show("uploading", BarColumn(), DownloadColumn(), TransferSpeedColumn())
        size = "" if self._size_bytes is None else f" ({decimal(self._size_bytes)})"
        self._say(f"uploading {self._name}{size}")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._hide()

    def sent(self, size_bytes: int) -> None:
        """Say that so much of the file has gone."""
        if self._shown is not None:
            self._shown.update(self._shown.task_ids[0], completed=size_bytes)

    def waiting(self) -> None:
        """Say that all has gone and the answer is awaited."""
        if self._shown is not None:
            self._hide()
            self._show("transcribing …", TimeElapsedColumn())
        self._say("transcribing …")

    def _say(self, line: str) -> None:
        if self._plain:
            self._console.print(line, markup=False, soft_wrap=True)

    def _show(self, what: str, *columns: ProgressColumn) -> None:
        text = TextColumn("{task.description}", markup=False)
        self._shown = Progress(SpinnerColumn(), text, *columns, console=self._console, transient=True)
        self._shown.add_task(what, total=self._size_bytes)
        self._shown.start()

    def _hide(self) -> None:
        if self._shown is not None:
            self._shown.stop()
            self._shown = None
