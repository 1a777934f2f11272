"""The arguments of nodes, route, drain and undrain, and which node prewarm and unload are for."""

from __future__ import annotations

import pytest

from mesh.cli import drain, nodes, parser, route
from mesh.cli.main import run


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["nodes"], {"command": nodes.nodes, "watch": None, "json": False}),
        (["nodes", "--watch"], {"watch": 2.0}),
        (["nodes", "--watch", "0.5", "--json"], {"watch": 0.5, "json": True}),
        (["route", "m"], {"command": route.route, "model": "m", "prompt_tokens": None, "max_tokens": None}),
        (["route", "m", "--prompt-tokens", "9", "--max-tokens", "8"], {"prompt_tokens": 9, "max_tokens": 8}),
        (["drain"], {"command": drain.drain, "node": None, "unload": False, "wait": False}),
        (["drain", "gpu1", "--unload", "--wait"], {"node": "gpu1", "unload": True, "wait": True}),
        (["undrain", "gpu1"], {"command": drain.undrain, "node": "gpu1"}),
        (["prewarm", "m"], {"node": None, "everywhere": False}),
        (["prewarm", "m", "--node", "gpu1"], {"node": "gpu1"}),
        (["unload", "--all", "--everywhere"], {"all": True, "everywhere": True}),
    ],
)
def test_arguments(argv: list[str], expected: dict[str, object]) -> None:
    found = vars(parser.parse(argv))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nodes", "--watch", "0"], "not a positive number of seconds"),
        (["nodes", "--watch", "0.01"], "too often"),
        (["nodes", "gpu1"], "unrecognized arguments"),
        (["route"], "MODEL"),
        (["route", "m", "--prompt-tokens", "-1"], "not a positive number"),
        (["undrain", "--unload"], "unrecognized arguments"),
        (["prewarm", "m", "--node", "gpu1", "--everywhere"], "not allowed with"),
        (["unload", "m", "--node"], "expected one argument"),
        (["node"], "Did you mean 'nodes'?"),
    ],
)
def test_wrong_usage(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(argv)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nodes", "route", "drain", "undrain", "prewarm", "unload"])
def test_help_teaches_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"llama-mesh {name}" in text.partition("examples:")[2]
    assert max(map(len, text.splitlines())) <= 120
