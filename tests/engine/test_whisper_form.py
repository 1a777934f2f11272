"""The form that whisper-server gets for a client's, and which are refused. Its answers: ``test_whisper_answer.py``."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.form import Form, FormFile
from mesh.engine.kind import FormAdapter, Upload
from mesh.engine.whisper_answer import Reply
from mesh.engine.whisper_fields import Format
from mesh.engine.whisper_form import WhisperAdapter
from mesh.errors import BodyTooLargeError, RequestError, UnsupportedAudioError
from tests.core.test_audio_format import MANIFEST, MP3_FRAME, id3
from tests.core.test_audio_length import flac
from tests.engine.forms import BEFORE, PATH, received, sent, whisper_profile
from tests.real_whisper import silence

ADAPTER: FormAdapter = WhisperAdapter()
AUDIO = silence(0.1)
M4A = b"\x00\x00\x00\x1cftypM4A \x00\x00\x02\x00"


def upload(audio: bytes | None, *fields: tuple[str, str], path: str = PATH, convert: bool = False) -> Upload:
    return ADAPTER.upload(path, *received(audio, *fields), whisper_profile(convert=convert))


def test_the_file_goes_as_it_came_and_is_not_copied() -> None:
    form, body = received(AUDIO)
    made = ADAPTER.upload(PATH, form, body, whisper_profile())
    view = made.parts[1]
    assert isinstance(view, memoryview)
    assert view.obj is body.obj
    assert made.path == b"/inference"
    assert sent(made) == {
        "response_format": b"json",
        "max_len": b"100000",
        "no_language_probabilities": b"true",
        "language": b"auto",
        "file": AUDIO,
    }


def test_translations_are_asked_for_in_its_own_way() -> None:
    assert "translate" not in sent(upload(AUDIO))
    assert sent(upload(AUDIO, path="/v1/audio/translations"))["translate"] == b"true"


def test_its_own_path_gets_its_own_fields() -> None:
    made = upload(AUDIO, ("max_len", "20"), ("response_format", "srt"), path="/inference")
    assert sent(made) == {"response_format": b"srt", "max_len": b"20", "file": AUDIO}
    assert made.reply == Reply(Format.SRT, native=True, looks_like="WAV")


@pytest.mark.parametrize(
    ("asked", "words", "segments"),
    [((), False, True), (("word",), True, False), (("segment",), False, True), (("word", "segment"), True, True)],
)
def test_the_reply_has_what_was_asked_for(asked: tuple[str, ...], words: bool, segments: bool) -> None:
    granularities = (("timestamp_granularities[]", text) for text in asked)
    made = upload(AUDIO, ("response_format", "verbose_json"), *granularities)
    assert made.reply == Reply(Format.VERBOSE_JSON, words=words, segments=segments, looks_like="WAV")


def test_a_prompt_may_hold_anything() -> None:
    prompt = '--client\r\nContent-Disposition: form-data; name="debug_mode"\r\n\r\ntrue\r\n"\ud800 ä'
    parts = sent(upload(AUDIO, ("prompt", prompt)))
    assert parts["prompt"] == prompt.replace("\ud800", "?").encode()
    assert "debug_mode" not in parts


def test_boundaries_differ() -> None:
    first, second = upload(AUDIO), upload(AUDIO)
    assert first.content_type != second.content_type
    assert re.fullmatch(rb"multipart/form-data; boundary=llama-mesh-[0-9a-f]{32}", first.content_type)


def test_the_client_s_file_name_does_not_get_into_its_log() -> None:
    form = Form((), (FormFile("file", 'x"\n/etc/passwd', len(BEFORE), len(BEFORE) + len(AUDIO)),))
    made = ADAPTER.upload(PATH, form, received(AUDIO)[1], whisper_profile())
    assert b"passwd" not in b"".join(made.parts)


def test_of_two_files_the_last_one_counts() -> None:
    body = memoryview(b"fLaC first" + AUDIO)
    form = Form((), (FormFile("file", "a", 0, 10), FormFile("file", "b", 10, len(body)), FormFile("more", "c", 0, 10)))
    assert sent(ADAPTER.upload(PATH, form, body, whisper_profile()))["file"] == AUDIO


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (Form(), "no file called 'file'"),
        (Form((("file", "hello"),)), "without a file name"),
        (Form((), (FormFile("audio", "a.wav", 0, 3), FormFile("x", "", 3, 4))), "there is one called 'audio', 'x'"),
        (Form((), (FormFile("file", "a.wav", 3, 3),)), "is empty"),
    ],
)
def test_without_audio_there_is_nothing_to_do(form: Form, says: str) -> None:
    with pytest.raises(RequestError, match=says) as refused:
        ADAPTER.upload(PATH, form, memoryview(b"RIFF"), whisper_profile())
    assert (refused.value.status, refused.value.param) == (400, "file")


@pytest.mark.parametrize("path", [PATH, "/inference"])
def test_what_it_cannot_read_is_refused_with_what_it_can(path: str) -> None:
    with pytest.raises(UnsupportedAudioError, match=r"like MP4 \(m4a, mp4\)\. .* WAV, .*'convert: true'") as refused:
        upload(M4A, path=path)
    assert (refused.value.status, refused.value.type) == (415, "unsupported_media_type")


def test_ffmpeg_reads_more_but_not_text() -> None:
    assert sent(upload(M4A, convert=True))["file"] == M4A
    flag = ADAPTER.upload(PATH, *received(M4A), whisper_profile("--convert"))
    assert sent(flag)["file"] == M4A
    with pytest.raises(UnsupportedAudioError, match=r"looks like text\. .*, and ffmpeg most other"):
        upload(b"#EXTM3U\nfile:///etc/passwd\n", convert=True)


@pytest.mark.parametrize(
    "audio",
    [
        MANIFEST,
        b"ffconcat version 1.0\nfile secret.wav\n#\xff",
        MP3_FRAME * 3 + MANIFEST,
        b"\x00\x00\x00\x1cftypM4A " + MANIFEST,
        b"RIFF\x00\x00\x00\x00WAVE" + MANIFEST,
        id3(MANIFEST, size=100_000),
        id3(MP3_FRAME * 3 + MANIFEST, size=100_000),
        id3(b"", size=100_000),
        b"\x01\x02\x03",
    ],
)
def test_ffmpeg_gets_nothing_that_it_might_take_for_a_list_of_files(audio: bytes) -> None:
    with pytest.raises(UnsupportedAudioError) as refused:
        upload(audio, convert=True)
    assert (refused.value.status, refused.value.param) == (415, "file")


def test_a_tag_with_a_picture_in_it_is_looked_past() -> None:
    audio = id3(MP3_FRAME * 3, size=100_000)
    assert sent(upload(audio, convert=True))["file"] == sent(upload(audio))["file"] == audio
    assert upload(audio[:50_000]).length > 50_000  # it is for whisper-server to say what that is


def test_what_is_much_longer_than_it_looks_is_refused() -> None:
    four_hours = 4 * 3600 * 16_000
    assert upload(flac(four_hours)).length
    for audio in (flac(four_hours + 16_000 * 600), id3(flac(four_hours * 2))):
        with pytest.raises(BodyTooLargeError, match=r"[48]\.[02] hours long; 4 are the most") as refused:
            upload(audio)
        assert (refused.value.status, refused.value.param) == (413, "file")


@pytest.mark.parametrize(
    "fields", [("stream", "true"), ("response_format", "xml"), ("language", "xx"), ("temperature", "2")]
)
def test_what_is_asked_for_wrongly_is_said_before_anything_is_sent(fields: tuple[str, str]) -> None:
    with pytest.raises(RequestError) as refused:
        upload(AUDIO, fields)
    assert (refused.value.status, refused.value.param) == (400, fields[0])


def test_only_the_file_says_what_it_is() -> None:
    body = memoryview(b"fLaCRIFF....WAVE")
    with pytest.raises(UnsupportedAudioError, match="looks like text"):
        ADAPTER.upload(PATH, Form((), (FormFile("file", "a", 0, 3),)), body, whisper_profile())


@given(st.binary(min_size=1, max_size=200), st.text(max_size=200), st.booleans())
def test_any_file_and_prompt_arrive_whole_or_are_refused(audio: bytes, prompt: str, convert: bool) -> None:
    try:
        made = upload(audio, ("prompt", prompt), convert=convert)
    except UnsupportedAudioError:
        return
    assert sent(made)["file"] == audio
