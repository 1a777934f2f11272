"""How audio gets to whisper-server, and how its answer gets back: OpenAI's forms on one side, its own on the other.

A client's form is never passed on. Its parts may stand in any order and in ways that whisper-server does not read, so
the file goes into a form of ours, as the very bytes that came: a view of the body, not a copy. Pure.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Final

from mesh.config.profile import Profile
from mesh.core import audio_format
from mesh.core.audio_format import READABLE, AudioFormat, Readable
from mesh.core.audio_length import length_s
from mesh.core.form import Form, FormFile
from mesh.engine.kind import Answer, Upload
from mesh.engine.whisper_answer import Reply, answer
from mesh.engine.whisper_fields import (
    Pairs,
    asked_format,
    asked_granularities,
    check_no_stream,
    native_fields,
    openai_fields,
)
from mesh.errors import BodyTooLargeError, MeshError, RequestError, UnsupportedAudioError

NATIVE_PATH: Final = "/inference"
TRANSLATIONS_PATH: Final = "/v1/audio/translations"
#: whisper-server takes some 160 KB for each second of what it decodes, 2.3 GB in all, which no budget knows of
MOST_HOURS: Final = 4
_FILE: Final = "file"


def _new_boundary() -> str:
    """Return a line that no file has in it: 128 bits of chance."""
    return f"llama-mesh-{secrets.token_hex(16)}"


class WhisperAdapter:
    """The ``FormAdapter`` of whisper-server."""

    def __init__(self, boundary: Callable[[], str] = _new_boundary) -> None:
        self._boundary = boundary

    def upload(self, path: str, form: Form, body: memoryview, profile: Profile) -> Upload:
        """Return the form for whisper-server; raise ``RequestError`` for what it could only do wrongly.

        The form goes to ``/inference``, wherever the client's came to.
        """
        check_no_stream(form)
        wanted = asked_format(form)
        native = path == NATIVE_PATH
        granularities = frozenset[str]() if native else asked_granularities(form, wanted)
        if native:
            fields = native_fields(form, profile, wanted)
        else:
            fields = openai_fields(form, profile, wanted, translate=path == TRANSLATIONS_PATH)
        file = _file(form)
        audio = body[file.start : file.end]
        looks = _check_format(audio, converts=profile.convert or "--convert" in profile.args)
        _check_length(audio, file.end - file.start)
        reply = Reply(
            format=wanted,
            native=native,
            words="word" in granularities,
            segments=not granularities or "segment" in granularities,
            looks_like=looks.name,
        )
        return _form(self._boundary(), fields, audio, reply)

    def answer(
        self, upload: Upload, status: int, content_type: str, body: bytes, log_tail: Sequence[str]
    ) -> Answer | MeshError:
        """Return OpenAI's answer for whisper-server's, or what really failed. Never raise."""
        reply = upload.reply
        assert isinstance(reply, Reply)
        return answer(reply, status, content_type, body, log_tail)


def _file(form: Form) -> FormFile:
    """Return the audio: the last file of that name, as of fields the last one counts."""
    file = next((file for file in reversed(form.files) if file.name == _FILE), None)
    if file is None:
        raise RequestError(_why_no_file(form), param=_FILE)
    if file.start >= file.end:
        raise RequestError("'file' is empty: there is nothing to hear in it", param=_FILE)
    return file


def _why_no_file(form: Form) -> str:
    if form.get(_FILE) is not None:
        return "'file' came as a text without a file name; send it as a file (curl: -F file=@audio.wav)"
    others = sorted({file.name[:60] for file in form.files})[:5]
    beside = f"; there is one called {', '.join(map(repr, others))}" if others else ""
    return f"the form has no file called 'file' (curl: -F file=@audio.wav){beside}"


_BY_ITSELF: Final = frozenset({Readable.YES, Readable.UNSEEN})
_BY_FFMPEG: Final = frozenset({Readable.YES, Readable.CONVERTED})  # it gets all files, and must not guess


def _check_format(audio: memoryview, *, converts: bool) -> AudioFormat:
    """Return what the file is; raise ``UnsupportedAudioError`` if nobody here can read it."""
    found = audio_format.sniff(audio)
    if found.readable in (_BY_FFMPEG if converts else _BY_ITSELF):
        if converts and (sign := audio_format.sign_of_a_list(audio)) is not None:
            message = f"this file is not converted: it has {sign!r} in it, by which ffmpeg might read other files"
            raise UnsupportedAudioError(message, param=_FILE)
        return found
    message = f"this file cannot be read: it looks like {found.name}. whisper-server reads {READABLE}"
    if converts:
        message += ", and ffmpeg most other audio and video"
    elif found.readable is Readable.CONVERTED:
        message += "; with 'convert: true' in this model's profile in the cookbook, ffmpeg reads most others"
    raise UnsupportedAudioError(message, param=_FILE)


def _check_length(audio: memoryview, size: int) -> None:
    """Refuse what says that it is far longer than it looks: whisper-server decodes all of it at once."""
    start = audio_format.tags_bytes(audio)
    found_s = length_s(bytes(audio[start : start + audio_format.HEAD_BYTES]), size)
    if found_s is not None and found_s > MOST_HOURS * 3600:
        message = f"by its head this file is {found_s / 3600:.1f} hours long; {MOST_HOURS} are the most: split it"
        raise BodyTooLargeError(message, param=_FILE)


def _form(boundary: str, fields: Pairs, audio: memoryview, reply: Reply) -> Upload:
    """Return the upload, its file last. The file gets our name: whisper-server writes it into its log as it is."""
    texts = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in fields
    )
    before = (
        f'{texts}--{boundary}\r\nContent-Disposition: form-data; name="{_FILE}"; filename="audio"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return Upload(
        path=NATIVE_PATH.encode(),
        content_type=f"multipart/form-data; boundary={boundary}".encode(),
        parts=(before.encode(errors="replace"), audio, f"\r\n--{boundary}--\r\n".encode()),
        reply=reply,
    )
