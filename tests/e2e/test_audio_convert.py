"""Audio that whisper-server cannot read by itself, through a real ffmpeg: what people record and what they download."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import pytest

from mesh.cli.whisper_setup import SPEECH_SAYS, WhisperParts
from tests.e2e.audio import AudioNode, whisper_profile
from tests.real_whisper import silence

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
    (directory / "bin/ffmpeg").symlink_to(ffmpeg)
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


@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_are_understood(
    node: AudioNode, whisper_parts: WhisperParts, ffmpeg: str, tmp_path: Path, name: str
) -> None:
    audio = encoded(ffmpeg, whisper_parts.speech, tmp_path / name, *RECORDINGS[name])
    assert SPEECH_SAYS in node.heard("whisper", audio)
    assert not list(node.temporary.rglob("*.wav")), "what was converted does not stay"


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
    whole = encoded(ffmpeg, whisper_parts.speech, tmp_path / "memo.m4a", "-c:a", "aac")
    half = node.ask("whisper", whole[: len(whole) // 2])  # what tells where the sound is stands at its end
    assert half.status_code == 415, half.text
    assert "looks like MP4 (m4a, mp4) (ffmpeg: moov atom not found)" in half.json()["error"]["message"]
    assert node.ask("whisper", silence(1)).status_code == 200


def test_ffmpeg_is_not_led_to_files_of_this_machine(
    node: AudioNode, whisper_parts: WhisperParts, tmp_path: Path
) -> None:
    """A playlist, by which it would read what the node's user can."""
    secret = tmp_path / "secret.wav"
    secret.write_bytes(whisper_parts.speech.read_bytes())
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:11\n#EXTINF:11,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode()
    for form in (playlist, f"ffconcat version 1.0\nfile '{secret}'\n".encode(), b"ID3\x04\0\0\0\0\0\0" + playlist):
        response = node.ask("whisper", form)
        assert response.status_code == 415, response.text
        assert SPEECH_SAYS not in response.text
