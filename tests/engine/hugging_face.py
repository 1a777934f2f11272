"""A hub like huggingface.co with one repository of one file, for llama.cpp's own download."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40


@contextmanager
def hub(content: bytes) -> Iterator[str]:
    """Serve ``me/tiny`` with ``tiny-Q4_0.gguf``; everything else is not found. Yield the base URL."""
    branches = {"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}], "tags": []}
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    tree = [{"type": "file", "path": "tiny-Q4_0.gguf", "size": len(content), "oid": "b" * 40, "lfs": lfs}]
    pages = {
        "/api/models/me/tiny/refs": json.dumps(branches).encode(),
        f"/api/models/me/tiny/tree/{COMMIT}": json.dumps(tree).encode(),
        f"/me/tiny/resolve/{COMMIT}/tiny-Q4_0.gguf": content,
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages.get(self.path.partition("?")[0])
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
