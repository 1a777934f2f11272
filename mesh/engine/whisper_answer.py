"""Makes OpenAI's answers of whisper-server's: shapes, types, whole words; and says what failed, which it does not.

Its answers hold line breaks between segments, blanks before each, tokens for words, and ``text/html`` for text. Its
errors are masked; what they were stands in its log, on the line before: the table at the end. Nothing that it sends
makes this fail: what cannot be understood is an error like the others. Pure.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from mesh.core.audio_format import READABLE
from mesh.core.whisper_languages import UNSPACED
from mesh.engine.kind import Answer
from mesh.engine.whisper_fields import Format
from mesh.engine.whisper_words import Token, words
from mesh.errors import MeshError, ProcessingError, RequestError, UnsupportedAudioError

_JSON: Final = b"application/json"
_PLAIN: Final = b"text/plain; charset=utf-8"
#: more than any time, probability or number of tokens; it keeps nonsense from overflowing
_LARGEST = 1e9
_SHOWN_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Reply:
    """What the client asked for, as far as its answer depends on it."""

    format: Format
    native: bool = False  #: whisper-server's own answer, as it is
    words: bool = False
    segments: bool = True
    looks_like: str = "audio"  #: what the file is


def answer(reply: Reply, status: int, content_type: str, body: bytes, log_tail: Sequence[str]) -> Answer | MeshError:
    """Return what the client gets. Never raise."""
    if status != 200:
        return _failure(reply, status, _text_of(body), log_tail)
    if reply.native:
        return Answer(status, content_type.encode("latin-1", "replace"), body)
    match reply.format:
        case Format.TEXT:
            return Answer(200, _PLAIN, f"{one_line(body.decode(errors='replace'))}\n".encode())
        case Format.SRT | Format.VTT:
            return Answer(200, _PLAIN, _without_blanks(body.decode(errors="replace")).encode())
        case Format.JSON | Format.VERBOSE_JSON:
            return _json(reply, body)


def one_line(text: str) -> str:
    """Return *text* without the line breaks that are put between segments; each brings its own blank."""
    return text.replace("\n", "").strip()


_CUE = re.compile(r"^([\d:.,-]+ --> [\d:.,-]+\n)[ \t]+", re.MULTILINE)


def _without_blanks(cues: str) -> str:
    """Return *cues* without the blank before each text."""
    return _CUE.sub(r"\1", cues)


# -- JSON


def _json(reply: Reply, body: bytes) -> Answer | MeshError:
    try:
        said = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or not isinstance(said.get("text"), str):
        return ProcessingError(f"whisper-server's answer makes no sense: {_shown(_text_of(body))}")
    made = _verbose(reply, said) if reply.format is Format.VERBOSE_JSON else {"text": one_line(said["text"])}
    return Answer(200, _JSON, msgspec.json.encode(made))


def _verbose(reply: Reply, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return OpenAI's keys, in its order."""
    language = _str(said.get("language"))
    segments = [item for item in _list(said.get("segments")) if isinstance(item, dict)]
    made: dict[str, Any] = {
        "task": _str(said.get("task")) or "transcribe",
        "language": language,
        "duration": _number(said.get("duration")),
        "text": one_line(said["text"]),
    }
    if reply.words:
        made["words"] = [word for item in segments for word in _words(item, spaced=language not in UNSPACED)]
    if reply.segments:
        made["segments"] = [_segment(number, item) for number, item in enumerate(segments)]
    return made


def _segment(number: int, said: Mapping[str, Any]) -> dict[str, Any]:
    text, start = _str(said.get("text")), _seconds(said.get("start"))
    return {
        "id": number,
        "seek": round(start * 100),  # OpenAI: the first of the window's frames of 10 ms, which nobody tells us
        "start": start,
        "end": _seconds(said.get("end")),
        "text": text,
        "tokens": [token for token in _list(said.get("tokens")) if isinstance(token, int) and abs(token) < _LARGEST],
        "temperature": _number(said.get("temperature")),
        "avg_logprob": _number(said.get("avg_logprob")),
        "compression_ratio": _compression_ratio(text),
        "no_speech_prob": _number(said.get("no_speech_prob")),
    }


def _words(segment: Mapping[str, Any], *, spaced: bool) -> list[dict[str, Any]]:
    tokens = [
        Token(_str(item.get("word")), _seconds(item.get("start")), _seconds(item.get("end")))
        for item in _list(segment.get("words"))
        if isinstance(item, dict)
    ]
    found = words(tokens, _str(segment.get("text")), spaced=spaced)
    return [{"word": word.text, "start": word.start, "end": word.end} for word in found]


def _compression_ratio(text: str) -> float:
    """Return how often *text* repeats itself, as OpenAI reckons it."""
    data = text.encode(errors="replace")
    return len(data) / len(zlib.compress(data)) if data else 0.0


def _str(value: object) -> str:
    return value if isinstance(value, str) else ""


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: object) -> float:
    """Return *value*; 0 for null, which stands for what is no number, such as the mean over no tokens."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return 0.0
    return min(max(float(value), -_LARGEST), _LARGEST)


def _seconds(value: object) -> float:
    """Return a time without the noise of its binary form: Whisper's are whole hundredths."""
    return round(_number(value), 2)


# -- errors


def _failure(reply: Reply, status: int, body: str, log_tail: Sequence[str]) -> MeshError:
    """Return what failed. The log may not have come yet: what status and body say leads to the same kind of error."""
    log = "\n".join(log_tail)
    for pattern, make in _REASONS:
        if (found := re.search(pattern, log)) is not None:
            return make(reply, found)
    if status == 400:
        return _undecodable(reply, None)
    if "FFmpeg conversion failed" in body:
        return _unconvertible(reply, log_tail)
    if (found := re.search(r"\b(?:stof|stoi)\b", body)) is not None:
        return RequestError("a field of the form is not the number that it has to be")
    if "construction from null" in body:
        return RequestError("Whisper does not know this language", param="language")
    return _processing(status, body, log_tail)


def _undecodable(reply: Reply, found: re.Match[str] | None) -> MeshError:
    doubt = "but it may be damaged, cut off, or without any sound in it"
    message = f"the audio could not be decoded: it looks like {reply.looks_like}, {doubt}"
    return RequestError(f"{message}. whisper-server reads {READABLE}", param="file")


def _unconvertible(reply: Reply, log_tail: Sequence[str]) -> MeshError:
    """The converter says in the log why; it is the file's fault, but for a full disk."""
    said = [line.strip() for line in log_tail if _CONVERTER_FAILED.search(line)]
    why = f" (ffmpeg: {_shown(_CONVERTER_PREFIX.sub('', said[0]))})" if said else ""
    if any("No space left" in line for line in said):
        return ProcessingError(f"the audio could not be converted{why}")
    message = f"ffmpeg found no audio that it can read in this file, which looks like {reply.looks_like}{why}"
    return UnsupportedAudioError(message, param="file")


_CONVERTER_FAILED = re.compile("Invalid data|does not contain any stream|moov atom|No space left")
_CONVERTER_PREFIX = re.compile(r"^\[[^]]*\] ")


def _processing(status: int, body: str, log_tail: Sequence[str]) -> MeshError:
    """Return the error for what is nobody's mistake that we know of, with all that was said about it."""
    complaints = [line.strip() for line in log_tail if _COMPLAINT.search(line)]
    if why := [line for line in complaints if "failed to process audio" not in line] or complaints:
        return ProcessingError(f"whisper-server failed to process the audio: {_shown(why[0])}")
    return ProcessingError(f"whisper-server failed to process the audio: it answered {status} ({_shown(body)})")


_COMPLAINT = re.compile(r"error|failed|terminate|what\(\):|too many|larger than|abort", re.IGNORECASE)


def _text_of(body: bytes) -> str:
    return body[:4096].decode(errors="replace").strip()


def _shown(text: str) -> str:
    """Return what of *text* goes into a message: one line, not a long one."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."


def _lost_form(reply: Reply, found: re.Match[str]) -> MeshError:
    return ProcessingError(f"whisper-server could not read the form that it got: {found[0]}")


def _too_large_a_context(reply: Reply, found: re.Match[str]) -> MeshError:
    return RequestError(f"'audio_ctx' cannot be {found[1]}: this model's is {found[2]} at most", param="audio_ctx")


def _unknown_language(reply: Reply, found: re.Match[str]) -> MeshError:
    return RequestError(f"Whisper does not know the language {found[1]!r}", param="language")


def _no_voice_model(reply: Reply, found: re.Match[str]) -> MeshError:
    fix = "correct '--vad-model' in this model's arguments"
    return ProcessingError(f"whisper-server cannot open its model for voice detection, '{found[1]}': {fix}")


#: What its log says, and the error that this is. The first row that is found counts.
_REASONS: Final[Sequence[tuple[str, Callable[[Reply, re.Match[str]], MeshError]]]] = (
    ("no 'file' field in the request", _lost_form),
    ("failed to decode audio data|failed to read audio data|failed to read WAV file", _undecodable),
    (r"audio_ctx is larger than the maximum allowed \((\d+) > (\d+)\)", _too_large_a_context),
    (r"unknown language '([^'\n]{0,60})'", _unknown_language),
    (r"failed to open VAD model '([^'\n]{0,200})'", _no_voice_model),
)
