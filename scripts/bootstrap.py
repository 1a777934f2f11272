"""Creates .venv from requirements.lock, whatever state an earlier run left behind. Run it as `scripts/bootstrap`.

The virtual environment is complete exactly when its stamp file holds the fingerprint of what it was made from. The
stamp is written last and removed first, so an interrupted run is noticed and repeated from nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mesh.cli.failure import CliError  # noqa: E402 (standard library only, on purpose)
from mesh.cli.package_index import Index, PinnedFile  # noqa: E402

LOCK = ROOT / "requirements.lock"
#: Only where Python came without its own copy (Debian without python3-venv).
PIP = PinnedFile(
    "pip", "pip-26.3-py3-none-any.whl", "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13", 1_950_951
)
#: Settings of pip that make sense outside of a virtual environment and break an installation into one.
HOSTILE_SETTINGS = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV", "PYTHONHOME", "PYTHONPATH")


def main() -> int:
    venv = Path(os.environ.get("LLAMA_MESH_VENV") or ROOT / ".venv").absolute()
    try:
        with _locked(venv):
            if not _is_current(venv):
                _build(venv)
    except CliError as error:
        print(f"\nerror: {error.message}", *([f"fix:   {error.fix}"] if error.fix else []), sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the next run starts this set-up again", file=sys.stderr)
        return 130
    return 0


def _locked(venv: Path) -> TextIO:
    """Return a lock file, held until it is closed: two `make` at once must not build the same environment.

    Children inherit it, so that a pip that outlives a killed run is waited for and not raced.
    """
    venv.parent.mkdir(parents=True, exist_ok=True)
    lock = venv.with_name(venv.name + ".lock").open("w")
    os.set_inheritable(lock.fileno(), True)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _stamp(venv: Path) -> Path:
    return venv / ".llama-mesh-stamp"


def _fingerprint(venv: Path) -> str:
    """Digest what decides the content: the files, and the places that scripts and the editable install point to."""
    parts = [LOCK.read_bytes(), (ROOT / "pyproject.toml").read_bytes(), Path(__file__).read_bytes()]
    return hashlib.sha256(b"\0".join([*parts, bytes(ROOT), bytes(venv)])).hexdigest()


def _is_current(venv: Path) -> bool:
    stamp, python = _stamp(venv), venv / "bin/python"
    # exists() follows the link: an upgrade of the system's Python may have removed its target
    return stamp.exists() and stamp.read_text() == _fingerprint(venv) and python.exists()


def _build(venv: Path) -> None:
    if _stamp(venv).exists() and (venv / "bin/python").exists():
        _say(f"requirements changed: updating {venv}")
        _stamp(venv).unlink()
    else:
        _say(f"creating {venv} with Python {sys.version.split()[0]} ({sys.executable})")
        _create(venv)
    packages = sum("==" in line for line in LOCK.read_text().splitlines())
    _say(f"installing {packages} packages from requirements.lock (about 180 MB the first time)")
    _pip(venv, "install", "--require-hashes", "-r", str(LOCK))
    _say("installing llama-mesh itself, editable")
    _pip(venv, "install", "--no-deps", "--no-build-isolation", "--no-index", "-e", str(ROOT))
    _stamp(venv).write_text(_fingerprint(venv))
    _say(f"done; the command is {venv}/bin/llama-mesh")


def _create(venv: Path) -> None:
    """Make an empty environment with pip in it, in place of a broken or half-made one."""
    if venv.exists():
        if any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
            raise CliError(
                f"{venv} exists and is not a virtual environment", fix="Move it away, or set LLAMA_MESH_VENV"
            )
        shutil.rmtree(venv)
    if importlib.util.find_spec("venv") is None:
        raise CliError(
            f"{sys.executable} has no 'venv' module",
            fix="Debian, Ubuntu: apt-get install python3-venv, then try again.",
        )
    _run([sys.executable, "-m", "venv", "--without-pip", str(venv)])
    try:
        _run([str(venv / "bin/python"), "-m", "ensurepip"])
    except CliError:  # Debian puts it into a package of its own, and some distributions switch it off
        _install_pip_from_index(venv)


def _install_pip_from_index(venv: Path) -> None:
    """Fetch pip's wheel, check it, and let the pip inside it install itself."""
    _say(f"this Python has no ensurepip: fetching {PIP.filename} from the package index")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = Path(scratch) / PIP.filename
        Index(os.environ).fetch(PIP, wheel)
        _run([str(venv / "bin/python"), f"{wheel}/pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)])


def _pip(venv: Path, *arguments: str) -> None:
    _run([str(venv / "bin/python"), "-m", "pip", *arguments, "--disable-pip-version-check", "--progress-bar", "off"])


def _run(command: list[str]) -> None:
    """Run *command*, showing its lines one over the other on a terminal, and all of the last ones if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in HOSTILE_SETTINGS}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        cwd=ROOT,
        close_fds=False,
    )
    assert process.stdout is not None
    with process.stdout:
        tail = _show(process.stdout)
    if process.wait() != 0:
        output = "\n".join(f"  | {line}" for line in tail[-25:])
        raise CliError(
            f"this command failed with status {process.returncode}: {' '.join(command)}\n{output}",
            fix="Usually the network: HTTPS_PROXY for a proxy, PIP_INDEX_URL for a mirror. Then run it again.",
        )


def _show(lines: Iterable[str]) -> list[str]:
    width = shutil.get_terminal_size().columns - 4
    live = sys.stdout.isatty()
    kept = []
    for line in lines:
        kept.append(line.rstrip())
        if live:
            print(f"\r\x1b[K    {kept[-1].strip()[:width]}", end="", flush=True)
    if live:
        print("\r\x1b[K", end="", flush=True)
    return kept


def _say(text: str) -> None:
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
