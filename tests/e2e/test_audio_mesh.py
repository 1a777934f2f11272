"""Speech for a model that only another node has: the upload goes there, and its file is on one node only."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mesh.cli.whisper_setup import WhisperParts
from tests.e2e.audio import SENTENCE, TRANSCRIPTIONS, TRANSLATIONS, AudioNode, form, form_head, whisper_profile
from tests.e2e.harness import eventually
from tests.real_whisper import silence

MB = 1_000_000
TWICE = silence(40)
LONG = silence(900)  # 29 MB, some 4 s of work
TOKEN = "a token of the tests, not random at all, long enough: 8f1c0a"


class Pair:
    """``asked`` has no models; ``other`` has the one that hears."""

    def __init__(self, asked: AudioNode, other: AudioNode) -> None:
        self.asked, self.other = asked, other


@pytest.fixture
def pair(whisper_parts: WhisperParts, tiny_speech: Path, tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        other = stack.enter_context(_member(tmp_path / "other", whisper_parts, {"tiny": whisper_profile(tiny_speech)}))
        asked = stack.enter_context(_member(tmp_path / "asked", whisper_parts, {}, peer=other))
        eventually(lambda: [m["id"] for m in asked.http.get("/v1/models").json()["data"]] == ["tiny"])
        yield Pair(asked, other)
        asked.assert_nothing_spooled()
        other.assert_nothing_spooled()


def _member(
    directory: Path, parts: WhisperParts, models: dict[str, dict[str, object]], peer: AudioNode | None = None
) -> AudioNode:
    cluster = {
        "enabled": True,
        "peers": [] if peer is None else [f"127.0.0.1:{peer.port}"],
        "gossip_interval_seconds": 0.5,
        "discovery": {"mdns": False},
        "noise": {"config_dir": str(directory / "keys")},
    }
    env = {"CLUSTER_TOKEN": TOKEN, "HOME": str(directory)}
    return AudioNode(directory, parts, models, {"node_id": directory.name, "cluster": cluster}, env=env)


@pytest.mark.parametrize("path", [TRANSCRIPTIONS, TRANSLATIONS])
def test_the_other_one_hears(pair: Pair, path: str) -> None:
    answer = pair.asked.ask("tiny", TWICE, path, response_format="verbose_json")
    assert answer.status_code == 200, answer.text
    assert answer.json()["text"] == f"{SENTENCE} {SENTENCE}"
    assert answer.headers["x-llama-mesh-node"] == "other"
    assert answer.headers["x-llama-mesh-via"] == "asked"


def test_the_list_tells_that_it_hears(pair: Pair) -> None:
    (model,) = pair.asked.http.get("/v1/models").json()["data"]
    assert model["metadata"]["capabilities"] == ["audio"]
    speech = pair.asked.directory / "speech.wav"
    speech.write_bytes(TWICE)
    result = pair.asked.cli("transcribe", str(speech))
    assert (result.returncode, result.stdout) == (0, f"{SENTENCE} {SENTENCE}\n"), result


def test_what_is_wrong_is_said_by_the_one_that_knows(pair: Pair) -> None:
    answer = pair.asked.ask("tiny", b"%PDF-1.7 " + bytes(2 * MB))
    assert answer.status_code == 415
    assert "PDF" in answer.json()["error"]["message"]
    chat = pair.asked.chat("tiny")
    assert chat.status_code == 400
    assert "audio" in chat.json()["error"]["message"]


def test_a_client_that_leaves_is_noticed_by_both(pair: Pair) -> None:
    assert pair.asked.ask("tiny", TWICE).status_code == 200
    files = pair.asked.open_files(), pair.other.open_files()
    upload = form({"model": "tiny"}, LONG)
    with pair.asked.connection() as connection:
        connection.send(form_head(TRANSCRIPTIONS, len(upload)) + upload)
        eventually(lambda: pair.other.said("tiny").count("processing '") == 2, what="it is at work")
    eventually(lambda: not pair.other.busy("tiny"), what="the slot is free")
    assert pair.asked.ask("tiny", TWICE).status_code == 200
    assert "client disconnected, aborted processing" in pair.other.said("tiny")
    eventually(lambda: pair.asked.spooled_bytes() + pair.other.spooled_bytes() == 0)
    links = 2  # idle ones may stay
    assert pair.asked.open_files() <= files[0] + links
    assert pair.other.open_files() <= files[1] + links


def test_the_file_is_kept_by_the_node_that_was_asked_only(pair: Pair) -> None:
    assert pair.asked.ask("tiny", TWICE).status_code == 200
    memory = pair.other.own_memory()
    first, second = pair.asked.asking("tiny", LONG), pair.asked.asking("tiny", LONG)  # one is served, one waits
    eventually(lambda: pair.other.said("tiny").count("processing '") == 2 and pair.other.waiting() == 1)
    assert pair.asked.spooled_bytes() > 2 * len(LONG)
    assert pair.other.spooled_bytes() == 0
    assert pair.other.own_memory() < memory + 8 * MB
    for asking in (first, second):
        answer = asking.answer()
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-llama-mesh-node"] == "other"


def test_a_child_that_is_killed_with_the_file_is_replaced(pair: Pair) -> None:
    assert pair.asked.ask("tiny", TWICE).status_code == 200
    asking = pair.asked.asking("tiny", LONG)
    eventually(lambda: pair.other.said("tiny").count("processing '") == 2, what="it is at work")
    (instance,) = pair.other.instances("tiny")
    os.kill(instance["pid"], signal.SIGKILL)
    answer = asking.answer()
    assert answer.status_code == 200, answer.text
    assert answer.json()["text"]
