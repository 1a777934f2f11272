"""Below HTTP libraries: bytes to and from a node, and questions to a llama-server itself, past the node."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import httpx

CHAT = "/v1/chat/completions"


class RawConnection:
    """Bytes to and from the node, and just enough HTTP to read an answer."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def post(self, path: str, body: Any, *headers: str) -> None:
        """Send a request with a JSON body."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json", *headers]
        self.send("\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data)

    def start_stream(self, model: str, text: str = "hi", **keys: Any) -> int:
        """Ask for a stream; return the status once its first event is here."""
        messages = [{"role": "user", "content": text}]
        self.post(CHAT, {"model": model, "messages": messages, "temperature": 0, "stream": True, **keys})
        status, _ = self.head()
        self.read_until(b"data: ")
        return status

    def read_until(self, mark: bytes) -> bytes:
        """Return everything up to and with *mark*; what follows stays in the buffer."""
        while mark not in self.buffer:
            more = self.sock.recv(65536)
            assert more, f"the connection ended before {mark!r}; got {self.buffer[-500:]!r}"
            self.buffer += more
        head, _, self.buffer = self.buffer.partition(mark)
        return head + mark

    def head(self) -> tuple[int, dict[str, str]]:
        """Read an answer's head: its status and headers, names in lower case."""
        lines = self.read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:] if line)
        return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs}

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Read a whole answer, sized by Content-Length or chunked."""
        status, headers = self.head()
        if headers.get("transfer-encoding") == "chunked":
            return status, headers, self._chunks()
        size = int(headers.get("content-length", 0))
        while len(self.buffer) < size:
            more = self.sock.recv(65536)
            assert more, "the connection ended inside the body"
            self.buffer += more
        body, self.buffer = self.buffer[:size], self.buffer[size:]
        return status, headers, body

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.read_until(b"\r\n").split(b";")[0], 16):
            while len(self.buffer) < size + 2:
                more = self.sock.recv(65536)
                assert more, "the connection ended inside a chunk"
                self.buffer += more
            body, self.buffer = body + self.buffer[:size], self.buffer[size + 2 :]
        self.read_until(b"\r\n")
        return body

    def rest(self) -> bytes:
        """Read to the end of the connection, however it ends."""
        with suppress(ConnectionResetError):
            while more := self.sock.recv(65536):
                self.buffer += more
        return self.buffer


def child_slots(instance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ask a llama-server itself for its slots. Each question disturbs its notice of vanished clients: ask slowly."""
    result: list[dict[str, Any]] = child_get(instance, "/slots").json()
    return result


def child_busy(instance: Mapping[str, Any]) -> int:
    """Return how many slots the llama-server computes on."""
    return sum(1 for slot in child_slots(instance) if slot["is_processing"])


def child_get(instance: Mapping[str, Any], path: str) -> httpx.Response:
    """GET from the llama-server itself, on a connection of its own."""
    return httpx.get(f"http://127.0.0.1:{instance['port']}{path}", timeout=60, trust_env=False)


def child_post(instance: Mapping[str, Any], path: str, body: Any) -> httpx.Response:
    """POST to the llama-server itself."""
    return httpx.post(f"http://127.0.0.1:{instance['port']}{path}", json=body, timeout=60, trust_env=False)
