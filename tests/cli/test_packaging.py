"""The set-up scripts and the lock: what a newcomer's first `make` depends on."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from mesh.cli.failure import CliError

ROOT = Path(__file__).parents[2]


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bootstrap() -> ModuleType:
    return _script("bootstrap")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_pins_everything_that_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["engine"]]
    wanted += project["optional-dependencies"]["dev"]
    lock = (ROOT / "requirements.lock").read_text()
    locked = {_normal(name) for name in re.findall(r"(?m)^([A-Za-z0-9._-]+)==", lock)}
    assert {_normal(re.split(r"[<>=!~\[; ]", item)[0]) for item in wanted} <= locked
    assert "xllamacpp==2026.10.11549" in lock
    for block in re.split(r"(?m)^(?=[a-z].*==)", lock)[1:]:
        assert "--hash=sha256:" in block, block


@pytest.mark.parametrize(
    ("filename", "kept"),
    [
        ("a_b-1.0-py3-none-any.whl", True),
        ("a_b-1.0-py2.py3-none-any.whl", True),
        ("a-b-1.0.tar.gz", True),
        ("a_b-1.0-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", True),
        ("a_b-1.0-cp313-cp313-macosx_11_0_arm64.whl", True),
        ("a_b-1.0-cp310-abi3-musllinux_1_2_aarch64.whl", True),
        ("a_b-1.0-cp310-cp310-manylinux2014_x86_64.whl", False),
        ("a_b-1.0-cp311-cp311-win_amd64.whl", False),
        ("a_b-1.0-cp313-cp313t-manylinux2014_x86_64.whl", False),
        ("a_b-1.0-cp311-cp311-manylinux2014_s390x.whl", False),
        ("a_b-1.0.1-py3-none-any.whl", False),
        ("a_b_c-1.0-py3-none-any.whl", False),
    ],
)
def test_which_files_of_a_release_are_locked(filename: str, kept: bool) -> None:
    assert _script("lock").belongs(filename, "a-b", "1.0") is kept


def test_an_environment_without_the_right_stamp_is_not_current(bootstrap: ModuleType, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    assert not bootstrap._is_current(venv)
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").symlink_to(sys.executable)
    assert not bootstrap._is_current(venv), "interrupted before the stamp was written"
    bootstrap._stamp(venv).write_text(bootstrap._fingerprint(venv))
    assert bootstrap._is_current(venv)
    bootstrap._stamp(venv).write_text("made from another lock")
    assert not bootstrap._is_current(venv)
    bootstrap._stamp(venv).write_text(bootstrap._fingerprint(venv))
    (venv / "bin/python").unlink()
    (venv / "bin/python").symlink_to("/nowhere/python3")
    assert not bootstrap._is_current(venv), "the system's Python was replaced"


def test_a_directory_that_is_no_environment_is_left_alone(bootstrap: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(CliError, match="not a virtual environment"):
        bootstrap._create(tmp_path)
    assert (tmp_path / "precious").exists()


def test_a_failed_step_shows_its_output_and_a_fix(bootstrap: ModuleType) -> None:
    with pytest.raises(CliError, match="no matching distribution") as caught:
        bootstrap._run([sys.executable, "-c", "print('no matching distribution'); raise SystemExit(3)"])
    assert "PIP_INDEX_URL" in (caught.value.fix or "")


def test_an_interrupted_environment_is_replaced_and_gets_pip(bootstrap: ModuleType, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "lib").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("half-made")
    bootstrap._create(venv)
    done = subprocess.run([str(venv / "bin/python"), "-m", "pip", "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_make_target_is_explained() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("demo", "test", "lint", "format", "bench", "lock", "clean", "setup", "help"):
        assert f"make {target} " in done.stdout


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().rstrip().endswith("exec make test")
