"""Every way a command can end becomes an exit status and at most one message, never a traceback."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mesh.cli import main, parser
from mesh.cli.failure import CliError
from mesh.errors import ConfigError

ROOT = Path(__file__).parents[2]


def _run(monkeypatch: pytest.MonkeyPatch, command: Callable[[argparse.Namespace], int], *, json: bool = False) -> int:
    monkeypatch.setattr(parser, "parse", lambda argv: argparse.Namespace(command=command, json=json))
    return main.run([])


def _raises(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def command(arguments: argparse.Namespace) -> int:
        raise error

    return command


def test_the_commands_status_is_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run(monkeypatch, lambda arguments: 0) == 0
    assert _run(monkeypatch, lambda arguments: 1) == 1


def test_errors_are_told_with_their_fix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, _raises(CliError("it [broke]", fix="Mend it.", exit_code=2))) == 2
    assert capsys.readouterr().err == "error: it [broke]\nfix:   Mend it.\n"
    assert _run(monkeypatch, _raises(ConfigError("config.yaml:1: x: bad")), json=True) == 1
    assert json.loads(capsys.readouterr().err) == {"error": {"message": "config.yaml:1: x: bad", "fix": None}}


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run(monkeypatch, _raises(KeyboardInterrupt())) == 130


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        _run(monkeypatch, _raises(ZeroDivisionError()))


def test_a_reader_that_leaves_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody_reads:
        done = subprocess.run(
            [sys.executable, "-m", "mesh", "check", "--json"],
            cwd=ROOT,
            stdout=nobody_reads,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("command", [["check"], ["check", "--json"], ["version"]])
def test_a_full_disk_is_no_traceback(command: list[str], tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mesh", *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_ctrl_c_during_a_real_command(tmp_path: Path) -> None:
    """A prewarm that hangs is left at once, without a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "mesh", "prewarm", "m", "--url", url, "--key", "k"]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            silent.settimeout(20)
            accepted, _ = silent.accept()
            with accepted:
                process.send_signal(signal.SIGINT)
                assert process.wait(10) == 130
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
