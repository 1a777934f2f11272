"""A real HTTP server that builds by script: what it answers is a table, what its events tell a list of steps.

Each connection to the events plays the next script. The stream is chunked like a node's, so that a cut shows as one.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from mesh.build.status import Attempt, BuildStatus
from tests.cli.file_server import running
from tests.fakes_builds import STARTED_AT, status

#: Steps that are no event.
CUT, END, PING = "cut", "end", "ping"
Step = tuple[str, Any] | str | threading.Event


def picture(*statuses: BuildStatus, node: str = "gpu1", started_at: float = STARTED_AT - 1000) -> dict[str, Any]:
    """Return what GET /admin/builds answers."""
    return {
        "node_id": node,
        "started_at_wall": started_at,
        "now_wall": STARTED_AT + 65,
        "build_status": {"is_building": False, "last_build_error": None, "last_build_at": None},
        "builds": [asdict(found) for found in statuses],
    }


def snapshot(current: Attempt | None = None, last: Attempt | None = None, **options: Any) -> Step:
    name = next((found.build for found in (current, last) if found is not None), "default")
    return "snapshot", picture(status(name, current=current, last=last), **options)


def told(kind: str, attempt: Attempt) -> Step:
    return kind, {"attempt_state": asdict(attempt)}


def log(line: str, attempt: int = 1) -> Step:
    return "log", {"build": "default", "attempt": attempt, "line": line}


def progress(done: int, total: int, stage: str = "compiling", attempt: int = 1) -> Step:
    return "progress", {"build": "default", "attempt": attempt, "stage": stage, "done": done, "total": total}


@dataclass
class BuildNode:
    """Change ``answers`` and ``scripts`` to change the node."""

    url: str = ""
    answers: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)  #: in turn; the last one repeats
    scripts: list[Sequence[Step]] = field(default_factory=list)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    played: threading.Event = field(default_factory=threading.Event)  #: a script ran to its end, or to a wait

    def bodies(self, path: str) -> list[Any]:
        return [body for asked, body in self.asked if asked == path]


@contextmanager
def serve_builds() -> Iterator[BuildNode]:
    """Run a BuildNode on a free port."""
    fake = BuildNode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            fake.asked.append((f"GET {path}", query))
            if path == "/admin/builds/events":
                with suppress(OSError):  # the viewer has left
                    self._play(fake.scripts.pop(0) if fake.scripts else None)
            else:
                self._answer(f"GET {path}")

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"] or 0)
            fake.asked.append((f"POST {self.path}", json.loads(self.rfile.read(length)) if length else None))
            self._answer(f"POST {self.path}")

        def _answer(self, asked: str) -> None:
            rest = fake.answers.get(asked) or [(404, {"error": {"message": "Not Found", "type": "not_found"}})]
            code, content = rest.pop(0) if len(rest) > 1 else rest[0]
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def _play(self, script: Sequence[Step] | None) -> None:
            self.close_connection = True
            if script is None:  # as a node that is not there: nothing is answered
                self._cut()
                return
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for step in script:
                if isinstance(step, threading.Event):
                    fake.played.set()
                    step.wait(10)
                elif step == CUT:
                    self._cut()
                    return
                elif step == END:
                    self.wfile.write(b"0\r\n\r\n")
                    return
                else:
                    self._chunk(b": ping\n\n" if isinstance(step, str) else _event(*step))
            fake.played.set()

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            self.wfile.flush()

        def _cut(self) -> None:
            """Reset the connection, as a machine does that lost its power and is back."""
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with running(Handler) as url:
        fake.url = url
        yield fake


def _event(kind: str, data: Any) -> bytes:
    return f"id: 1\nevent: {kind}\ndata: {json.dumps(data)}\n\n".encode()
