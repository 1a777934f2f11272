"""The arguments of rebuild, rollback and builds."""

from __future__ import annotations

import pytest

from mesh.cli import builds, parser
from mesh.cli.main import run


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["rebuild"], {"command": builds.rebuild, "name": None, "branch": None, "force": False, "no_wait": False}),
        (["rebuild", "cuda", "--branch", "b6123", "--force"], {"name": "cuda", "branch": "b6123", "force": True}),
        (["rebuild", "--cancel", "--node", "gpu2"], {"cancel": True, "node": "gpu2", "everywhere": False}),
        (["rebuild", "--no-wait", "--everywhere", "--json"], {"no_wait": True, "everywhere": True, "json": True}),
        (["rollback", "cuda", "--everywhere"], {"command": builds.rollback, "name": "cuda", "everywhere": True}),
        (["builds", "--json"], {"command": builds.builds, "json": True, "node": None}),
    ],
)
def test_arguments(argv: list[str], expected: dict[str, object]) -> None:
    found = vars(parser.parse(argv))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["rebuild", "--no-wait", "--cancel"], "not allowed with"),
        (["rebuild", "--node", "a", "--everywhere"], "not allowed with"),
        (["rebuild", "a", "b"], "unrecognized arguments"),
        (["rollback", "--branch", "x"], "unrecognized arguments"),
        (["rebiuld"], "Did you mean 'rebuild'?"),
        (["rollbak"], "Did you mean 'rollback'?"),
    ],
)
def test_wrong_usage(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(argv)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rebuild", "rollback", "builds"])
def test_help_teaches_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"llama-mesh {name}" in text.partition("examples:")[2]
    assert max(map(len, text.splitlines())) <= 120
