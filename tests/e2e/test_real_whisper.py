"""The real whisper-server: that the set-up yields one that works, and that it still is as odd as the engine expects.

A test of an oddity that fails after an update of whisper.cpp is good news: something need not be absorbed any more.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from mesh.cli import whisper_setup
from mesh.cli.whisper_setup import WhisperParts
from tests import tiny_whisper
from tests.e2e.harness import eventually
from tests.real_whisper import WhisperServer, silence, whisper_server

LINE = f" {tiny_whisper.SENTENCE}"


@pytest.fixture
def tiny(whisper_parts: WhisperParts, tiny_speech: Path, tmp_path: Path) -> Iterator[WhisperServer]:
    with whisper_server(whisper_parts.server, tiny_speech, tmp_path) as server:
        yield server


def test_the_real_model_understands_speech(whisper_parts: WhisperParts, tmp_path: Path) -> None:
    with whisper_server(whisper_parts.server, whisper_parts.model, tmp_path) as server:
        answer = server.post(whisper_parts.speech.read_bytes())
        assert answer.headers["content-type"] == "application/json"
        assert whisper_setup.SPEECH_SAYS in answer.json()["text"].replace("\n", "")


def test_the_tiny_model_says_its_sentence_in_all_formats(tiny: WhisperServer) -> None:
    audio = silence(40)
    assert tiny.post(audio).json() == {"text": f"{LINE}\n{LINE}\n"}
    assert tiny.post(audio, response_format="text").text == f"{LINE}\n{LINE}\n"
    assert tiny.post(audio, response_format="srt").text == (
        f"1\n00:00:00,000 --> 00:00:30,000\n{LINE}\n\n2\n00:00:30,000 --> 00:01:00,000\n{LINE}\n\n"
    )
    assert tiny.post(audio, response_format="vtt").text == (
        f"WEBVTT\n\n00:00:00.000 --> 00:00:30.000\n{LINE}\n\n00:00:30.000 --> 00:01:00.000\n{LINE}\n\n"
    )
    verbose = tiny.post(audio, response_format="verbose_json", translate="true").json()
    assert (verbose["task"], verbose["language"], verbose["duration"]) == ("translate", "english", 40.0)
    assert [segment["text"] for segment in verbose["segments"]] == [LINE, LINE]
    assert [word["word"] for word in verbose["segments"][0]["words"]] == [f" {word}" for word in LINE.split()]


def test_a_line_is_broken_in_the_middle_of_a_word_unless_told_not_to(
    whisper_parts: WhisperParts, tmp_path: Path
) -> None:
    model = tmp_path / "model.bin"
    tiny_whisper.write_whisper(model, [b" " + b"x" * 40, b" transcript", b"ion" * 4, b" \xc3", b"\xa4"])
    whole = " " + "x" * 40 + " transcript" + "ion" * 4 + " ä\n"
    with whisper_server(whisper_parts.server, model, tmp_path) as server:
        broken = server.post(silence(1)).json()["text"]
        assert broken == whole.replace(" transcript", " transcript\n")
        assert server.post(silence(1), max_len="100000").json()["text"] == whole
        assert server.post(silence(1), token_timestamps="false").json()["text"] == whole
        words = server.post(silence(1), response_format="verbose_json").json()["segments"][-1]["words"]
        assert [word["word"] for word in words][-2:] == [" \ufffd", "\ufffd"]


@pytest.mark.parametrize(
    ("audio", "fields", "status", "body", "reason"),
    [
        (None, {}, 400, "Invalid request", "error: no 'file' field in the request"),
        (b"no audio", {}, 400, "Invalid request", "error: failed to read audio data"),
        (silence(1), {"temperature": "hot"}, 500, "500 Internal Server Error\nstof", None),
        (silence(1), {"max_len": "x"}, 500, "500 Internal Server Error\nstoi", None),
        (silence(1), {"beam_size": "9"}, 500, '{"error":"failed to process audio"}', "too many decoders requested (9)"),
    ],
    ids=["no file", "no audio", "no number", "no whole number", "too much"],
)
def test_what_is_wrong_is_only_in_the_log(
    tiny: WhisperServer, audio: bytes | None, fields: dict[str, str], status: int, body: str, reason: str | None
) -> None:
    answer = tiny.post(audio, **fields)
    assert (answer.status_code, answer.text) == (status, body)
    if reason:
        assert reason in tiny.said()


def test_other_paths_and_methods(tiny: WhisperServer) -> None:
    for path in ("/v1/models", "/v1/audio/transcriptions"):
        answer = tiny.post(silence(1), path)
        assert (answer.status_code, answer.text) == (404, f"File Not Found ({path})")
    assert tiny.request("GET", "/inference").status_code == 404


def test_an_unknown_language_is_taken_until_it_has_to_be_named(tiny: WhisperServer) -> None:
    assert tiny.post(silence(1), language="klingon").json()["text"] == f"{LINE}\n"
    answer = tiny.post(silence(1), language="klingon", response_format="verbose_json")
    assert (answer.status_code, answer.text.splitlines()[-1]) == (
        500,
        "basic_string: construction from null is not valid",
    )


def test_the_paths_of_openai_can_be_its_own(whisper_parts: WhisperParts, tiny_speech: Path, tmp_path: Path) -> None:
    args = ("--inference-path", "/v1/audio/transcriptions")
    with whisper_server(whisper_parts.server, tiny_speech, tmp_path, *args) as server:
        assert server.post(silence(1), "/v1/audio/transcriptions", model="whisper-1").json()["text"] == f"{LINE}\n"
        assert server.post(silence(1)).status_code == 404


def test_a_prefix_goes_for_its_health_too(whisper_parts: WhisperParts, tiny_speech: Path, tmp_path: Path) -> None:
    args = ("--request-path", "/base")
    with (
        pytest.raises(httpx.HTTPStatusError, match="404"),
        whisper_server(whisper_parts.server, tiny_speech, tmp_path, *args),
    ):
        pass


@pytest.mark.parametrize("args", [["--no-such-flag"], ["--port=1"], ["-l", "klingon"]], ids=" ".join)
def test_what_it_does_not_know_is_a_success_of_its_own_kind(whisper_parts: WhisperParts, args: list[str]) -> None:
    result = subprocess.run([whisper_parts.server, *args], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0
    assert "error: unknown" in result.stderr
    assert "usage:" in result.stderr


def test_a_missing_model_is_exit_status_3(whisper_parts: WhisperParts, tmp_path: Path) -> None:
    result = subprocess.run(
        [whisper_parts.server, "-m", tmp_path / "none"], capture_output=True, timeout=30, check=False
    )
    assert result.returncode == 3


def test_two_can_share_a_port(tiny: WhisperServer, whisper_parts: WhisperParts, tiny_speech: Path) -> None:
    command = [str(whisper_parts.server), "-m", str(tiny_speech), "--port", str(tiny.port)]
    second = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: tiny.port in _listening_ports(second.pid))
        assert tiny.port in _listening_ports(tiny.process.pid)
    finally:
        second.kill()
        second.wait()


def test_it_ends_with_its_request_or_at_the_second_signal(tiny: WhisperServer) -> None:
    with socket.create_connection(("127.0.0.1", tiny.port)) as client:
        client.sendall(_post(silence(600)))
        _until_it_says(tiny, "processing 'long.wav'")
        tiny.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            tiny.process.wait(0.3)
        tiny.process.send_signal(signal.SIGTERM)
        assert tiny.process.wait(10) == 1
    assert "Received second interrupt" in tiny.said()


def test_it_ends_at_once_without_a_request(tiny: WhisperServer) -> None:
    tiny.process.send_signal(signal.SIGTERM)
    assert tiny.process.wait(10) == 0


def test_a_client_that_leaves_ends_its_request(tiny: WhisperServer) -> None:
    with socket.create_connection(("127.0.0.1", tiny.port)) as client:
        client.sendall(_post(silence(600)))
        _until_it_says(tiny, "processing 'long.wav'")
    assert tiny.post(silence(1)).json()["text"] == f"{LINE}\n"
    assert "client disconnected, aborted processing" in tiny.said()


def test_its_health_does_not_wait_for_a_request(tiny: WhisperServer) -> None:
    with socket.create_connection(("127.0.0.1", tiny.port)) as client:
        client.sendall(_post(silence(600)))
        _until_it_says(tiny, "processing 'long.wav'")
        assert json.loads(tiny.request("GET", "/health").content) == {"status": "ok"}
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)


def _listening_ports(pid: int) -> set[int]:
    found = psutil.Process(pid).net_connections("tcp")
    return {connection.laddr.port for connection in found if connection.status == psutil.CONN_LISTEN}


def _post(audio: bytes) -> bytes:
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="long.wav"\r\n\r\n'
    body = part + audio + b"\r\n--b--\r\n"
    head = "POST /inference HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _until_it_says(server: WhisperServer, words: str) -> None:
    eventually(lambda: words in server.said(), what=words)
