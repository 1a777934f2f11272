"""OpenAI's answers, and what failed, out of whisper-server's. The bytes are those of the real one (1.8.5)."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.engine.kind import Answer
from mesh.engine.whisper_answer import Reply, answer, one_line
from mesh.engine.whisper_fields import Format
from mesh.errors import MeshError, ProcessingError, RequestError, UnsupportedAudioError

SAID = " And so my fellow Americans ask not\n what your country can do\n"
LINE = "And so my fellow Americans ask not what your country can do"
HTML = "text/html; charset=utf-8"
JSON = "application/json"
PLAIN = b"text/plain; charset=utf-8"


def good(reply: Reply, body: bytes, content_type: str = JSON) -> Answer:
    found = answer(reply, 200, content_type, body, ())
    assert isinstance(found, Answer)
    assert found.status == 200
    return found


def verbose(said: dict[str, Any], *, words: bool = False, segments: bool = True) -> dict[str, Any]:
    found = good(Reply(Format.VERBOSE_JSON, words=words, segments=segments), json.dumps(said).encode())
    assert found.content_type == b"application/json"
    made: dict[str, Any] = json.loads(found.body)
    return made


def segment(**fields: Any) -> dict[str, Any]:
    return {
        "id": 0,
        "text": " Hello, you",
        "start": 0.0,
        "end": 8.700000000000001,
        "tokens": [1, 2, 3],
        "words": [
            {"word": " Hello", "start": 0.32, "end": 0.35000000000000003, "t_dtw": -1, "probability": 0.75},
            {"word": ",", "start": 0.35, "end": 0.4},
            {"word": " you", "start": 0.5, "end": 8.700000000000001},
        ],
        "temperature": 0.0,
        "avg_logprob": -0.16,
        "no_speech_prob": 3.6e-07,
    } | fields


def said(*segments: dict[str, Any], **fields: Any) -> dict[str, Any]:
    whole = {"task": "transcribe", "language": "english", "duration": 11.0, "text": SAID, "segments": [*segments]}
    return whole | fields


def test_json_is_one_line_of_text() -> None:
    assert good(Reply(Format.JSON), json.dumps({"text": SAID}).encode()) == Answer(
        200, b"application/json", json.dumps({"text": LINE}, separators=(",", ":")).encode()
    )


def test_text_is_plain() -> None:
    assert good(Reply(Format.TEXT), SAID.encode(), HTML) == Answer(200, PLAIN, f"{LINE}\n".encode())


def test_lines_are_put_together_as_they_are() -> None:
    assert one_line(" sixty by\ntes altogether\n 你好\n世界\n") == "sixty bytes altogether 你好世界"


@pytest.mark.parametrize(
    ("wanted", "start", "comma"), [(Format.SRT, "1\n", ","), (Format.VTT, "WEBVTT\n\n", ".")], ids=["srt", "vtt"]
)
def test_cues_have_no_blank_in_front(wanted: Format, start: str, comma: str) -> None:
    cues = f"{start}00:00:00{comma}000 --> 00:00:07{comma}010\n And so  my\n\n"
    assert good(Reply(wanted), cues.encode()) == Answer(200, PLAIN, cues.replace("\n And", "\nAnd").encode())
    assert good(Reply(wanted), b"").body == b""


def test_half_a_character_does_no_harm() -> None:
    assert good(Reply(Format.TEXT), b" a\xc3", HTML).body.decode() == "a\ufffd\n"
    assert (
        good(Reply(Format.SRT), b"1\n00:00:00,000 --> 00:00:07,010\n \xc3\n\n").body.decode().endswith("\n\ufffd\n\n")
    )


def test_verbose_json_has_the_keys_of_openai() -> None:
    made = verbose(said(segment(), detected_language="english", language_probabilities={"en": 1}))
    assert list(made) == ["task", "language", "duration", "text", "segments"]
    assert made | {"segments": []} == {
        "task": "transcribe", "language": "english", "duration": 11.0, "text": LINE, "segments": [],
    }  # fmt: skip
    [only] = made["segments"]
    assert 0.5 < only.pop("compression_ratio") < 1
    assert only == {
        "id": 0, "seek": 0, "start": 0.0, "end": 8.7, "text": " Hello, you", "tokens": [1, 2, 3], "temperature": 0.0,
        "avg_logprob": -0.16, "no_speech_prob": 3.6e-07,
    }  # fmt: skip


def test_words_are_whole_and_at_the_top_and_only_if_asked_for() -> None:
    made = verbose(said(segment()), words=True, segments=False)
    assert list(made) == ["task", "language", "duration", "text", "words"]
    assert made["words"] == [
        {"word": "Hello,", "start": 0.32, "end": 0.4},
        {"word": "you", "start": 0.5, "end": 8.7},
    ]
    assert verbose(said(segment(), segment()), words=True).keys() > {"words", "segments"}


def test_words_of_a_language_without_blanks() -> None:
    tokens = [{"word": word, "start": 0, "end": 1} for word in ("世", "界", "。")]
    made = verbose(said(segment(text="世界。", words=tokens), language="chinese"), words=True)
    assert [word["word"] for word in made["words"]] == ["世", "界。"]


def test_segments_are_numbered_and_a_silent_one_has_no_words() -> None:
    silent = {"id": 7, "text": "", "start": 11.0, "end": 30.0, "temperature": 0.0, "avg_logprob": None}
    made = verbose(said(segment(), silent), words=True)
    assert [item["id"] for item in made["segments"]] == [0, 1]
    assert made["segments"][1] | {"id": 1} == {
        "id": 1, "seek": 1100, "start": 11.0, "end": 30.0, "text": "", "tokens": [], "temperature": 0.0,
        "avg_logprob": 0.0, "compression_ratio": 0.0, "no_speech_prob": 0.0,
    }  # fmt: skip
    assert len(made["words"]) == 2


def test_nothing_was_heard() -> None:
    assert json.loads(good(Reply(Format.JSON), b'{"text":""}').body) == {"text": ""}
    assert verbose(said(text="", segments=[]))["segments"] == []


def test_its_own_answers_stay_as_they_are() -> None:
    for wanted in Format:
        reply = Reply(wanted, native=True)
        assert answer(reply, 200, HTML, SAID.encode(), ()) == Answer(200, HTML.encode(), SAID.encode())


# -- errors: status, body, log, and what they mean

INVALID = (400, "Invalid request")
FAILED = (500, '{"error":"failed to process audio"}')
NOT_CONVERTED = (500, '{"error":"FFmpeg conversion failed."}')


@pytest.mark.parametrize(
    ("status", "body", "log", "kind", "says"),
    [
        (*INVALID, "error: failed to decode audio data from memory buffer\nerror: failed to read audio data",
         RequestError, "looks like MP3, but it may be damaged"),
        (*INVALID, "", RequestError, "could not be decoded"),
        (*INVALID, "error: failed to read audio data from (t/x.wav)\nerror: failed to read WAV file 't/x.wav'",
         RequestError, "could not be decoded"),
        (500, "500 Internal Server Error\nstof", "", RequestError, "not the number"),
        (500, "500 Internal Server Error\nstoi", "", RequestError, "not the number"),
        (500, "500 Internal Server Error\nbasic_string: construction from null is not valid",
         "whisper_lang_id: unknown language 'xx'", RequestError, "does not know the language 'xx'"),
        (500, "500 Internal Server Error\nbasic_string: construction from null is not valid", "",
         RequestError, "does not know this language"),
        (*FAILED, "whisper_full_with_state: audio_ctx is larger than the maximum allowed (1500 > 448)\n"
         "bin/whisper-server: failed to process audio", RequestError, "'audio_ctx' cannot be 1500.* 448 at most"),
        (*FAILED, "whisper_full_with_state: too many decoders requested (9), max = 8\nbin/w: failed to process audio",
         ProcessingError, r"too many decoders requested \(9\), max = 8$"),
        (*FAILED, "whisper_vad_init_from_file_with_params: failed to open VAD model '/v'\nw: failed to process audio",
         ProcessingError, "'/v': correct '--vad-model'"),
        (*FAILED, "bin/whisper-server: failed to process audio", ProcessingError, "server: failed to process audio$"),
        (*FAILED, "", ProcessingError, r"it answered 500 \(\{\"error\":\"failed to process audio\"\}\)$"),
        (*NOT_CONVERTED, "ffmpeg version n9.0\n[in#0 @ 0x55] moov atom not found\n"
         "[in#0 @ 0x55] Error opening input: Invalid data found when processing input\nError opening x.wav.",
         UnsupportedAudioError, r"looks like MP3 \(ffmpeg: moov atom not found\)$"),
        (*NOT_CONVERTED, "av_interleaved_write_frame(): No space left on device",
         ProcessingError, "could not be converted.* No space left on device"),
        (*NOT_CONVERTED, "", UnsupportedAudioError, "looks like MP3$"),
        (404, "File Not Found (/inference)", "", ProcessingError, "answered 404 .File Not Found"),
        (503, "", "", ProcessingError, "answered 503"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("native", [False, True])
def test_what_failed_is_said(status: int, body: str, log: str, kind: type[MeshError], says: str, native: bool) -> None:
    reply = Reply(Format.JSON, native=native, looks_like="MP3")
    found = answer(reply, status, "text/plain", body.encode(), log.splitlines())
    assert type(found) is kind
    with pytest.raises(kind, match=says):
        raise found
    assert found.status == {RequestError: 400, UnsupportedAudioError: 415, ProcessingError: 500}[kind]
    assert found.source == ("instance" if kind is ProcessingError else "mesh")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"text": 5}', b"null", b"[" * 100_000, b'{"text": "\\ud800"}x'])
def test_an_answer_that_makes_no_sense_is_an_error(body: bytes) -> None:
    for wanted in (Format.JSON, Format.VERBOSE_JSON):
        found = answer(Reply(wanted), 200, JSON, body, ())
        assert isinstance(found, ProcessingError)
        assert len(found.message) < 500


KEYS = ("text", "segments", "words", "word", "start", "end", "tokens", "language", "duration", "avg_logprob", "other")


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | _objects(inner),
    max_leaves=5,
)
REPLIES = st.builds(
    Reply,
    st.sampled_from(Format),
    native=st.booleans(),
    words=st.booleans(),
    segments=st.booleans(),
    looks_like=st.text(),
)


SEGMENTS = st.lists(_objects(JSON_VALUES | st.lists(_objects(JSON_VALUES), max_size=3)), max_size=3)


@given(REPLIES, st.integers(100, 599), st.text(), st.binary(), st.lists(st.text()))
def test_any_bytes_make_an_answer_or_an_error(
    reply: Reply, status: int, content_type: str, body: bytes, log: list[str]
) -> None:
    for code in (status, 200):
        found = answer(reply, code, content_type, body, log)
        assert isinstance(found, Answer if code == 200 and reply.native else Answer | MeshError)


@given(_objects(JSON_VALUES), st.text(), SEGMENTS)
def test_any_json_makes_json_of_openai_s_types(fields: dict[str, Any], text: str, segments: list[Any]) -> None:
    made = verbose(fields | {"text": text, "segments": segments}, words=True)
    times = [made["duration"], *(item[key] for item in (*made["segments"], *made["words"]) for key in ("start", "end"))]
    assert all(isinstance(time, float | int) and math.isfinite(time) for time in times)
    assert all(isinstance(item["text"], str) and isinstance(item["tokens"], list) for item in made["segments"])
    assert all(isinstance(item["word"], str) for item in made["words"])
