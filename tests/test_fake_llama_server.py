"""The fake server's faults are what they say: other tests build on them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPResponse, IncompleteRead, RemoteDisconnected
from pathlib import Path
from typing import Any

import pytest

from mesh.host.ports import PortAllocator
from mesh.models import tiny_model

Start = Callable[..., "Fake"]


class Fake:
    """A running fake server."""

    def __init__(self, port: int, args: tuple[str, ...], faults: dict[str, object]) -> None:
        script = Path(__file__).parent / "fake_llama_server.py"
        env = {**os.environ, **{f"FAKE_{name.upper()}": str(value) for name, value in faults.items()}}
        command = [sys.executable, "-I", "-S", str(script), "-m", "m.gguf", "--port", str(port), *args]
        self.port = port
        self.process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE)
        self.connections: list[HTTPConnection] = []

    def wait_for_line(self, text: str) -> str:
        assert self.process.stderr is not None
        return next(line for line in map(bytes.decode, self.process.stderr) if text in line)

    def ask(self, path: str, body: dict[str, Any] | None = None, **headers: str) -> HTTPResponse:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        self.connections.append(connection)
        connection.request(
            "GET" if body is None else "POST", path, json.dumps(body) if body is not None else None, headers
        )
        return connection.getresponse()

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def start() -> Iterator[Start]:
    ports, running = PortAllocator(), []

    def start_one(*args: str, **faults: object) -> Fake:
        fake = Fake(ports.reserve(), args, faults)
        running.append(fake)
        return fake

    yield start_one
    for fake in running:
        fake.close()


@pytest.fixture
def ready(start: Start) -> Start:
    def start_and_wait(*args: str, **faults: object) -> Fake:
        fake = start(*args, **faults)
        fake.wait_for_line("model loaded")
        return fake

    return start_and_wait


CHAT = "/v1/chat/completions"
STREAM = {"stream": True}


def test_a_stream_has_content_usage_and_an_end(ready: Start) -> None:
    text = ready(say="one two").ask(CHAT, STREAM).read().decode()
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    parsed = [json.loads(event) for event in events[:-1]]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in parsed) == "one two"
    assert parsed[-1]["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (CHAT, '"content": "hi"'),
        ("/v1/completions", '"text": "hi"'),
        ("/completion", '"content": "hi"'),
        ("/v1/messages", '"text": "hi"'),
        ("/v1/embeddings", '"embedding"'),
        ("/v1/rerank", '"relevance_score"'),
        ("/tokenize", '"tokens"'),
    ],
)
def test_every_dialect_answers(ready: Start, path: str, part: str) -> None:
    assert part in ready(say="hi").ask(path, {"input": "a b", "documents": ["x"]}).read().decode()


def test_it_is_loading_until_it_is_loaded(start: Start) -> None:
    fake = start(load_s=0.2)
    fake.wait_for_line("listening")
    assert fake.ask("/health").status == 503
    assert json.load(fake.ask(CHAT, {}))["error"]["type"] == "unavailable_error"
    fake.wait_for_line("model loaded")
    assert fake.ask("/health").status == 200


@pytest.mark.parametrize("fault", ["crash_mid_stream", "half_event_after"])
def test_an_answer_that_breaks_has_no_end(ready: Start, fault: str) -> None:
    response = ready(say="a b c d", **{fault: 2}).ask(CHAT, STREAM)
    with pytest.raises(IncompleteRead) as caught:
        response.read()
    assert b"[DONE]" not in caught.value.partial


def test_a_crash_comes_with_the_request_it_was_asked_for(ready: Start) -> None:
    fake = ready(crash_after=1, crash_code=-signal.SIGSEGV)
    assert fake.ask(CHAT, {}).status == 200
    with pytest.raises(RemoteDisconnected):
        fake.ask(CHAT, {})
    assert fake.process.wait(5) == -signal.SIGSEGV


def test_a_client_that_leaves_frees_its_slot(ready: Start) -> None:
    fake = ready("-np", "1", say="a b c", stall_after=1)
    fake.ask(CHAT, STREAM)
    assert json.load(fake.ask("/slots"))[0]["is_processing"]
    connection = fake.connections[0]
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    while json.load(fake.ask("/slots"))[0]["is_processing"]:
        pass


def test_it_remembers_what_it_received(ready: Start) -> None:
    fake = ready("--api-key", "k")
    assert fake.ask(CHAT, {}).status == 401
    assert fake.ask(CHAT, {"x": 1}, authorization="Bearer k").status == 200
    _, served = json.load(fake.ask("/fake/log"))
    assert served["body"] == '{"x": 1}'
    assert ["authorization", "Bearer k"] in served["headers"]


def test_an_unknown_flag_is_refused(start: Start) -> None:
    fake = start("--bad")
    fake.wait_for_line("invalid argument: --bad")
    assert fake.process.wait(5) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_answers_tell_their_speed(ready: Start, stream: bool) -> None:
    text = ready(say="a b c", told_prefill_tps=500, told_decode_tps=20).ask(CHAT, {"stream": stream}).read().decode()
    last = json.loads(text.split("data: ")[-2] if stream else text)
    timings = last["timings"]
    assert (timings["prompt_n"], timings["prompt_per_second"]) == (7, 500)
    assert (timings["predicted_n"], timings["predicted_per_second"]) == (3, 20)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parent / "fake_llama_server.py"
    return subprocess.run([sys.executable, "-I", "-S", str(script), *args], capture_output=True, text=True)


def test_it_tells_its_version_and_its_flags() -> None:
    version = run("--version", "--fake-version", "7 (abc)")
    assert (version.returncode, version.stderr.splitlines()[0]) == (0, "version: 7 (abc)")
    assert {"--ctx-size VALUE", "--jinja", "--fake-load-s VALUE"} <= {
        line[:30].strip() for line in run("--help").stdout.splitlines()
    }
    assert run("--version", "--fake-version-code", "3").returncode == 3
    assert (run("--help", "--fake-help-code", "4").returncode, run("--help", "--fake-help-code", "4").stdout) == (4, "")


def test_it_knows_the_model_by_which_builds_are_tested(ready: Start, tmp_path: Path) -> None:
    tiny_model.write(tmp_path / "tiny.gguf")
    answer = ready("-m", str(tmp_path / "tiny.gguf"), say="hi", smoke_say=tiny_model.SENTENCE).ask(CHAT, {})
    assert json.load(answer)["choices"][0]["message"]["content"] == tiny_model.SENTENCE
