"""The adapter and the real whisper-server: OpenAI's answers in all formats, and every error that it masks."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mesh.cli import whisper_setup
from mesh.cli.whisper_build import NotPossibleError
from mesh.cli.whisper_setup import WhisperParts
from mesh.core.audio_format import Readable, sniff
from mesh.engine.kind import Answer, Upload
from mesh.engine.whisper_answer import Reply
from mesh.engine.whisper_fields import Format
from mesh.engine.whisper_form import WhisperAdapter
from mesh.errors import MeshError, ProcessingError, RequestError, UnsupportedAudioError
from tests.core.test_audio_format import LOW_FRAME, MP1_FRAME, MP2_FRAME, MP3_FRAME, id3
from tests.engine.forms import PATH, received, whisper_profile
from tests.real_whisper import WhisperServer, silence, whisper_server
from tests.tiny_whisper import SENTENCE, write_whisper

pytestmark = pytest.mark.e2e

ADAPTER = WhisperAdapter()
TRANSLATIONS = "/v1/audio/translations"
ENGLISH = "And so my fellow Americans ask not what your country can do for you, ask what you can do for your country."
VERBOSE = ("response_format", "verbose_json")
WORDS = ("timestamp_granularities[]", "word")


@pytest.fixture(scope="module")
def parts() -> WhisperParts:
    try:
        return whisper_setup.ensure(os.environ, Console(stderr=True))
    except NotPossibleError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whisper") / "tiny.bin"
    write_whisper(path)
    return path


@pytest.fixture(scope="module")
def speech(parts: WhisperParts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WhisperServer]:
    """The real model."""
    with whisper_server(parts.server, parts.model, tmp_path_factory.mktemp("speech")) as server:
        yield server


@pytest.fixture(scope="module")
def tiny(parts: WhisperParts, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WhisperServer]:
    with whisper_server(parts.server, tiny_model, tmp_path_factory.mktemp("tiny")) as server:
        yield server


def ask(
    server: WhisperServer, audio: bytes, *fields: tuple[str, str], path: str = PATH, convert: bool = False
) -> Answer | MeshError:
    """Do what the data plane does with a form."""
    upload = ADAPTER.upload(path, *received(audio, *fields), whisper_profile(convert=convert))
    headers = {"content-type": upload.content_type.decode()}
    before = server.said()
    answer = server.request("POST", upload.path.decode(), content=b"".join(upload.parts), headers=headers)
    log = server.said().removeprefix(before).splitlines()
    return ADAPTER.answer(upload, answer.status_code, answer.headers["content-type"], answer.content, log)


def good(server: WhisperServer, audio: bytes, *fields: tuple[str, str], path: str = PATH) -> str:
    found = ask(server, audio, *fields, path=path)
    assert isinstance(found, Answer), found
    wanted = dict(fields).get("response_format", "json")
    plain = b"application/json" if "json" in wanted else b"text/plain; charset=utf-8"
    assert (found.status, found.content_type) == (200, plain)
    return found.body.decode()


def verbose(server: WhisperServer, audio: bytes, *fields: tuple[str, str], path: str = PATH) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(good(server, audio, VERBOSE, *fields, path=path))
    return made


def unmask(server: WhisperServer, audio: bytes | None, **fields: str) -> Answer | MeshError:
    """Send what an upload would never hold, and let the adapter explain the answer."""
    before = server.said()
    answer = server.post(audio, **fields)
    log = server.said().removeprefix(before).splitlines()
    upload = Upload(b"", b"", (), Reply(Format.JSON, looks_like="WAV"))
    return ADAPTER.answer(upload, answer.status_code, answer.headers["content-type"], answer.content, log)


# -- what is said in jfk.wav


def test_speech_in_all_formats(speech: WhisperServer, parts: WhisperParts) -> None:
    audio = parts.speech.read_bytes()
    assert json.loads(good(speech, audio)) == {"text": ENGLISH}
    assert good(speech, audio, ("response_format", "text")) == f"{ENGLISH}\n"
    srt = good(speech, audio, ("response_format", "srt"))
    assert srt == f"1\n00:00:00,000 --> 00:00:10,500\n{ENGLISH}\n\n"
    vtt = good(speech, audio, ("response_format", "vtt"))
    assert vtt == f"WEBVTT\n\n00:00:00.000 --> 00:00:10.500\n{ENGLISH}\n\n"


def test_speech_in_detail(speech: WhisperServer, parts: WhisperParts) -> None:
    audio = parts.speech.read_bytes()
    both = verbose(speech, audio, WORDS, ("timestamp_granularities[]", "segment"))
    assert list(both) == ["task", "language", "duration", "text", "words", "segments"]
    assert (both["task"], both["language"], both["duration"], both["text"]) == ("transcribe", "english", 11.0, ENGLISH)
    assert " ".join(word["word"] for word in both["words"]) == ENGLISH
    times = [time for word in both["words"] for time in (word["start"], word["end"])]
    assert times == sorted(times)
    [segment] = both["segments"]
    assert list(segment) == [
        "id", "seek", "start", "end", "text", "tokens", "temperature", "avg_logprob", "compression_ratio",
        "no_speech_prob",
    ]  # fmt: skip
    assert (segment["start"], segment["end"], segment["text"]) == (0.0, 10.5, f" {ENGLISH}")
    assert -1 < segment["avg_logprob"] < 0 < segment["no_speech_prob"] < 0.1
    assert 1 < segment["compression_ratio"] < 2
    assert all(type(token) is int for token in segment["tokens"])


def test_translations_say_so(speech: WhisperServer, parts: WhisperParts) -> None:
    made = verbose(speech, parts.speech.read_bytes(), ("language", "English"), path=TRANSLATIONS)
    assert (made["task"], made["text"]) == ("translate", ENGLISH)


# -- the same, quicker


def test_several_segments_are_one_line(tiny: WhisperServer) -> None:
    audio = silence(40)
    assert json.loads(good(tiny, audio)) == {"text": f"{SENTENCE} {SENTENCE}"}
    assert good(tiny, audio, ("response_format", "text")) == f"{SENTENCE} {SENTENCE}\n"
    assert good(tiny, audio, ("response_format", "vtt")) == (
        f"WEBVTT\n\n00:00:00.000 --> 00:00:30.000\n{SENTENCE}\n\n00:00:30.000 --> 00:01:00.000\n{SENTENCE}\n\n"
    )
    made = verbose(tiny, audio, WORDS)
    assert [word["word"] for word in made["words"]] == SENTENCE.split() * 2
    assert "segments" not in made


def test_words_and_characters_are_whole(parts: WhisperParts, tmp_path: Path) -> None:
    model = tmp_path / "model.bin"
    write_whisper(model, [b" " + b"x" * 40, b" transcript", b"ion" * 4, b" \xc3", b"\xa4", b",", b" b"])
    said = "x" * 40 + " transcript" + "ion" * 4 + " ä, b"
    with whisper_server(parts.server, model, tmp_path) as server:
        made = verbose(server, silence(1), WORDS, ("timestamp_granularities[]", "segment"))
        assert json.loads(good(server, silence(1))) == {"text": said}
    assert made["text"] == said
    assert [segment["text"] for segment in made["segments"]] == [f" {said}"]
    assert [word["word"] for word in made["words"]] == said.split()


def test_all_fields_together(tiny: WhisperServer) -> None:
    fields = (("language", "pt-BR"), ("prompt", 'Ödön "x"\r\n--'), ("temperature", "1e-40"), ("model", "w"))
    assert verbose(tiny, silence(1), *fields)["language"] == "portuguese"
    assert tiny.said().count("lang = pt") == 1


def test_flags_of_the_profile_do_no_harm(parts: WhisperParts, tiny_model: Path, tmp_path: Path) -> None:
    with whisper_server(parts.server, tiny_model, tmp_path, "-nt", "-ml", "5", "-sow") as server:
        cue = f"1\n00:00:00,000 --> 00:00:30,000\n{SENTENCE}\n\n"
        assert good(server, silence(1), ("response_format", "srt")) == cue
        assert verbose(server, silence(1), WORDS)["words"][0]["word"] == "Hello"


def test_its_own_path_has_its_own_answers(tiny: WhisperServer) -> None:
    found = ask(tiny, silence(1), ("response_format", "text"), path="/inference")
    assert found == Answer(200, b"text/html; charset=utf-8", f" {SENTENCE}\n".encode())
    fields = [("offset_n", "5"), ("temperature_inc", "0.0000001"), ("beam_size", "100"), ("best_of", "100"),
              ("audio_ctx", "99999"), ("max_context", "1e30"), ("diarize", "on"), ("language", ""),
              ("vad_threshold", "9"), ("response_format", "srt"), ("no_timestamps", "true")]  # fmt: skip
    found = ask(tiny, silence(1), *fields, path="/inference")
    assert isinstance(found, Answer), found
    assert found.content_type == b"application/x-subrip"
    assert found.body.startswith(b"6\n00:00:00,000 --> 00:00:30,000\n")


# -- what it reads


def rf64(samples: bytes) -> bytes:
    sizes = struct.pack("<QQQI", len(samples) + 72, len(samples), len(samples) // 2, 0)
    form = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)
    data = b"ds64" + struct.pack("<I", 28) + sizes + b"fmt " + struct.pack("<I", 16) + form
    return b"RF64\xff\xff\xff\xffWAVE" + data + b"data\xff\xff\xff\xff" + samples


def aiff(samples: bytes) -> bytes:
    rate = b"\x40\x0c\xfa" + bytes(7)  # 16,000 in 80 bits
    common = b"COMM" + struct.pack(">IhIh", 18, 1, len(samples) // 2, 16) + rate
    sound = b"SSND" + struct.pack(">III", len(samples) + 8, 0, 0) + samples
    return b"FORM" + struct.pack(">I", 4 + len(common) + len(sound)) + b"AIFF" + common + sound


SAMPLES = bytes(32_000)


@pytest.mark.parametrize(
    "audio",
    [
        silence(1), rf64(SAMPLES), aiff(SAMPLES), MP3_FRAME * 40, MP2_FRAME * 40, MP1_FRAME * 90, LOW_FRAME * 40,
        id3(MP3_FRAME * 40), MP3_FRAME[100:] + MP3_FRAME * 40, bytes(1000) + MP3_FRAME * 40,
    ],
    ids=["wav", "rf64", "aiff", "mp3", "mp2", "mp1", "low", "id3", "cut", "zeros"],
)  # fmt: skip
def test_what_is_let_through_can_be_read(tiny: WhisperServer, audio: bytes) -> None:
    assert json.loads(good(tiny, audio)) == {"text": SENTENCE}


@pytest.mark.parametrize(
    "audio",
    [
        b"no audio", b"GIF89a", b"\x00\x00\x00\x1cftypM4A \x00\x00\x02\x00", b"\x1aE\xdf\xa3....webm",
        b"OggS" + bytes(24) + b"OpusHead", b"\xff\xf1\x60\x40\x03\x5f\xfc" * 100, b"\x01\x02\x03",
    ],
)  # fmt: skip
def test_what_is_refused_could_not_be_read(tiny: WhisperServer, audio: bytes) -> None:
    assert sniff(audio).readable is not Readable.YES
    with pytest.raises(UnsupportedAudioError):
        ask(tiny, audio)
    assert tiny.post(audio).status_code == 400


# -- what it masks


@pytest.mark.parametrize(
    "audio", [silence(0), silence(1)[:30], b"fLaC" + bytes(40), b"OggS" + bytes(24) + b"\x01vorbis"]
)
def test_audio_that_is_damaged_is_the_client_s(tiny: WhisperServer, audio: bytes) -> None:
    found = ask(tiny, audio)
    assert isinstance(found, RequestError)
    assert (found.status, found.param) == (400, "file")
    assert "could not be decoded" in found.message


@pytest.mark.parametrize(
    ("fields", "kind", "says"),
    [
        ({"temperature": "hot"}, RequestError, "not the number"),
        ({"temperature": "1e999"}, RequestError, "not the number"),
        ({"max_len": "x"}, RequestError, "not the number"),
        ({"beam_size": "100"}, ProcessingError, "too many decoders requested (100), max = 8"),
        ({"audio_ctx": "99999"}, RequestError, "'audio_ctx' cannot be 99999: this model's is 1500 at most"),
        ({"vad": "true"}, ProcessingError, "correct '--vad-model'"),
        ({"language": "xx", "response_format": "verbose_json"}, RequestError, "does not know the language 'xx'"),
    ],
    ids=str,
)
def test_what_failed_is_said(tiny: WhisperServer, fields: dict[str, str], kind: type[MeshError], says: str) -> None:
    found = unmask(tiny, silence(1), **fields)
    assert type(found) is kind
    assert says in found.message


def test_an_unknown_path_and_a_form_without_a_file(tiny: WhisperServer) -> None:
    found = unmask(tiny, None)
    assert isinstance(found, ProcessingError)
    assert "no 'file' field" in found.message
    upload = Upload(b"", b"", (), Reply(Format.JSON))
    missing = tiny.request("POST", "/elsewhere", content=b"x")
    error = ADAPTER.answer(upload, missing.status_code, "text/plain", missing.content, ())
    assert isinstance(error, ProcessingError)
    assert "File Not Found (/elsewhere)" in error.message


# -- ffmpeg


@pytest.fixture
def ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A converter that says what the file ``says`` says and fails, unless that is empty; then it copies."""
    directory = tmp_path / "bin"
    directory.mkdir()
    program, says = directory / "ffmpeg", directory / "says"
    says.write_text("")
    program.write_text(
        f'#!/bin/sh\n[ "$1" = -version ] && exit 0\n[ -s {says} ] && {{ cat {says}; exit 1; }}\n'
        'for last; do :; done\ncp "$2" "$last"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return says


def test_what_is_converted_and_what_cannot_be(
    parts: WhisperParts, tiny_model: Path, tmp_path: Path, ffmpeg: Path
) -> None:
    with whisper_server(parts.server, tiny_model, tmp_path, "--convert", "--tmp-dir", str(tmp_path)) as server:
        assert isinstance(ask(server, silence(1), convert=True), Answer)
        damaged = ask(server, b"\x00\x00\x00\x1cftypM4A ", convert=True)
        assert type(damaged) is RequestError
        assert "looks like MP4 (m4a, mp4)" in damaged.message
        ffmpeg.write_text("Input #0\n[in#0 @ 0x55] moov atom not found\nError opening input file t/x.wav.\n")
        refused = ask(server, b"\x00\x00\x00\x1cftypM4A ", convert=True)
    assert isinstance(refused, UnsupportedAudioError)
    assert "looks like MP4 (m4a, mp4)" in refused.message
