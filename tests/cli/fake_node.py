"""A real HTTP server that answers like a node, from a table of answers, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.cli.file_server import running

INSTANCE: dict[str, Any] = {
    "id": "i-1",
    "key": "qwen3:default",
    "model_id": "qwen3",
    "state": "ready",
    "pid": 4242,
    "port": 40001,
    "slots": 4,
    "active": 1,
    "busy": 1,
    "ready_at_wall": 1.0,
    "started_at_wall": 0.5,
    "last_used_s_ago": 75.0,
    "memory": {"ram": 512, "vram": 20480},
    "command": ["llama-server", "-m", "x.gguf"],
    "stale": False,
    "engine": {"version": "b11549", "build": "default", "path": "/opt/llama/llama-server"},
    "superseded": False,
}


@dataclass(frozen=True)
class Asked:
    """One request as it arrived."""

    method: str
    path: str
    query: dict[str, list[str]]
    body: Any
    authorization: str | None


@dataclass
class FakeNode:
    """Change ``answers`` to change the node."""

    url: str = ""
    #: "GET /path" -> (status, JSON or text)
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    retry_after: str | None = None
    asked: list[Asked] = field(default_factory=list)
    #: set when a log viewer has been sent everything; its answer ends when ``end_of_log`` is set
    log_shown: threading.Event = field(default_factory=threading.Event)
    end_of_log: threading.Event = field(default_factory=threading.Event)

    def error(self, status: int, type: str, message: str) -> tuple[int, Any]:
        return status, {"error": {"message": message, "type": type, "param": None, "code": None, "source": "mesh"}}


@contextmanager
def serve_node() -> Iterator[FakeNode]:
    """Run a FakeNode on a free port."""
    fake = FakeNode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            parts = urlsplit(self.path)
            length = int(self.headers["Content-Length"] or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            fake.asked.append(
                Asked(self.command, parts.path, parse_qs(parts.query), body, self.headers["Authorization"])
            )
            status, content = fake.answers.get(
                f"{self.command} {parts.path}", fake.error(404, "not_found", "Not Found")
            )
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Connection", "close")
            if fake.retry_after:
                self.send_header("Retry-After", fake.retry_after)
            self.end_headers()
            self.wfile.write(data)
            if "true" in parse_qs(parts.query).get("follow", []):
                self.wfile.flush()
                fake.log_shown.set()
                fake.end_of_log.wait(10)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with running(Handler) as url:
        fake.url = url
        yield fake
        fake.end_of_log.set()
