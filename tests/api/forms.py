"""Multipart forms as clients send them, and an engine kind with an adapter that shows what it was given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from mesh.config.profile import Engine, Profile
from mesh.core.form import Form
from mesh.engine import kinds
from mesh.engine.kind import Answer, Upload
from mesh.errors import InstanceError, MeshError, RequestError
from tests.api.loopback import profile

BOUNDARY = "----boundary42"
PATH = b"/v1/audio/transcriptions"


def field(name: str, text: str | bytes) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return b'Content-Disposition: form-data; name="%b"\r\n\r\n%b' % (name.encode(), text)


def file(content: bytes, name: str = "file", filename: str = "a.wav") -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'.encode()
    return disposition + b"Content-Type: audio/wav\r\n\r\n" + content


def form(*parts: bytes, boundary: str = BOUNDARY) -> bytes:
    delimiter = f"--{boundary}".encode()
    return b"".join(b"%b\r\n%b\r\n" % (delimiter, part) for part in parts) + delimiter + b"--\r\n"


def form_head(length: int | None, path: bytes = PATH, extra: bytes = b"", boundary: str = BOUNDARY) -> bytes:
    framing = b"Transfer-Encoding: chunked\r\n" if length is None else b"Content-Length: %d\r\n" % length
    kind = f"Content-Type: multipart/form-data; boundary={boundary}\r\n".encode()
    return b"POST %b HTTP/1.1\r\nHost: node\r\n%b%b%b\r\n" % (path, kind, extra, framing)


def post_form(*parts: bytes, path: bytes = PATH, extra: bytes = b"") -> bytes:
    body = form(*parts)
    return form_head(len(body), path, extra) + body


def whisper(name: str = "tiny", **changes: object) -> Profile:
    return profile(name, engine=Engine.WHISPER, **changes)


class FakeAdapter:
    """Sends fields as JSON and the first file as it is; answers with what it was told."""

    def __init__(self) -> None:
        self.uploads: list[Upload] = []
        self.answers: list[tuple[int, str, bytes, list[str]]] = []
        self.answered: Answer | MeshError | None = None

    def upload(self, path: str, form: Form, body: memoryview, profile: Profile) -> Upload:
        if not form.files:
            raise RequestError("no file", param="file")
        audio = form.files[0]
        fields = json.dumps({"path": path, "fields": form.fields}).encode() + b"\n"
        upload = Upload(b"/native", b"x/y", (fields, body[audio.start : audio.end]), path)
        self.uploads.append(replace(upload, parts=()))  # a record must not keep the body alive
        return upload

    def answer(
        self, upload: Upload, status: int, content_type: str, body: bytes, log_tail: Sequence[str]
    ) -> Answer | MeshError:
        self.answers.append((status, content_type, body, list(log_tail)))
        if self.answered is not None:
            return self.answered
        if status >= 500:
            return InstanceError(f"it failed: {list(log_tail)}")
        return Answer(status, b"text/plain", b"<%b>" % body)


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> FakeAdapter:
    """Let whisper profiles have a ``FakeAdapter``."""
    fake = FakeAdapter()
    kind = replace(kinds.KINDS[Engine.WHISPER], adapter=fake)
    monkeypatch.setattr(kinds, "KINDS", {**kinds.KINDS, Engine.WHISPER: kind})
    return fake
