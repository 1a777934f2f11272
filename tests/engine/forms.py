"""Forms as the data plane reads them, and how to read one that an adapter made."""

from __future__ import annotations

import email.message
import email.parser
import email.policy
from typing import Any

from mesh.config.profile import Engine, Profile
from mesh.core.form import Form, FormFile
from mesh.engine.kind import Upload

PATH = "/v1/audio/transcriptions"
BEFORE = b"--client\r\n..."


def whisper_profile(*args: str, **fields: Any) -> Profile:
    return Profile(key="w:default", id="w", model="w", profile="default", args=args, engine=Engine.WHISPER, **fields)


def received(audio: bytes | None, *fields: tuple[str, str]) -> tuple[Form, memoryview]:
    """Return the form of a request with *audio* in it, and its body."""
    files = () if audio is None else (FormFile("file", "a.wav", len(BEFORE), len(BEFORE) + len(audio)),)
    return Form(fields, files), memoryview(BEFORE + (audio or b"") + b"\r\n--client--\r\n")


def sent(upload: Upload) -> dict[str, bytes]:
    """Return the parts of what goes to whisper-server by their names, as a reader that is not ours finds them."""
    body = b"".join(upload.parts)
    assert upload.length == len(body)
    head = b"MIME-Version: 1.0\r\nContent-Type: " + upload.content_type + b"\r\n\r\n"
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    assert not message.defects
    parts = list(message.iter_parts())
    found = {str(part.get_param("name", header="content-disposition")): _content(part) for part in parts}
    assert len(found) == len(parts)
    return found


def _content(part: email.message.Message) -> bytes:
    content = part.get_payload(decode=True)
    assert isinstance(content, bytes)
    return content
