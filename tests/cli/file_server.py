"""A real HTTP server for one file, with the faults that downloads meet."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FileServer:
    """A package index with one project, "thing", of one file. Change the fields between requests."""

    content: bytes
    url: str = ""
    cut_after: list[int] = field(
        default_factory=list
    )  #: one entry per answer: close the connection after so many bytes
    honours_range: bool = True
    page: str | None = None  #: instead of the project's page
    statuses: list[int] = field(default_factory=list)  #: one entry per file request: answer with this error
    requests: list[tuple[str, str | None]] = field(default_factory=list)  #: (path, Range)
    authorizations: list[str | None] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def fetches(self) -> list[str | None]:
        """The Range header of each request for the file."""
        return [wanted for path, wanted in self.requests if path.startswith("/files/")]


@contextmanager
def serve_file(content: bytes) -> Iterator[FileServer]:
    """Run a FileServer on a free port."""
    files = FileServer(content)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            files.requests.append((self.path, self.headers["Range"]))
            files.authorizations.append(self.headers["Authorization"])
            if self.path == "/simple/thing/":
                self._page()
            elif self.path.startswith("/files/thing-1.0"):
                self._file()
            else:
                self.send_error(404)

        def _page(self) -> None:
            link = f'<a href="../../files/thing-1.0.bin#sha256={files.sha256}">thing-1.0.bin</a>'
            body = (files.page if files.page is not None else f"<html><body>{link}</body></html>").encode()
            self._head(200, len(body))
            self.wfile.write(body)

        def _file(self) -> None:
            if files.statuses:
                self.send_error(files.statuses.pop(0))
                return
            wanted = self.headers["Range"]
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and files.honours_range else 0
            body = files.content[start:]
            self._head(206 if start else 200, len(body))
            cut = files.cut_after.pop(0) if files.cut_after else len(body)
            with suppress(ConnectionError):  # the client has read enough
                self.wfile.write(body[:cut])

        def _head(self, status: int, length: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with running(Handler) as url:
        files.url = url
        yield files


@contextmanager
def running(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run *handler* on a free port; the value is its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
