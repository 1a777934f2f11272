"""Speech under bad conditions: uploads that break off, crowds, children that die, and a model's whole life."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from mesh.cli.whisper_setup import WhisperParts
from tests.e2e.audio import SENTENCE, TRANSCRIPTIONS, AudioNode, form, form_head, whisper_profile
from tests.e2e.harness import TINY_ARGS, Models, cookbook, eventually, profile
from tests.real_whisper import silence

MB = 1_000_000
SHORT = silence(1)
LONG = silence(900)  # 29 MB, some 4 s of work
VERY_LONG = silence(1600)  # 51 MB, some 8 s
UPLOAD = form({"model": "tiny"}, VERY_LONG)

Start = Callable[..., AudioNode]


@pytest.fixture
def start(whisper_parts: WhisperParts, tmp_path: Path) -> Iterator[Start]:
    """Start nodes that are stopped, and looked after, at the end of the test."""
    with contextlib.ExitStack() as stack:

        def start(models: dict[str, Any], config: dict[str, Any] | None = None, **options: Any) -> AudioNode:
            directory = tmp_path / f"node{len(list(tmp_path.iterdir()))}"
            node = stack.enter_context(AudioNode(directory, whisper_parts, models, config, **options))
            stack.callback(node.assert_nothing_spooled)
            return node

        yield start


@pytest.fixture
def node(start: Start, tiny_speech: Path) -> AudioNode:
    node = start({"tiny": whisper_profile(tiny_speech)})
    assert node.heard("tiny", SHORT) == SENTENCE
    return node


# -- uploads that break off


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_an_upload_that_breaks_off_half_way_leaves_nothing(node: AudioNode, reset: bool) -> None:
    files, pid = node.open_files(), node.server_pids()
    with node.connection() as connection:
        connection.send(form_head(TRANSCRIPTIONS, len(UPLOAD)) + UPLOAD[: 25 * MB])
        eventually(lambda: node.spooled_bytes() > 20 * MB, what="it is on the disk")
        node.assert_nothing_spooled()
        if reset:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    eventually(lambda: node.spooled_bytes() == 0, what="it is gone")
    eventually(lambda: node.open_files() <= files, what="no descriptor is left")
    assert not node.busy("tiny")
    assert node.heard("tiny", SHORT) == SENTENCE
    assert node.server_pids() == pid


def test_a_node_that_is_killed_leaves_no_upload(start: Start, tiny_speech: Path, tmp_path: Path) -> None:
    node = start({"tiny": whisper_profile(tiny_speech)})
    node.prewarm("tiny")
    with node.connection() as connection:
        connection.send(form_head(TRANSCRIPTIONS, len(UPLOAD)) + UPLOAD[: 25 * MB])
        eventually(lambda: node.spooled_bytes() > 20 * MB)
        node.sigkill()
    node.assert_nothing_spooled()
    eventually(lambda: not node.marked(), what="the children end")
    node.start()
    assert node.heard("tiny", SHORT) == SENTENCE
    assert len(node.scratch()) == 1, "that of the killed one was cleared away"


def test_a_client_that_leaves_while_it_is_heard(node: AudioNode) -> None:
    files, pid = node.open_files(), node.server_pids()
    with node.connection() as connection:
        connection.send(form_head(TRANSCRIPTIONS, len(UPLOAD)) + UPLOAD)
        eventually(lambda: node.said("tiny").count("processing '") == 2, what="it is at work")
        assert node.busy("tiny")
    eventually(lambda: not node.busy("tiny"), what="the slot is free")
    assert node.heard("tiny", SHORT) == SENTENCE
    assert "client disconnected, aborted processing" in node.said("tiny")
    assert node.server_pids() == pid
    eventually(lambda: node.open_files() <= files, what="no descriptor is left")


def test_a_client_that_leaves_the_queue(node: AudioNode) -> None:
    first = node.asking("tiny", LONG)
    eventually(lambda: node.busy("tiny"))
    with node.connection() as connection:
        connection.send(form_head(TRANSCRIPTIONS, len(UPLOAD)) + UPLOAD)
        eventually(lambda: node.waiting() == 1, what="it waits")
    eventually(lambda: node.waiting() == 0, what="it waits no more")
    assert first.answer().json()["text"].count(SENTENCE) == 30
    assert node.said("tiny").count("processing '") == 2, "the one that left was never begun"


def test_an_upload_is_never_in_memory_as_a_whole(node: AudioNode) -> None:
    before, most = node.own_memory(), 0
    asking = node.asking("tiny", LONG)
    while not asking.answered.wait(0.01):
        most = max(most, node.own_memory())
    assert asking.answer().status_code == 200
    assert 0 < most < before + 12 * MB


def test_too_much_is_refused_before_it_is_sent(start: Start, tiny_speech: Path) -> None:
    node = start({"tiny": whisper_profile(tiny_speech)}, {"http": {"upload_limit_bytes": 2 * MB}})
    with node.connection() as connection:
        connection.send(form_head(TRANSCRIPTIONS, 600 * MB))
        status, _, body = connection.answer()
        assert (status, b"upload_limit_bytes" in body) == (413, True)
    sent = form({"model": "tiny"}, silence(100))
    kind = {"Content-Type": "multipart/form-data; boundary=e2e-boundary"}
    pieces = (sent[at : at + MB] for at in range(0, len(sent), MB))
    assert node.http.post(TRANSCRIPTIONS, content=pieces, headers=kind).status_code == 413
    assert node.heard("tiny", silence(50)).count(SENTENCE) == 2, "what is below the limit is heard"


# -- crowds


def test_ten_at_once_are_heard_one_after_the_other_in_their_order(node: AudioNode) -> None:
    askings, most = [], 0
    for count in range(1, 11):
        askings.append(node.asking("tiny", LONG if count == 1 else silence(60)))
        eventually(partial(_has_come, node, count))
    while not all(asking.answered.is_set() for asking in askings):
        most = max(most, node.instance("tiny")["active"])
    assert [asking.answer().json()["text"].count(SENTENCE) for asking in askings] == [30] + [2] * 9
    assert most == 1
    ends = [asking.ended_at for asking in askings]
    assert ends == sorted(ends)


def _has_come(node: AudioNode, count: int) -> bool:
    return node.waiting() + node.busy("tiny") == count


def test_two_instances_hear_two(start: Start, tiny_speech: Path) -> None:
    node = start({"tiny": whisper_profile(tiny_speech, max_instances=2)})
    node.prewarm("tiny")
    askings = [node.asking("tiny", LONG) for _ in range(2)]
    answers = [asking.answer() for asking in askings]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len({answer.headers["x-llama-mesh-instance"] for answer in answers}) == 2
    assert len({instance["port"] for instance in node.instances("tiny")}) == 2


# -- children that die


def test_a_child_that_dies_is_replaced_and_the_request_heard(node: AudioNode) -> None:
    (pid,) = node.server_pids()
    asking = node.asking("tiny", LONG)
    eventually(lambda: "processing '" in node.said("tiny") and node.busy("tiny"))
    psutil.Process(pid).kill()
    answer = asking.answer()
    assert (answer.status_code, answer.json()["text"].count(SENTENCE)) == (200, 30)
    assert node.server_pids() != [pid]
    assert len(node.scratch()) == 1
    assert node.spooled_bytes() == 0


def test_a_child_that_dies_twice_is_an_error_that_says_so(node: AudioNode) -> None:
    asking = node.asking("tiny", LONG)
    killed: set[int] = set()
    while len(killed) < 2:
        pid = eventually(partial(_busy_child, node, killed))
        assert pid is not None
        psutil.Process(pid).kill()
        killed.add(pid)
    answer = asking.answer()
    assert answer.status_code in (502, 503)
    error = answer.json()["error"]
    assert (error["type"], error["source"]) in [("upstream_error", "instance"), ("instance_failed", "instance")]
    assert node.spooled_bytes() == 0


def _busy_child(node: AudioNode, but: set[int]) -> int | None:
    return next((i["pid"] for i in node.instances("tiny") if i["active"] and i["pid"] not in but), None)


def test_one_whose_port_another_program_shares_is_replaced_on_another_port(node: AudioNode) -> None:
    """The kernel would give that program half of what is asked here."""
    (before,) = node.instances("tiny")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", before["port"]))
        other.listen()
        (told,) = node.wait_log("another program listens on the port of an instance")
        assert (told["fields"]["port"], told["fields"]["other_pids"]) == (before["port"], [os.getpid()])
        eventually(lambda: before["pid"] not in node.server_pids(), what="it is gone")
        for _ in range(3):
            assert node.heard("tiny", SHORT) == SENTENCE
        (after,) = node.instances("tiny")
        assert after["port"] != before["port"]
        (failed,) = node.wait_log("instance failed")
        assert failed["fields"]["kind"] == "crash"
        assert (
            failed["fields"]["reason"] == f"port {before['port']} is used by another program, too (pid {os.getpid()})"
        )


def test_a_node_that_is_told_to_end_lets_it_finish(start: Start, tiny_speech: Path) -> None:
    node = start({"tiny": whisper_profile(tiny_speech)}, {"shutdown_grace_period_seconds": 30})
    node.prewarm("tiny")
    asking = node.asking("tiny", LONG)
    eventually(lambda: node.busy("tiny"))
    node.process.send_signal(signal.SIGTERM)
    assert asking.answer().json()["text"].count(SENTENCE) == 30
    assert node.process.wait(15) == 0
    assert node.scratch() == []


# -- a model's life


def test_prewarm_ps_logs_unload(node: AudioNode) -> None:
    assert node.unload("tiny") == 1
    eventually(lambda: not node.instances(), what="it is gone")
    assert node.scratch() == []
    instance = node.prewarm("tiny")
    assert (instance["state"], instance["slots"]) == ("ready", 1)
    assert instance["memory"]["ram"] > 0
    assert "--inference-path" in instance["command"]
    (row,) = [line for line in node.cli("ps").stdout.splitlines() if line.startswith("tiny")]
    assert row.split()[1:3] == ["ready", str(instance["pid"])]
    assert "0/1" in row
    assert "whisper_model_load" in node.cli("logs", "tiny").stdout
    assert psutil.Process(instance["pid"]).cwd() == str(node.scratch()[0])
    fit = node.cli_json("fit", "tiny")
    assert fit["fit"] == "loaded"


def test_it_goes_when_it_idles(start: Start, tiny_speech: Path) -> None:
    node = start({"tiny": whisper_profile(tiny_speech, idle_timeout_seconds=1)})
    assert node.heard("tiny", SHORT) == SENTENCE
    eventually(lambda: not node.instances(), what="it idled")
    assert node.heard("tiny", SHORT) == SENTENCE


def test_both_engines_share_a_budget(start: Start, tiny_speech: Path, models: Models) -> None:
    """Two models that do not fit together, one of each engine, take turns."""
    chat = profile(models.alpha, TINY_ARGS + " -cram 40", estimated_sysmem_mb=60)
    node = start({"tiny": whisper_profile(tiny_speech, estimated_sysmem_mb=60), "alpha": chat}, {"max_sysmem_mb": 100})
    for _ in range(2):
        assert node.heard("tiny", SHORT) == SENTENCE
        assert node.say("alpha") == "I am alpha"
        assert [instance["key"] for instance in node.instances(state="ready")] == ["alpha:default"]


def test_an_edit_replaces_it(node: AudioNode, tiny_speech: Path) -> None:
    (pid,) = node.server_pids()
    asking = node.asking("tiny", LONG)
    eventually(lambda: node.busy("tiny"))
    node.rewrite_cookbook(cookbook({"tiny": whisper_profile(tiny_speech, "-t 2")}))
    node.wait_log("cookbook reloaded")
    assert node.heard("tiny", SHORT) == SENTENCE
    assert asking.answer().status_code == 200
    eventually(lambda: len(node.server_pids()) == 1)
    assert node.server_pids() != [pid]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--no-such-flag", "--no-such-flag"),
        ("--no-speech-thol 0.5", "--no-speech-thold"),
        ("-l klingon", "unknown language 'klingon'"),
        ("-t many", "stoi"),
        ("--diarize --tinydiarize", "cannot use both --diarize and --tinydiarize"),
    ],
)
def test_arguments_that_it_does_not_take(start: Start, tiny_speech: Path, args: str, said: str) -> None:
    node = start({"tiny": whisper_profile(tiny_speech, args)})
    answer = node.ask("tiny", SHORT)
    assert answer.status_code == 503
    error = answer.json()["error"]
    assert error["type"] == "instance_failed"
    assert said in error["message"]
    assert node.servers() == []
    assert node.scratch() == []


def test_files_that_are_no_model_for_it(start: Start, models: Models, tmp_path: Path) -> None:
    broken = tmp_path / "broken.bin"
    broken.write_bytes(b"lmgg" + bytes(100))
    node = start(
        {
            "gguf": whisper_profile(models.alpha),
            "none": whisper_profile(tmp_path / "none.bin"),
            "broken": whisper_profile(broken),
        }
    )
    for model, file in [("gguf", models.alpha), ("none", tmp_path / "none.bin"), ("broken", broken)]:
        answer = node.ask(model, SHORT)
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "instance_failed")
        assert f"correct the model ({file})" in answer.json()["error"]["message"]
    checked = node.cli("check", "--config", "config.yaml", "--cookbook", "cookbook.yaml")
    for said in ("is a GGUF file, for llama-server", "no such file", str(broken)):
        assert said in checked.stdout + checked.stderr


def test_without_the_program_it_says_how_to_get_one(start: Start, tiny_speech: Path) -> None:
    node = start({"tiny": whisper_profile(tiny_speech)}, {"whisper_cpp": {"binary_path": "/nowhere/whisper-server"}})
    answer = node.ask("tiny", SHORT)
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "engine_missing")
    assert "whisper_cpp" in answer.json()["error"]["message"]
