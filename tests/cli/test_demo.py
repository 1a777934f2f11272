"""`demo`: starts a node, streams an answer, and leaves no process and no file, however it ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from mesh.cli import demo, demo_model, demo_speech, whisper_setup
from mesh.cli.failure import CliError
from mesh.cli.main import run
from mesh.cli.whisper_build import NotPossibleError
from mesh.cli.whisper_setup import WhisperParts
from tests.real_whisper import silence

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def scripted_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Put a small script in the node's place; the value is the directory in which it leaves notes."""
    if "e2e" in request.keywords:
        yield tmp_path
        return
    notes, scratch = tmp_path / "notes", tmp_path / "scratch"
    notes.mkdir()
    scratch.mkdir()
    monkeypatch.setattr(demo, "_command", lambda _: [sys.executable, str(ROOT / "tests/cli/demo_node.py")])
    monkeypatch.setattr(demo_model, "ensure", lambda environ, console: tmp_path / "model.gguf")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setenv("DEMO_NOTES", str(notes))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield notes
    for number, handler in before.items():
        signal.signal(number, handler)


def _nothing_is_left(notes: Path) -> bool:
    pid = int((notes / "pid").read_text())
    return not psutil.pid_exists(pid) and not any((notes.parent / "scratch").iterdir())


def test_streams_the_answer_and_says_how_fast(scripted_node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--prompt", "it's why?"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Llamas carry [much].\n")
    assert "tokens/s, first token after" in captured.out
    assert "7 tokens" in captured.out
    assert "it'\\''s why?" in captured.out
    assert "http://127.0.0.1:" in captured.err
    assert "demo --transcribe" in captured.err.splitlines()[-1]
    assert _nothing_is_left(scripted_node)


def test_as_json(scripted_node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] == "Llamas carry [much].\n"
    assert result["tokens"] == 7
    assert result["first_token_s"] >= 0
    assert "transcription" not in result
    assert _nothing_is_left(scripted_node)


def test_a_node_that_does_not_start_shows_its_last_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEMO_FAULT", "crash")
    assert run(["demo"]) == 1
    error = capsys.readouterr().err
    assert "the node ended with status 1" in error
    assert "port in use, sorry" in error


def test_an_error_in_the_stream_is_a_failure(
    scripted_node: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEMO_FAULT", "error")
    assert run(["demo"]) == 1
    assert "llama-server died" in capsys.readouterr().err
    assert _nothing_is_left(scripted_node)


def test_a_node_that_ignores_the_first_sigterm_is_stopped(scripted_node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STOP_TIMEOUT_S", 0.3)
    monkeypatch.setenv("DEMO_FAULT", "deaf")
    assert run(["demo", "--json"]) == 0
    assert (scripted_node / "deaf").exists()
    assert _nothing_is_left(scripted_node)


@pytest.fixture
def speech(scripted_node: Path, monkeypatch: pytest.MonkeyPatch) -> WhisperParts:
    """Stands in for the parts that would have to be fetched and compiled."""
    parts = WhisperParts(Path("/cache/whisper-server"), Path("/cache/tiny.bin"), scripted_node / "it's.wav")
    parts.speech.write_bytes(silence(3))
    monkeypatch.setattr(whisper_setup, "ensure", lambda environ, console: parts)
    return parts


def test_the_second_step_transcribes(
    scripted_node: Path, speech: WhisperParts, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["demo", "--transcribe"]) == 0
    captured = capsys.readouterr()
    chat, _, heard = captured.out.partition("curl -N")
    assert chat.startswith("Llamas carry [much].\n")
    assert " bytes for whisper-tiny by /cache/whisper-server\n" in heard
    assert "3 s of speech in " in heard
    assert f"-F {shlex.quote(f'file=@{speech.speech}')}" in heard
    assert "demo --transcribe" not in captured.err
    assert _nothing_is_left(scripted_node)


def test_the_second_step_as_json(scripted_node: Path, speech: WhisperParts, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--transcribe", "--json"]) == 0
    heard = json.loads(capsys.readouterr().out)["transcription"]
    assert (heard["model"], heard["speech_s"]) == (demo_speech.MODEL, 3.0)
    assert " bytes for whisper-tiny" in heard["text"]


def test_a_second_step_that_fails_is_a_failure(
    scripted_node: Path, speech: WhisperParts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEMO_FAULT", "mute")
    assert run(["demo", "--transcribe"]) == 1
    assert "whisper-server died" in capsys.readouterr().err
    assert _nothing_is_left(scripted_node)


@pytest.mark.parametrize("kind", [NotPossibleError, CliError], ids=["no compiler", "no network"])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_a_second_step_that_cannot_be_prepared_is_left_out(
    options: list[str], kind: type[CliError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ensure(environ: object, console: object) -> WhisperParts:
        raise kind("there is no C++ compiler", fix="apt-get install [g++]")

    monkeypatch.setattr(whisper_setup, "ensure", ensure)
    assert run(["demo", "--transcribe", *options]) == 0
    captured = capsys.readouterr()
    assert "the transcription is left out: there is no C++ compiler\napt-get install [g++]\n" in captured.err
    if options:
        assert json.loads(captured.out)["transcription"] is None
    else:
        assert "tokens/s, first token after" in captured.out


def test_overrides_of_the_user_do_not_reach_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMESH_AUTH__ENABLED", "true")
    monkeypatch.setenv("LLAMA_MESH_CACHE", "/kept")
    environment = demo._environment()
    assert "LLAMESH_AUTH__ENABLED" not in environment
    assert environment["LLAMA_MESH_CACHE"] == "/kept"


_KEEP = """
import sys
from pathlib import Path
from mesh.cli import demo, demo_model, demo_speech, whisper_setup
demo._command = lambda _: [sys.executable, sys.argv[1]]
demo_model.ensure = lambda environ, console: Path("model.gguf")
from mesh.cli.failure import CliError
from mesh.cli.main import run
sys.exit(run(["demo", "--keep"]))
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda process: process.send_signal(signal.SIGINT), 0),
        (lambda process: process.send_signal(signal.SIGTERM), 128 + signal.SIGTERM),
        (lambda process: process.kill(), -signal.SIGKILL),
    ],
    ids=["ctrl-c", "sigterm", "sigkill"],
)
def test_keep_runs_until_told_and_never_leaves_a_node(
    scripted_node: Path, tmp_path: Path, end: Callable[[subprocess.Popen[str]], None], status: int
) -> None:
    """Trap 13, for the demo: whatever ends it, the node it started ends too."""
    command = [sys.executable, "-c", _KEEP, str(ROOT / "tests/cli/demo_node.py")]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any("keeps running" in line for line in process.stderr)
        node = psutil.Process(int((scripted_node / "pid").read_text()))
        end(process)
        assert process.wait(10) == status
        psutil.wait_procs([node], timeout=10)
        assert not node.is_running()


@pytest.mark.e2e
@pytest.mark.slow
def test_the_real_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it: real node, real llama-server, real model."""
    demo_model.ensure(os.environ, Console(stderr=True))
    done = subprocess.run(
        [sys.executable, "-m", "mesh", "demo", "--json", "--max-tokens", "24"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["text"].split()) > 5
    assert 1 <= result["tokens"] <= 24
    assert result["tokens_per_s"] > 0


@pytest.mark.e2e
@pytest.mark.slow
def test_the_real_second_step() -> None:
    try:
        whisper_setup.ensure(os.environ, Console(stderr=True))
    except NotPossibleError as error:
        pytest.skip(error.message)
    demo_model.ensure(os.environ, Console(stderr=True))
    done = subprocess.run(
        [sys.executable, "-m", "mesh", "demo", "--json", "--transcribe", "--max-tokens", "8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    heard = json.loads(done.stdout)["transcription"]
    assert whisper_setup.SPEECH_SAYS in heard["text"]
    assert heard["speech_s"] == pytest.approx(11.0, abs=0.1)
