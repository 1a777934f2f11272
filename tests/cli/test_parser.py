"""The command line itself: llamesh's form, helpful refusals, help that teaches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mesh.cli import parser, serve
from mesh.cli.main import run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("argv", [[], ["serve"], ["--config", "c.yaml"], ["--config=c.yaml"], ["serve", "--port", "0"]])
def test_serve_is_the_default(argv: list[str]) -> None:
    """llamesh's users move over by changing the command's name."""
    assert parser.parse(argv).command is serve.serve


def test_every_command_explains_itself_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    _, names = parser.build()
    assert set(names) == {
        "serve",
        "check",
        "demo",
        "fit",
        "models",
        "ps",
        "prewarm",
        "unload",
        "logs",
        "transcribe",
        "token",
        "keys",
        "join",
        "nodes",
        "route",
        "drain",
        "undrain",
        "rebuild",
        "rollback",
        "builds",
        "version",
    }
    for name in names:
        with pytest.raises(SystemExit) as caught:
            run([name, "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert "--json" in text
        _, _, examples = text.partition("examples:")
        assert f"llama-mesh {name}" in examples
    with pytest.raises(SystemExit):
        run(["--help"])
    overview = capsys.readouterr().out
    assert all(name in overview for name in names)
    assert "exit status: 0 done, 1 failed, 2 wrong usage" in overview
    assert "where Ctrl-C is the normal end" in overview


@pytest.mark.parametrize(
    ("argv", "args", "as_json"),
    [
        (["m", "--args", "-c 8192"], "-c 8192", False),
        (["m", "--args", "--embedding"], "--embedding", False),  # argparse alone: "expected one argument"
        (["--args", "-fa", "m"], "-fa", False),
        (["m", "--args=--embedding", "--json"], "--embedding", True),
        (["--json", "m", "--args", "--mlock"], "--mlock", True),
        (["m", "--args", "-a", "--args", "-b"], "-b", False),  # the last one wins, as with any flag
        (["--args", "--mlock", "--", "m"], "--mlock", False),
        (["--", "m", "--args", "x"], None, False),
    ],
)
def test_arguments_for_llama_server_may_begin_with_a_dash(argv: list[str], args: str | None, as_json: bool) -> None:
    arguments = parser.parse(["fit", *argv])
    assert (arguments.args, arguments.json, arguments.models[0]) == (args, as_json, "m")


def test_args_without_a_value_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["fit", "m", "--args"])
    assert caught.value.code == 2
    assert "--args: expected one argument" in capsys.readouterr().err


def test_the_help_of_fit_tells_its_shapes_and_its_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["fit", "--help"])
    text = capsys.readouterr().out
    assert "one MODEL prints one object" in text
    assert "{node, models: [such objects], budget}" in text
    assert '"does not fit" is an answer' in text
    assert '--args="-c 32768' in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sevre"], "Did you mean 'serve'?"),
        (["frobnicate"], "The commands are serve"),
        (["server"], "Did you mean 'serve'?"),
        (["stop"], "The commands are serve"),
        (["list"], "The commands are serve"),
        (["serve", "--prot", "1"], "--prot"),
        (["serve", "--port", "70000"], "not a port"),
        (["serve", "--log-level", "loud"], "debug"),
        (["prewarm"], "MODEL"),
        (["prewarm", "m", "--timeout", "0"], "'0' is not a positive number of seconds"),
        (["prewarm", "m", "--timeout", "nan"], "'nan' is not a positive number of seconds"),
        (["prewarm", "m", "--timeout", "1m"], "'1m' is not a positive number of seconds"),
        (["transcribe"], "FILE"),
        (["transcribe", "f.wav", "--format", "docx"], "verbose_json"),
    ],
)
def test_wrong_usage_is_exit_2_and_points_to_help(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "--help" in error


def test_version_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("llama-mesh ")


def test_it_is_a_module_and_a_closed_pipe_is_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m mesh check --json | true",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "Traceback" not in done.stderr
