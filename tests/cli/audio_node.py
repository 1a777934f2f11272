"""A real HTTP server that takes audio like a node, from a script, and notices when its client leaves."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Protocol

from tests.cli.file_server import running


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...


@dataclass(frozen=True)
class Upload:
    """One form as it arrived."""

    path: str
    headers: Mapping[str, str]
    fields: dict[str, str]
    filename: str
    content: bytes


@dataclass
class AudioNode:
    """Change the fields to change the node."""

    url: str = ""
    #: id -> capabilities; None: an older node, which does not tell
    models: dict[str, list[str] | None] = field(default_factory=lambda: {"qwen3": ["text"], "whisper": ["audio"]})
    status: int = 200
    answer: Any = field(default_factory=lambda: {"text": "Ask not [bold] what\u2019s what."})
    #: refuse with ``status`` as soon as the head is there, and close
    refuses_early: bool = False
    #: after this many bytes of a body, or all, it reads no more until ``looks_again`` is set
    stalls_after: int | None = None
    uploads: list[Upload] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    looks_again: threading.Event = field(default_factory=threading.Event)
    client_left: threading.Event = field(default_factory=threading.Event)

    def error(self, status: int, type: str, message: str) -> None:
        """Answer uploads with this error from now on."""
        self.status = status
        self.answer = {"error": {"message": message, "type": type, "param": None, "code": None, "source": "mesh"}}


@contextmanager
def serve_audio() -> Iterator[AudioNode]:
    """Run an AudioNode on a free port."""
    node = AudioNode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            told = [{"id": name, "metadata": _metadata(can)} for name, can in node.models.items()]
            self._answer(200, {"object": "list", "data": told})

        def do_POST(self) -> None:
            if not node.refuses_early:
                body = _body(self.rfile, self.headers["Content-Length"], node.stalls_after)
                if node.stalls_after is not None:
                    self._stall()
                    return
                node.uploads.append(_upload(self.path, dict(self.headers), body))
            self._answer(node.status, node.answer)

        def _stall(self) -> None:
            node.stalled.set()
            node.looks_again.wait(10)
            self.connection.settimeout(10)
            with suppress(TimeoutError):
                with suppress(ConnectionError):
                    while self.connection.recv(2**20):
                        pass
                node.client_left.set()
            self.close_connection = True

        def _answer(self, status: int, content: Any) -> None:
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
            if node.refuses_early:  # or the kernel's RST would overtake the answer
                self.connection.shutdown(socket.SHUT_WR)
                while self.connection.recv(2**20):
                    pass

        def log_message(self, format: str, *args: object) -> None:
            pass

    with running(Handler) as url:
        node.url = url
        yield node


def _metadata(capabilities: list[str] | None) -> dict[str, Any]:
    return {} if capabilities is None else {"capabilities": capabilities}


def _body(stream: Readable, length: str | None, at_most: int | None) -> bytes:
    if length is not None:
        return stream.read(int(length) if at_most is None else min(int(length), at_most))
    parts = []
    while size := int(stream.readline(), 16):
        parts.append(stream.read(size))
        stream.readline()
    stream.readline()
    return b"".join(parts)


def _upload(path: str, headers: Mapping[str, str], body: bytes) -> Upload:
    boundary = headers["Content-Type"].partition("boundary=")[2].encode()
    first, *parts, last = body.split(b"--" + boundary)
    assert (first, last) == (b"", b"--\r\n")
    fields, files = {}, {}
    for part in parts:
        head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        content = content.removesuffix(b"\r\n")
        found = re.search(r'; name="(\w+)"(?:; filename="(.*?)")?\r?$', head.decode(), re.MULTILINE)
        assert found, head
        if found[2] is None:
            fields[found[1]] = content.decode()
        else:
            files[found[1]] = (found[2], content)
    filename, content = files["file"]
    return Upload(path, headers, fields, filename, content)
