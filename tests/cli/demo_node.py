"""Stands in for the node that `demo` starts: same command line, same files, answers from a script.

Faults come in DEMO_FAULT: "crash" at start, "error" event in the stream, "deaf" to the first SIGTERM, "mute" speech.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULT = os.environ.get("DEMO_FAULT")
EVENTS = [
    {"choices": [{"delta": {"role": "assistant", "content": None}}]},
    {"choices": [{"delta": {"content": "Llamas "}}]},
    {"choices": [{"delta": {"content": "carry [much].\n"}}]},
    {"choices": [], "usage": {"completion_tokens": 7}},
]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(200, {"status": "ready"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/audio/transcriptions":
            self._transcribe(body)
            return
        request = json.loads(body)
        if self.path == "/admin/prewarm":
            self._answer(200, {"status": "ok", "message": request["model"]})
            return
        self.send_response(200)
        self.end_headers()
        for event in EVENTS:
            self._event(event)
            if FAULT == "error":
                self._event({"error": {"message": "llama-server died", "type": "instance_failed"}})
                return
        self.wfile.write(b"data: [DONE]\n\n")

    def _transcribe(self, form: bytes) -> None:
        known = [entry["name"] for entry in json.loads(Path("cookbook.yaml").read_text())["models"]]
        binary = json.loads(Path("config.yaml").read_text())["whisper_cpp"]["binary_path"]
        if FAULT == "mute":
            self._answer(503, {"error": {"message": "whisper-server died", "type": "instance_failed"}})
        else:
            self._answer(200, {"text": f"{len(form)} bytes for {known[-1]} by {binary}"})

    def _event(self, event: object) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    if FAULT == "crash":
        raise SystemExit("port in use, sorry")
    signal.signal(signal.SIGTERM, _stop)
    host, port = json.loads(Path("config.yaml").read_text())["listen_addr"].split(":")
    (Path(os.environ["DEMO_NOTES"]) / "pid").write_text(str(os.getpid()))
    ThreadingHTTPServer((host, int(port)), Handler).serve_forever(poll_interval=0.02)


def _stop(number: int, frame: object) -> None:
    if FAULT == "deaf" and not (Path(os.environ["DEMO_NOTES"]) / "deaf").exists():
        (Path(os.environ["DEMO_NOTES"]) / "deaf").touch()
        return
    sys.exit(0)


if __name__ == "__main__":
    main()
