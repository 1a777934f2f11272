"""`transcribe`: the text alone on stdout, any length of file, and an end that the node notices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from mesh.cli.main import run
from tests.cli.audio_node import AudioNode, serve_audio

ROOT = Path(__file__).parents[2]
AUDIO = bytes(range(256)) * 700 + b"\r\n--\r\n"
TEXT = "Ask not [bold] what\u2019s what."


@pytest.fixture
def audio(monkeypatch: pytest.MonkeyPatch) -> Iterator[AudioNode]:
    """A node that LLAMESH_URL points to."""
    with serve_audio() as fake:
        monkeypatch.setenv("LLAMESH_URL", fake.url)
        yield fake


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    path.write_bytes(AUDIO)
    return path


def test_the_text_on_stdout_and_nothing_else(
    audio: AudioNode, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["transcribe", str(speech)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{TEXT}\n"
    assert captured.err.splitlines() == ["uploading speech.wav (179.2 kB)", "transcribing …"]
    (upload,) = audio.uploads
    assert (upload.path, upload.filename, upload.content) == ("/v1/audio/transcriptions", "speech.wav", AUDIO)
    assert upload.fields == {"model": "whisper", "response_format": "json"}


def test_every_wish_is_a_field_of_the_form(audio: AudioNode, speech: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audio.answer = "1\n00:00:00,000 --> 00:00:01,000\nHi [x]\n\n"
    wishes = ["--model", "w:fast", "--format", "srt", "--language", "de", "--translate", "--prompt", 'a "b"\nc é']
    assert run(["transcribe", str(speech), *wishes, "--key", "sk-1"]) == 0
    assert capsys.readouterr().out == audio.answer
    (upload,) = audio.uploads
    assert upload.path == "/v1/audio/translations"
    assert upload.fields == {
        "model": "w:fast",
        "response_format": "srt",
        "language": "de",
        "prompt": 'a "b"\nc é',
    }
    assert upload.headers["Authorization"] == "Bearer sk-1"


@pytest.mark.parametrize(
    ("wishes", "answer", "printed"),
    [
        (["--json"], {"text": " Hi "}, {"text": "Hi"}),
        (["--json", "--format", "vtt"], "WEBVTT\n\n", {"text": "WEBVTT\n\n"}),
        (["--format", "verbose_json"], {"text": "Hi", "duration": 1.5}, {"text": "Hi", "duration": 1.5}),
        (["--json", "--format", "json"], {"text": "Hi", "usage": {}}, {"text": "Hi", "usage": {}}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_json_has_the_text_in_every_format(
    audio: AudioNode,
    speech: Path,
    capsys: pytest.CaptureFixture[str],
    wishes: list[str],
    answer: object,
    printed: object,
) -> None:
    audio.answer = answer
    assert run(["transcribe", str(speech), *wishes]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == printed
    assert ("transcribing" in captured.err) is ("--json" not in wishes)


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({"qwen3": ["text"]}, ["has no model for audio", "--model"]),
        ({"qwen3": None}, ["has no model for audio", "--model"]),
        (
            {"a": ["audio"], "b": ["text"], "c:fast": ["audio"]},
            ["several models for audio: a, c:fast", "--model"],
        ),
    ],
    ids=["none", "an older node", "several"],
)
def test_which_model_must_be_clear(
    audio: AudioNode,
    speech: Path,
    capsys: pytest.CaptureFixture[str],
    models: dict[str, list[str] | None],
    said: list[str],
) -> None:
    audio.models = models
    assert run(["transcribe", str(speech)]) == 1
    captured = capsys.readouterr()
    assert all(words in captured.err for words in said), captured.err
    assert captured.out == ""
    assert audio.uploads == []
    assert run(["transcribe", str(speech), "--model", "qwen3"]) == 0


@pytest.mark.parametrize(
    "models",
    [{"a": ["audio", "text"], "b": ["audio"]}, {"b": ["audio", "text"], "a": ["text"]}],
    ids=["whisper", "llama"],
)
def test_one_that_hears_and_reads_is_taken_if_there_is_no_other(
    audio: AudioNode, speech: Path, models: dict[str, list[str] | None]
) -> None:
    audio.models = models
    assert run(["transcribe", str(speech)]) == 0
    assert audio.uploads[0].fields["model"] == "b"


def test_a_pipe_has_no_length_and_needs_none(audio: AudioNode, speech: Path) -> None:
    with speech.open("rb") as pipe_source:
        source = subprocess.Popen(["cat"], stdin=pipe_source, stdout=subprocess.PIPE)
        result = _command("-", stdin=source.stdout)
        assert source.stdout is not None
        source.stdout.close()
        assert source.wait(10) == 0
    assert (result.returncode, result.stdout) == (0, f"{TEXT}\n"), result.stderr
    (upload,) = audio.uploads
    assert (upload.filename, upload.content) == ("stdin", AUDIO)
    assert upload.headers["Transfer-Encoding"] == "chunked"


def test_a_redirected_file_is_sent_from_where_it_stands(audio: AudioNode, speech: Path) -> None:
    with speech.open("rb", buffering=0) as file:
        file.seek(1000)
        result = _command("-", stdin=file)
    assert result.returncode == 0, result.stderr
    assert audio.uploads[0].content == AUDIO[1000:]
    assert "Content-Length" in audio.uploads[0].headers


def test_nothing_to_read_is_told_before_the_node_is_asked(
    audio: AudioNode, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    audio.models = {}
    assert run(["transcribe", "none.wav"]) == 1
    assert "cannot read none.wav: No such file or directory" in capsys.readouterr().err
    assert run(["transcribe", str(tmp_path)]) == 1
    assert "Is a directory" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)
    assert run(["transcribe", "-"]) == 1
    assert "no audio on stdin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "kind", "message", "said"),
    [
        (415, "unsupported_media_type", "this is M4A; whisper-server reads wav", ["this is M4A"]),
        (404, "model_not_found", "Model 'w' not found", ["Model 'w' not found", "'llama-mesh models'"]),
        (503, "instance_failed", "it died", ["it died", "llama-mesh logs w'"]),
        (507, "out_of_space", "no room", ["no room"]),
        (404, "not_found", "Not Found", ["does not know /v1/audio/transcriptions"]),
    ],
)
def test_what_the_node_refuses(
    audio: AudioNode,
    speech: Path,
    capsys: pytest.CaptureFixture[str],
    status: int,
    kind: str,
    message: str,
    said: list[str],
) -> None:
    audio.error(status, kind, message)
    assert run(["transcribe", str(speech), "--model", "w"]) == 1
    captured = capsys.readouterr()
    assert all(words in captured.err for words in said), captured.err
    assert captured.out == ""


def test_a_refusal_in_the_middle_of_the_upload_is_heard(
    audio: AudioNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = tmp_path / "large.wav"
    with large.open("wb") as file:
        file.truncate(50_000_000)
    audio.refuses_early = True
    audio.error(413, "request_too_large", "more than this node takes")
    assert run(["transcribe", str(large), "--model", "w"]) == 1
    assert "more than this node takes" in capsys.readouterr().err


@pytest.mark.parametrize("answer", ["<html>", ["text"], {"txt": "Hi"}, {"text": None}], ids=str)
def test_an_answer_without_a_text_is_a_failure(
    audio: AudioNode, speech: Path, capsys: pytest.CaptureFixture[str], answer: object
) -> None:
    audio.answer = answer
    assert run(["transcribe", str(speech)]) == 1
    assert "the answer has no text" in capsys.readouterr().err


@pytest.mark.parametrize("stalls_after", [100_000, 2**30], ids=["while it sends", "while it waits"])
def test_ctrl_c_leaves_and_the_node_notices(audio: AudioNode, tmp_path: Path, stalls_after: int) -> None:
    large = tmp_path / "large.wav"
    with large.open("wb") as file:
        file.truncate(30_000_000)
    audio.stalls_after = stalls_after
    with subprocess.Popen(
        _argv(str(large)), cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert audio.stalled.wait(30)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    audio.looks_again.set()
    assert audio.client_left.wait(10)


def _argv(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mesh", "transcribe", *arguments]


def _command(*arguments: str, stdin: IO[bytes] | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _argv(*arguments),
        cwd=ROOT,
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
