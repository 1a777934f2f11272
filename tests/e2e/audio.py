"""What the tests of speech share: nodes with whisper-server, forms as bytes, and a look at what uploads leave."""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from mesh.cli.whisper_setup import WhisperParts
from tests import tiny_whisper
from tests.e2e.harness import Node, cookbook, profile

TRANSCRIPTIONS, TRANSLATIONS, NATIVE = "/v1/audio/transcriptions", "/v1/audio/translations", "/inference"
SENTENCE = tiny_whisper.SENTENCE
BOUNDARY = "e2e-boundary"


def whisper_profile(path: Path, args: str = "-t 1", **keys: Any) -> dict[str, Any]:
    """Return a cookbook profile that whisper-server runs."""
    return profile(path, args, engine="whisper", **keys)


def audio_config(parts: WhisperParts, **keys: Any) -> dict[str, Any]:
    """Return the configuration of a node that runs the real server."""
    return {"whisper_cpp": {"binary_path": str(parts.server)}, **keys}


class AudioNode(Node):
    """A node whose temporary files are its own, so that none can hide."""

    def __init__(
        self,
        directory: Path,
        parts: WhisperParts,
        models: Mapping[str, dict[str, Any] | list[dict[str, Any]]],
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.temporary = directory / "tmp"
        self.temporary.mkdir(parents=True)
        env = {"TMPDIR": str(self.temporary), **options.pop("env", {})}
        super().__init__(directory, cookbook(models), audio_config(parts, **(config or {})), env=env, **options)

    def ask(self, model: str, audio: bytes, path: str = TRANSCRIPTIONS, **fields: str) -> httpx.Response:
        """Send *audio* as OpenAI's clients do."""
        files = {"file": ("speech.wav", audio)}
        return self.http.post(path, data={"model": model, **fields}, files=files, timeout=120)

    def asking(self, model: str, audio: bytes, **fields: str) -> Asking:
        """Ask from a thread."""
        return Asking(self, model, audio, fields)

    def heard(self, model: str, audio: bytes) -> str:
        """Return what *model* hears."""
        response = self.ask(model, audio)
        assert response.status_code == 200, response.text
        text = response.json()["text"]
        assert isinstance(text, str)
        return text

    def busy(self, model: str) -> bool:
        """Whether an instance of *model* is at work."""
        return any(instance["active"] for instance in self.instances(model))

    def waiting(self) -> int:
        """Return how many requests wait."""
        return sum(self.status()["queues"].values())

    def said(self, model: str) -> str:
        """Return what the children of *model* wrote."""
        return self.http.get("/admin/logs", params={"model": model}).text

    def scratch(self) -> list[Path]:
        """Return the directories of its children; what begins with a dot is being removed."""
        root = self.directory / "state" / "metrics.scratch"
        return [path for path in root.glob("node-*/[!.]*") if path.is_dir()]

    def spool(self) -> Path:
        """Return the directory of uploads."""
        return self.temporary / f"llama-mesh-{os.getuid()}"

    def own_memory(self) -> int:
        """Return the bytes that the node holds in memory of its own; a file that it looks into is none."""
        (line,) = re.findall(r"^RssAnon:\s*(\d+) kB$", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        return int(line) * 1024

    def assert_nothing_spooled(self) -> None:
        """No upload has a name, not even while it is served; and the directory is private."""
        if self.spool().exists():
            assert list(self.spool().iterdir()) == []
            assert stat.S_IMODE(self.spool().stat().st_mode) == 0o700

    def spooled_bytes(self) -> int:
        """Return how much the node holds in files without a name below its temporary directory."""
        total = 0
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                target = os.readlink(descriptor)
                if target.startswith(str(self.temporary)) and "(deleted)" in target:
                    total += os.stat(descriptor).st_size
            except OSError:  # closed meanwhile
                continue
        return total


class Asking:
    """A request that goes on in a thread of its own, on a connection of its own."""

    def __init__(self, node: AudioNode, model: str, audio: bytes, fields: Mapping[str, str]) -> None:
        self.answered = threading.Event()
        self.ended_at = 0.0
        self._answer: httpx.Response | httpx.HTTPError | None = None
        self._node, self._audio, self._fields = node, audio, {"model": model, **fields}
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        files = {"file": ("speech.wav", self._audio)}
        with httpx.Client(base_url=self._node.url, trust_env=False, timeout=120) as client:
            try:
                self._answer = client.post(TRANSCRIPTIONS, data=self._fields, files=files)
            except httpx.HTTPError as error:
                self._answer = error
        self.ended_at = time.monotonic()
        self.answered.set()

    def answer(self) -> httpx.Response:
        """Wait for the answer and return it."""
        self._thread.join(120)
        assert isinstance(self._answer, httpx.Response), self._answer
        return self._answer


def form(fields: Mapping[str, str], audio: bytes, *, file_first: bool = False, filename: str = "a.wav") -> bytes:
    """Return a multipart body."""
    texts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n\r\n'
    file = head.encode() + audio + b"\r\n"
    return b"".join([file, *texts] if file_first else [*texts, file]) + f"--{BOUNDARY}--\r\n".encode()


def form_head(path: str, length: int, *headers: str) -> bytes:
    """Return the head of a request with such a body."""
    kind = f"Content-Type: multipart/form-data; boundary={BOUNDARY}"
    lines = [f"POST {path} HTTP/1.1", "Host: test", kind, f"Content-Length: {length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()
