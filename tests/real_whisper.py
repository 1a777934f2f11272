"""Runs the real whisper-server for a test, as a node would: by its health, never by its silence."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import time
import wave
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.e2e.harness import free_port

START_S = 30.0
SAMPLE_RATE = 16_000


@dataclass(frozen=True)
class WhisperServer:
    """One that is ready, and what it has said on stderr, which it does not buffer."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def post(self, audio: bytes | None, path: str = "/inference", **fields: str) -> httpx.Response:
        """Send a form as OpenAI's clients do; without *audio* it has no file."""
        files = {name: (None, value.encode()) for name, value in fields.items()}
        form = files if audio is None else {**files, "file": ("audio.wav", audio)}
        return self.request("POST", path, files=form or {"nothing": (None, b"")})

    def request(self, method: str, path: str, **options: object) -> httpx.Response:
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=60) as client:
            return client.request(method, path, **options)  # type: ignore[arg-type]

    def said(self) -> str:
        return self.log.read_text(errors="replace")


@contextmanager
def whisper_server(program: Path, model: Path, directory: Path, *args: str) -> Iterator[WhisperServer]:
    """Start it in *directory*, wait until it is ready, and end it."""
    port, log = _unheld_port(), directory / "whisper.log"
    command = [str(program), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", "1", *args]
    environ = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, cwd=directory, env=environ, stdout=subprocess.DEVNULL, stderr=stderr)
    server = WhisperServer(process, port, log)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        process.kill()
        process.wait()


def _unheld_port() -> int:
    """Return a port that not even a closed connection holds: for whisper-server, without SO_REUSEADDR, it is taken."""
    while True:
        port = free_port()
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _wait_until_ready(server: WhisperServer) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            server.request("GET", "/health").raise_for_status()
        except httpx.ConnectError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError(f"whisper-server is not ready ({server.process.poll()=}):\n{server.said()}")


def silence(seconds: float) -> bytes:
    """Return a WAV file in which nothing is said; the tiny model hears its sentence in it."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as audio:
        audio.setnchannels(1)
        audio.setsampwidth(2)
        audio.setframerate(SAMPLE_RATE)
        audio.writeframes(bytes(2 * round(seconds * SAMPLE_RATE)))
    return buffer.getvalue()
