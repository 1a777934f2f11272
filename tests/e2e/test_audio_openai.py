"""Speech through a node, by the real whisper-server: OpenAI's own client, the formats, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI

from mesh.cli.whisper_setup import SPEECH_SAYS, WhisperParts
from tests.e2e.audio import (
    BOUNDARY,
    NATIVE,
    SENTENCE,
    TRANSCRIPTIONS,
    TRANSLATIONS,
    AudioNode,
    form,
    whisper_profile,
)
from tests.e2e.harness import Models, profile
from tests.real_whisper import silence

TWICE = silence(40)  # two windows of 30 s: the tiny model hears its sentence twice
TEXT = f"{SENTENCE} {SENTENCE}"
CUE = re.compile(r"(\d\d:\d\d:\d\d[,.]\d{3}) --> (\d\d:\d\d:\d\d[,.]\d{3})\n(\S.*)\n")


@pytest.fixture(scope="module")
def node(
    whisper_parts: WhisperParts, tiny_speech: Path, models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AudioNode]:
    cookbook: dict[str, Any] = {
        "whisper": whisper_profile(whisper_parts.model, "-t 2", aliases=["whisper-1"]),
        "tiny": [whisper_profile(tiny_speech), whisper_profile(tiny_speech, id="other")],
        "alpha": profile(models.alpha),
    }
    directory = tmp_path_factory.mktemp("audio")
    with AudioNode(directory, whisper_parts, cookbook, {"default_model": "tiny"}) as node:
        yield node


@pytest.fixture(scope="module")
def client(node: AudioNode) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


class TestSpeech:
    """Whisper tiny and eleven seconds of Kennedy."""

    def test_json(self, client: OpenAI, whisper_parts: WhisperParts) -> None:
        raw = client.audio.transcriptions.with_raw_response.create(model="whisper-1", file=whisper_parts.speech)
        text = raw.parse().text
        assert SPEECH_SAYS in text
        assert text == " ".join(text.split()), "no line breaks, no blanks around it"
        assert raw.headers["x-llama-mesh-node"] == "e2e"
        assert raw.headers["x-llama-mesh-instance"].startswith("whisper.default-")

    def test_text(self, client: OpenAI, whisper_parts: WhisperParts) -> None:
        with whisper_parts.speech.open("rb") as file:
            raw = client.audio.transcriptions.with_raw_response.create(
                model="whisper", file=file, response_format="text", language="en"
            )
        assert raw.headers["content-type"].startswith("text/plain")
        assert SPEECH_SAYS in raw.text
        assert raw.text.strip() == " ".join(raw.text.split())

    @pytest.mark.parametrize("kind", ["srt", "vtt"])
    def test_subtitles(self, client: OpenAI, whisper_parts: WhisperParts, kind: Literal["srt", "vtt"]) -> None:
        text = client.audio.transcriptions.create(model="whisper", file=whisper_parts.speech, response_format=kind)
        assert isinstance(text, str)
        assert text.startswith("1\n00:00:00,000 --> " if kind == "srt" else "WEBVTT\n\n00:00:00.000 --> ")
        cues = CUE.findall(text)
        assert SPEECH_SAYS in " ".join(words for _, _, words in cues)

    def test_verbose(self, client: OpenAI, whisper_parts: WhisperParts) -> None:
        result = client.audio.transcriptions.create(
            model="whisper", file=whisper_parts.speech, response_format="verbose_json"
        )
        assert (result.language, result.words) == ("english", None)
        assert result.duration == pytest.approx(11.0, abs=0.01)
        assert result.segments
        assert [segment.id for segment in result.segments] == list(range(len(result.segments)))
        for segment in result.segments:
            numbers = [segment.start, segment.end, segment.avg_logprob, segment.compression_ratio]
            assert all(isinstance(number, float) for number in [*numbers, segment.no_speech_prob, segment.temperature])
            assert isinstance(segment.seek, int)
            assert segment.tokens
        assert SPEECH_SAYS in result.text
        assert "".join(segment.text for segment in result.segments).strip() == result.text

    def test_words(self, client: OpenAI, whisper_parts: WhisperParts) -> None:
        result = client.audio.transcriptions.create(
            model="whisper",
            file=whisper_parts.speech,
            response_format="verbose_json",
            timestamp_granularities=["word"],
        )
        assert result.words
        spoken = re.findall(r"\w+", " ".join(word.word for word in result.words))
        assert spoken == re.findall(r"\w+", result.text)
        assert len(result.words) == len(result.text.split()), "whole words, not tokens"
        starts = [word.start for word in result.words]
        assert starts == sorted(starts)
        assert all(word.start <= word.end for word in result.words)

    @pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # OpenAI's own service goes without it soon
    def test_translation(self, client: OpenAI, whisper_parts: WhisperParts) -> None:
        assert SPEECH_SAYS in client.audio.translations.create(model="whisper", file=whisper_parts.speech).text
        result = client.audio.translations.create(
            model="whisper", file=whisper_parts.speech, response_format="verbose_json"
        )
        assert (result.model_extra or {})["task"] == "translate"
        assert result.language in ("english", "en")

    def test_from_the_command_line(self, node: AudioNode, whisper_parts: WhisperParts) -> None:
        speech = str(whisper_parts.speech)
        unclear = node.cli("transcribe", speech)
        assert unclear.returncode == 1
        assert "several models for audio: whisper, tiny, tiny:other" in unclear.stderr
        result = node.cli("transcribe", speech, "--model", "whisper")
        assert (result.returncode, result.stderr.count("\n")) == (0, 2), result
        assert SPEECH_SAYS in result.stdout
        assert node.cli_json("transcribe", speech, "--model", "whisper", "--translate")["text"] + "\n" == result.stdout
        srt = node.cli("transcribe", speech, "--model", "whisper", "--format", "srt").stdout
        assert CUE.search(srt)


class TestForms:
    """What can be told by a model that hears the same in everything."""

    def test_segments_become_one_text(self, node: AudioNode) -> None:
        assert node.heard("tiny", TWICE) == TEXT
        assert node.ask("tiny", TWICE, response_format="srt").text == (
            f"1\n00:00:00,000 --> 00:00:30,000\n{SENTENCE}\n\n2\n00:00:30,000 --> 00:01:00,000\n{SENTENCE}\n\n"
        )
        assert node.ask("tiny", TWICE, response_format="vtt").text == (
            f"WEBVTT\n\n00:00:00.000 --> 00:00:30.000\n{SENTENCE}\n\n00:00:30.000 --> 00:01:00.000\n{SENTENCE}\n\n"
        )

    @pytest.mark.parametrize("file_first", [False, True], ids=["model first", "model last"])
    @pytest.mark.parametrize("path", [TRANSCRIPTIONS, TRANSLATIONS])
    def test_the_model_may_stand_anywhere(self, node: AudioNode, path: str, file_first: bool) -> None:
        body = form({"model": "tiny:other", "prompt": "x"}, TWICE, file_first=file_first)
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        response = node.http.post(path, content=body, headers=kind)
        assert response.json() == {"text": TEXT}
        assert response.headers["x-llama-mesh-instance"].startswith("tiny.other-")

    def test_without_a_length(self, node: AudioNode) -> None:
        body = form({"model": "tiny"}, TWICE)
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        pieces = (body[at : at + 50_000] for at in range(0, len(body), 50_000))
        response = node.http.post(TRANSCRIPTIONS, content=pieces, headers=kind)
        assert response.json() == {"text": TEXT}

    def test_without_a_model_the_default_one_hears(self, node: AudioNode) -> None:
        response = node.http.post(TRANSCRIPTIONS, files={"file": ("a.wav", TWICE)})
        assert response.json() == {"text": TEXT}

    def test_the_native_path_answers_natively(self, node: AudioNode) -> None:
        answer = node.ask("tiny", TWICE, NATIVE, response_format="verbose_json").json()
        assert answer["text"] == f" {SENTENCE}\n {SENTENCE}\n"
        assert answer["segments"][0]["words"][0]["word"] == " Hello"

    def test_what_models_can_do_is_listed(self, node: AudioNode, client: OpenAI) -> None:
        can = {model.id: (model.model_extra or {})["metadata"]["capabilities"] for model in client.models.list()}
        assert can == {"whisper": ["audio"], "tiny": ["audio"], "tiny:other": ["audio"], "alpha": ["text"]}


REFUSED: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], int, str]] = {
    "PDF": ({"file": b"%PDF-1.7 ..."}, openai.APIStatusError, 415, "PDF"),
    "MP4": ({"file": b"\0\0\0\x20ftypM4A " + bytes(100)}, openai.APIStatusError, 415, "convert: true"),
    "text": ({"file": b"hello, hello, hello"}, openai.APIStatusError, 415, "WAV"),
    "broken wav": ({"file": TWICE[:40]}, openai.BadRequestError, 400, "decode"),
    "empty": ({"file": b""}, openai.BadRequestError, 400, "empty"),
    "unknown model": ({"model": "whisper-9"}, openai.NotFoundError, 404, "whisper-9"),
    "unknown profile": ({"model": "tiny:none"}, openai.NotFoundError, 404, "tiny:none"),
    "language": ({"language": "klingon"}, openai.BadRequestError, 400, "klingon"),
    "temperature": ({"temperature": 7}, openai.BadRequestError, 400, "temperature"),
    "format": ({"response_format": "diarized_json"}, openai.BadRequestError, 400, "response_format"),
    "stream": ({"stream": True}, openai.BadRequestError, 400, "stream"),
}


class TestRefusals:
    @pytest.mark.parametrize("name", REFUSED)
    def test_what_is_wrong_is_said(self, client: OpenAI, name: str) -> None:
        wrong, kind, status, said = REFUSED[name]
        good = {"model": "tiny", "file": TWICE}
        asked = {**good, **wrong}
        asked["file"] = ("speech.wav", asked["file"])
        with pytest.raises(kind) as caught:
            client.audio.transcriptions.create(**asked)
        assert caught.value.status_code == status
        assert said in caught.value.message
        assert isinstance(caught.value.body, dict)
        assert set(caught.value.body) == {"message", "type", "param", "code", "source"}

    def test_models_are_for_what_they_are_for(self, node: AudioNode, client: OpenAI) -> None:
        with pytest.raises(openai.APIStatusError) as caught:
            client.audio.transcriptions.create(model="alpha", file=("a.wav", TWICE))
        assert caught.value.status_code in (400, 404)
        assert "audio" in caught.value.message
        with pytest.raises(openai.BadRequestError, match="audio"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
        with pytest.raises(openai.APIStatusError):
            client.embeddings.create(model="tiny", input="hi")
        assert node.instances("alpha") == []

    @pytest.mark.parametrize(
        ("kind", "body", "said"),
        [
            ("application/json", b'{"model": "tiny"}', "multipart/form-data"),
            ("multipart/form-data", b"--x--\r\n", "boundary"),
            (f"multipart/form-data; boundary={BOUNDARY}", form({"model": "tiny"}, TWICE)[:-9], "multipart"),
            (f"multipart/form-data; boundary={BOUNDARY}", b"", "empty|multipart|file"),
            (f"multipart/form-data; boundary={BOUNDARY}", form({"model": "x" * 70_000}, b""), "64 KiB|65536"),
        ],
        ids=["JSON", "no boundary", "cut", "nothing", "a long field"],
    )
    def test_what_is_no_form(self, node: AudioNode, kind: str, body: bytes, said: str) -> None:
        response = node.http.post(TRANSCRIPTIONS, content=body, headers={"Content-Type": kind})
        assert response.status_code in (400, 413, 415), response.text
        assert re.search(said, response.json()["error"]["message"])
        assert node.heard("tiny", TWICE) == TEXT

    def test_no_file(self, node: AudioNode) -> None:
        response = node.http.post(TRANSCRIPTIONS, files={"model": (None, b"tiny")})
        assert response.status_code == 400
        assert "file" in response.json()["error"]["message"]

    def test_other_methods(self, node: AudioNode) -> None:
        response = node.http.get(TRANSCRIPTIONS)
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
