"""Audio that whisper-server cannot read by itself, through a real ffmpeg: what people record and what they download."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio_ffmpeg
import pytest

from mesh.cli.whisper_setup import SPEECH_SAYS, WhisperParts
from mesh.engine.upkeep import LOOK_EVERY_S
from tests.e2e.audio import TRANSCRIPTIONS, AudioNode, form, form_head, whisper_profile
from tests.e2e.harness import eventually
from tests.real_whisper import silence

#: far less than until it is looked by itself
AT_ONCE_S = LOOK_EVERY_S / 2
#: file name -> how ffmpeg makes it of speech
RECORDINGS = {
    "voice-memo.m4a": ["-c:a", "aac"],
    "message.opus": ["-c:a", "libopus"],
    "browser.webm": ["-c:a", "libopus"],
    "film.mp4": ["-f", "lavfi", "-i", "color=size=32x32:rate=5", "-shortest", "-c:v", "mpeg4", "-c:a", "aac"],
    "radio.aac": ["-c:a", "aac"],
}


@pytest.fixture(scope="module")
def ffmpeg() -> str:
    return str(imageio_ffmpeg.get_ffmpeg_exe())


@pytest.fixture(scope="module")
def node(whisper_parts: WhisperParts, ffmpeg: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AudioNode]:
    directory = tmp_path_factory.mktemp("convert")
    (directory / "bin").mkdir()
    held = f'#!/bin/sh\nwhile [ -e {directory / "hold"} ]; do sleep 0.05; done\nexec {ffmpeg} "$@"\n'
    (directory / "bin/ffmpeg").write_text(held)
    (directory / "bin/ffmpeg").chmod(0o755)
    cookbook = {
        "whisper": whisper_profile(whisper_parts.model, "-t 2", convert=True),
        "as-it-is": whisper_profile(whisper_parts.model, "-t 2"),
    }
    env = {"PATH": f"{directory / 'bin'}:/usr/bin:/bin"}
    with AudioNode(directory / "node", whisper_parts, cookbook, env=env) as node:
        yield node


def encoded(ffmpeg: str, speech: Path, path: Path, *how: str) -> bytes:
    """Return *speech* as ffmpeg encodes it, with what the name of *path* says."""
    command = [ffmpeg, "-nostdin", "-loglevel", "error", "-i", str(speech), *how, str(path)]
    subprocess.run(command, check=True, timeout=60)
    return path.read_bytes()


def left_by(node: AudioNode) -> list[str]:
    """Return what of uploads is on the disk: a converting instance has nothing else in its directory."""
    return [path.name for directory in node.scratch() for path in directory.iterdir()]


def assert_nothing_stays(node: AudioNode, within_s: float) -> None:
    eventually(lambda: not left_by(node), within_s=within_s, what="an end of what uploads left")


@pytest.fixture
def held(node: AudioNode) -> Iterator[Path]:
    """As long as this file is there, ffmpeg waits."""
    path = node.directory.parent / "hold"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_are_understood(
    node: AudioNode, whisper_parts: WhisperParts, ffmpeg: str, tmp_path: Path, name: str
) -> None:
    audio = encoded(ffmpeg, whisper_parts.speech, tmp_path / name, *RECORDINGS[name])
    assert SPEECH_SAYS in node.heard("whisper", audio)
    assert_nothing_stays(node, AT_ONCE_S)
    assert not list(node.temporary.rglob("*.wav"))


def test_without_it_the_answer_says_what_would_help(
    node: AudioNode, whisper_parts: WhisperParts, ffmpeg: str, tmp_path: Path
) -> None:
    audio = encoded(ffmpeg, whisper_parts.speech, tmp_path / "memo.m4a", "-c:a", "aac")
    response = node.ask("as-it-is", audio)
    assert response.status_code == 415
    message = response.json()["error"]["message"]
    assert "looks like MP4 (m4a, mp4)" in message
    assert "'convert: true'" in message
    assert not node.instances("as-it-is"), "no model is loaded for it"


def test_a_film_without_sound_and_half_a_recording(
    node: AudioNode, whisper_parts: WhisperParts, ffmpeg: str, tmp_path: Path
) -> None:
    """The client's file is what is wrong, and the next one is heard."""
    mute = ["-f", "lavfi", "-i", "color=size=32x32:rate=5:duration=1", "-map", "1:v", "-c:v", "mpeg4"]
    silent = node.ask("whisper", encoded(ffmpeg, whisper_parts.speech, tmp_path / "mute.mp4", *mute))
    assert silent.status_code == 415, silent.text
    assert_nothing_stays(node, AT_ONCE_S)
    whole = encoded(ffmpeg, whisper_parts.speech, tmp_path / "memo.m4a", "-c:a", "aac")
    half = node.ask("whisper", whole[: len(whole) // 2])  # what tells where the sound is stands at its end
    assert half.status_code == 415, half.text
    assert "looks like MP4 (m4a, mp4) (ffmpeg: moov atom not found)" in half.json()["error"]["message"]
    assert_nothing_stays(node, AT_ONCE_S)
    assert node.ask("whisper", silence(1)).status_code == 200


def test_half_a_recording_again_and_again_is_on_the_disk_once(
    node: AudioNode, whisper_parts: WhisperParts, ffmpeg: str, tmp_path: Path
) -> None:
    whole = encoded(ffmpeg, whisper_parts.speech, tmp_path / "memo.m4a", "-c:a", "aac")
    node.ask("whisper", silence(1))
    asking = [node.asking("whisper", whole[: len(whole) // 2]) for _ in range(8)]
    most = 0
    while not all(one.answered.is_set() for one in asking):
        most = max(most, len(left_by(node)))
        time.sleep(0.01)
    assert [one.answer().status_code for one in asking] == [415] * 8
    assert most <= 2, "that of the one before may still be there"
    assert_nothing_stays(node, AT_ONCE_S)


def test_clients_that_leave_while_it_converts_leave_nothing(
    node: AudioNode, whisper_parts: WhisperParts, ffmpeg: str, tmp_path: Path, held: Path
) -> None:
    """The second one's upload is written when it has been gone for long: the instance was still at the first."""
    audio = encoded(ffmpeg, whisper_parts.speech, tmp_path / "memo.m4a", "-c:a", "aac")
    held.unlink()
    assert SPEECH_SAYS in node.heard("whisper", audio)
    held.touch()
    (pid,) = (instance["pid"] for instance in node.instances("whisper"))
    leave_while(node, audio, lambda: bool(left_by(node)))
    assert_nothing_stays(node, AT_ONCE_S)
    eventually(lambda: not any(instance["busy"] for instance in node.instances("whisper")), what="a free slot")
    failed = node.said("whisper").count("moov atom not found")
    leave_while(node, audio[: len(audio) // 2], lambda: node.busy("whisper"))
    held.unlink()
    eventually(lambda: node.said("whisper").count("moov atom not found") > failed, what="an end of the second one")
    assert_nothing_stays(node, LOOK_EVERY_S + AT_ONCE_S)
    assert SPEECH_SAYS in node.heard("whisper", audio)
    assert [instance["pid"] for instance in node.instances("whisper")] == [pid]
    assert_nothing_stays(node, AT_ONCE_S)


def leave_while(node: AudioNode, audio: bytes, when: Callable[[], bool]) -> None:
    body = form({"model": "whisper"}, audio, filename="memo.m4a")
    with socket.create_connection(("127.0.0.1", node.port)) as client:
        client.sendall(form_head(TRANSCRIPTIONS, len(body)) + body)
        eventually(when, what="its work for this client")
        time.sleep(0.3)  # all of it is with the instance


def test_ffmpeg_is_not_led_to_files_of_this_machine(
    node: AudioNode, whisper_parts: WhisperParts, tmp_path: Path
) -> None:
    """A playlist, by which it would read what the node's user can."""
    secret = tmp_path / "secret.wav"
    secret.write_bytes(whisper_parts.speech.read_bytes())
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:11\n#EXTINF:11,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode()
    for disguised in (playlist, f"ffconcat version 1.0\nfile '{secret}'\n".encode(), b"ID3\x04\0\0\0\0\0\0" + playlist):
        response = node.ask("whisper", disguised)
        assert response.status_code == 415, response.text
        assert SPEECH_SAYS not in response.text
